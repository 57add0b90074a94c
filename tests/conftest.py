"""Eight simulated devices for every test, programs compiled in a hurry, a cache folder of its own, and no network."""

import os
import tempfile

os.environ["CLIP_JAX_CACHE"] = tempfile.mkdtemp(prefix="clip-jax-test-cache-")
os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["JAX_PLATFORMS"] = "cpu"
os.environ["XLA_FLAGS"] = "--xla_backend_optimization_level=0"  # most of the time of a test is the compiler's

from pathlib import Path

import jax
import pytest

jax.config.update("jax_num_cpu_devices", 8)

SHARED_DATA = Path(__file__).resolve().parents[2] / "shared" / "data"


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
