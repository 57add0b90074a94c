"""Eight simulated devices for every test, programs compiled in a hurry, a cache folder of its own, and no network."""

import gc
import importlib.metadata
import os
import sys
import tempfile
from pathlib import Path

os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["JAX_PLATFORMS"] = "cpu"
# Most of the time of a test is the compiler's: without optimization it takes half of the time, and without the MLIR
# emitters of fusions half of that. Newer compilers have no other emitters, and stop at a flag that they do not know.
os.environ["XLA_FLAGS"] = "--xla_backend_optimization_level=0"
if importlib.metadata.version("jaxlib").startswith("0.10."):
    os.environ["XLA_FLAGS"] += " --xla_cpu_use_fusion_emitters=false"

import jax
import pytest

from clip_jax.devices import simulated

simulated.use_cpus(8)

CACHE = tempfile.TemporaryDirectory(prefix="clip-jax-test-cache-")  # removed when Python ends
os.environ["CLIP_JAX_CACHE"] = CACHE.name

SHARED_DATA = Path(__file__).resolve().parents[2] / "shared" / "data"


LONGEST = (
    "test_docs.py",
    "test_every_objective.py",
    "test_pretraining.py",
    "test_recipes.py",
    "test_resume.py",
    "test_step.py",
)
"""Files that take long: they start first, so that no worker runs one of them alone at the end."""


def pytest_collection_modifyitems(items):
    order = {name: rank for rank, name in enumerate(LONGEST)}
    items.sort(key=lambda item: order.get(item.path.name, len(LONGEST)))


@pytest.fixture(scope="module", autouse=True)
def small_worker():
    """Drops compiled programs once they take gigabytes; small ones are of use to the next module."""
    yield
    if resident_bytes() > 3 * 2**30:
        jax.clear_caches()
        gc.collect()


def resident_bytes() -> int:
    try:
        return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")
    except OSError:
        return sys.maxsize  # not Linux


@pytest.fixture(scope="session")
def shared_data() -> Path:
    """Real image-text shards beside the project; tests that need them are skipped without."""
    if not SHARED_DATA.is_dir():
        pytest.skip(f"{SHARED_DATA} is not here")
    return SHARED_DATA


@pytest.fixture(scope="session")
def small_run(tmp_path_factory) -> Path:
    """The folder of a finished run of twelve steps over tar shards, trained here on eight devices."""
    from clip_jax.training import loop
    from tests.training import runs

    folder = tmp_path_factory.mktemp("small run")  # with a space in its name
    workdir = folder / "run"
    assert loop.run(workdir=str(workdir), recipe=str(runs.write_recipe(folder)), overrides={}) == 0
    return workdir


@pytest.fixture(scope="session")
def siglip_models(tmp_path_factory) -> dict[int, Path]:
    """Small vocabularies that begin like T5's (SigLIP, 1) and Gemma's (SigLIP 2)."""
    import sentencepiece as spm

    from tests.data.test_tokenizers import CAPTIONS

    folder = tmp_path_factory.mktemp("siglip")
    lines = [caption.lower() for caption in CAPTIONS]
    common = {"vocab_size": 60, "hard_vocab_limit": False, "pad_id": 0, "eos_id": 1, "minloglevel": 2}
    spm.SentencePieceTrainer.train(
        sentence_iterator=iter(lines), model_prefix=str(folder / "1"), unk_id=2, bos_id=-1, **common
    )
    gemma = {"bos_id": 2, "unk_id": 3, "bos_piece": "<bos>", "eos_piece": "<eos>", "add_dummy_prefix": False}
    spm.SentencePieceTrainer.train(
        sentence_iterator=iter(lines), model_prefix=str(folder / "2"), model_type="bpe", **gemma, **common
    )
    return {1: folder / "1.model", 2: folder / "2.model"}
