"""A trained model for tests of evaluations."""

import shutil
from pathlib import Path

import pytest

OLD_RUNS = Path(__file__).parents[1] / "data" / "old_runs"


@pytest.fixture(scope="session")
def run(tmp_path_factory):
    """The folder of a run with its tokenizer."""
    folder = shutil.copytree(OLD_RUNS / "vit", tmp_path_factory.mktemp("trained") / "vit")
    shutil.copytree(OLD_RUNS / "tokenizer", folder / "tokenizer")
    return folder
