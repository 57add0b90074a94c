"""A checkpoint is never in memory twice: loading it peaks slightly above the size of its file."""

import dataclasses
import json
import math
import os
import subprocess
import sys
from pathlib import Path

import pytest

from clip_jax import presets
from clip_jax.interop import foreign, open_clip, open_clip_config
from tests.interop import folders_of

LOAD = """
import json, sys
import jax
from clip_jax.interop import foreign
import clip_jax.model

def memory(name):  # not getrusage: its maximum begins with the parent's
    lines = dict(line.split(":") for line in open("/proc/self/status"))
    return 1024 * int(lines[name].split()[0])

jax.devices()
before = memory("VmRSS")
model = clip_jax.load(sys.argv[1])
jax.block_until_ready(model.params)
print(json.dumps([before, memory("VmHWM")]))
"""


def test_leaves_are_put_one_at_a_time_the_largest_first(tmp_path):
    sizes = []
    found = foreign.open_folder(folders_of.open_clip_folder(tmp_path))
    foreign.read_params(found, lambda path, leaf: sizes.append(leaf.size))
    assert sizes == sorted(sizes, reverse=True) and len(sizes) == len(set(_paths(found)))


def _paths(found):
    paths = []
    foreign.read_params(found, lambda path, leaf: paths.append(path))
    return paths


@pytest.mark.exhaustive
@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="the peak is read from /proc")
def test_loading_an_h14_peaks_below_1_3_times_its_file(tmp_path):
    """A sparse file of 3.9 GB of zeros: no space on the disk, but memory once it is read."""
    preset = presets.preset("ViT-H/14")
    (tmp_path / "open_clip_config.json").write_text(json.dumps(open_clip_config.from_preset(preset)))
    file = tmp_path / "open_clip_model.safetensors"
    write_zeros(file, tensors(preset))
    assert 3.9e9 < file.stat().st_size < 4e9
    command = [sys.executable, "-c", LOAD, tmp_path]
    done = subprocess.run(command, capture_output=True, text=True, cwd=Path(__file__).resolve().parents[2])
    assert done.returncode == 0, done.stderr[-2000:]
    before, peak = json.loads(done.stdout)
    print(f"\nloading peaks at {(peak - before) / file.stat().st_size:.3f} times the file")
    assert file.stat().st_size < peak - before < 1.3 * file.stat().st_size


def tensors(preset):
    """OpenCLIP's names and shapes, from a model of one block in each tower."""
    towers = {"image": preset.architecture.image, "text": preset.architecture.text}
    shallow = {name: dataclasses.replace(tower, layers=1) for name, tower in towers.items()}
    small = preset._replace(architecture=dataclasses.replace(preset.architecture, **shallow))
    shapes = {}
    for name, array in open_clip.from_params(folders_of.parameters(small), small.architecture).items():
        layers = towers["image" if name.startswith("visual.") else "text"].layers if ".resblocks.0." in name else 1
        shapes |= {name.replace(".resblocks.0.", f".resblocks.{layer}."): array.shape for layer in range(layers)}
    return shapes


def write_zeros(path, shapes):
    """A safetensors file of float32 zeros, sparse where the file system can."""
    header, end = {}, 0
    for name, shape in shapes.items():
        start, end = end, end + 4 * math.prod(shape)
        header[name] = {"dtype": "F32", "shape": shape, "data_offsets": [start, end]}
    text = json.dumps(header).encode()
    path.write_bytes(len(text).to_bytes(8, "little") + text)
    os.truncate(path, 8 + len(text) + end)
