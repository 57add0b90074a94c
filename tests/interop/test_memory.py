"""A checkpoint is never in memory twice: loading one peaks little above the size of its file."""

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from clip_jax import presets
from clip_jax.interop import foreign
from tests.interop import folders_of

LOAD = """
import json, resource, sys
import jax
from clip_jax.interop import foreign
import clip_jax.model

jax.devices()
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
model = clip_jax.load(sys.argv[1])
jax.block_until_ready(model.params)
print(json.dumps([before, resource.getrusage(resource.RUSAGE_SELF).ru_maxrss]))
"""


def test_leaves_are_placed_one_at_a_time_the_largest_first(tmp_path):
    sizes = []
    found = foreign.open_folder(folders_of.open_clip_folder(tmp_path))
    foreign.read_params(found, lambda path, leaf: sizes.append(leaf.size))
    assert sizes == sorted(sizes, reverse=True) and len(sizes) == len(set(_paths(found)))


def _paths(found):
    paths = []
    foreign.read_params(found, lambda path, leaf: paths.append(path))
    return paths


@pytest.mark.slow
def test_loading_peaks_below_1_3_times_the_file(tmp_path):
    folder = folders_of.open_clip_folder(tmp_path, presets.preset("ViT-B/16"))
    command = [sys.executable, "-c", LOAD, folder]
    done = subprocess.run(command, capture_output=True, text=True, cwd=Path(__file__).resolve().parents[2])
    assert done.returncode == 0, done.stderr[-2000:]
    before, peak = np.array(json.loads(done.stdout)) * (1 if sys.platform == "darwin" else 1024)
    assert peak - before < 1.3 * (folder / "open_clip_model.safetensors").stat().st_size
