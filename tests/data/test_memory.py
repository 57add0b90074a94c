"""Pairs in memory: a source like any other, down to training and packing."""

import numpy as np
import pytest

from clip_jax.commands import main
from clip_jax.data.sources import BadSampleError, memory, open_source
from clip_jax.data.stream import read
from clip_jax.errors import UserError
from clip_jax.training import loop
from tests.data.shards import jpeg
from tests.training import runs

PIXELS = np.random.default_rng(0).integers(0, 256, (32, 32, 3), np.uint8)


def test_pairs_are_arrays_or_files_with_one_or_several_captions():
    memory.put(
        "mine",
        [PIXELS, jpeg(1)],
        [" a cat ", ["a dog", "ein Hund"]],
        labels=np.array([1, 0]),
        class_names=["dog", "cat"],
    )
    source = open_source("memory:mine")
    assert len(source) == 2 and source.class_names == ("dog", "cat")
    assert (source[0].captions, source[0].label, source[0].key) == (("a cat",), 1, "memory:mine[0]")
    assert source[1].captions == ("a dog", "ein Hund") and read(source, 1).image == jpeg(1)


def test_the_fingerprint_changes_with_any_pixel_caption_and_label():
    def fingerprint(pixels=PIXELS, caption="a cat", **labels):
        return memory.put("same", [pixels], [caption], **labels).fingerprint

    other = PIXELS.copy()
    other[0, 0, 0] ^= 1
    found = [fingerprint(), fingerprint(other), fingerprint(caption="a car"), fingerprint(PIXELS.reshape(16, 64, 3))]
    found.append(fingerprint(labels=[0], class_names=["cat"]))
    assert len(set(found)) == len(found) and fingerprint() == found[0]


def test_mistakes_are_one_line():
    with pytest.raises(UserError, match="memory:bad: 2 images, 1 captions and 0 labels"):
        memory.put("bad", [PIXELS] * 2, ["a"])
    with pytest.raises(UserError, match="memory:bad: no pairs"):
        memory.put("bad", [], [])
    with pytest.raises(UserError, match="label 3 is none of the 1 class names"):
        memory.put("bad", [PIXELS], ["a"], labels=[3], class_names=["cat"])
    memory.put("mine", [PIXELS], [""])
    with pytest.raises(BadSampleError, match="empty caption"):
        open_source("memory:mine")[0]
    with pytest.raises(UserError, match=r"memory:mind: no pairs of this name in this process \(nearest: mine\)"):
        open_source("memory:mind")


@pytest.mark.slow
def test_a_run_trains_on_them_and_refuses_others(tmp_path):
    recipe = str(runs.write_recipe(tmp_path))
    images = [jpeg(i) for i in range(40)]
    captions = [f"picture number {i}" for i in range(40)]
    memory.put("train", images, captions)
    settings = {"data.train": "memory:train", "steps": "4", "log.tensorboard": "False"}
    assert loop.run(workdir=str(tmp_path / "run"), recipe=recipe, overrides=settings) == 0
    assert main(["pack", "memory:train", f"--to={tmp_path / 'shards'}"]) == 0
    assert len(open_source(f"tar:{tmp_path / 'shards'}")) == 40
    memory.put("train", images[::-1], captions)
    with pytest.raises(UserError, match="is not the data this run began with"):
        loop.run(workdir=str(tmp_path / "run"), recipe=None, overrides={"steps": "8"})
