"""A run whose images grow in the middle: one compiled step per phase, and exact resumption on either side."""

import json
import shutil
from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import clip_jax
from clip_jax.errors import UserError
from clip_jax.models import flops, resize
from clip_jax.training import loop
from clip_jax.training.phases import resize_positions
from tests.training import runs

GROWING = {
    "steps": "7",
    "model.image.image_size": "64",
    "phases": "({'start': 4, 'model.image.image_size': 96, 'model.patch_dropout': 0.5},)",
    "checkpoint.every_steps": "1",
    "checkpoint.keep_last": "7",
    "ema_decay": "0.5",
    "log.tensorboard": "False",
}


@pytest.fixture(scope="module")
def grown(tmp_path_factory):
    folder = tmp_path_factory.mktemp("phases")
    recipe, workdir = str(runs.write_recipe(folder)), folder / "run"
    assert loop.run(workdir=str(workdir), recipe=recipe, overrides=GROWING) == 0
    return workdir


@pytest.mark.slow
@pytest.mark.parametrize("last", [3, *(pytest.param(step, marks=pytest.mark.exhaustive) for step in (4, 5))])
def test_killed_on_either_side_of_the_switch_it_resumes_exactly(grown, tmp_path, last):
    killed = tmp_path / "killed"
    shutil.copytree(grown, killed)
    for step in range(last + 1, 8):
        shutil.rmtree(killed / "checkpoints" / str(step))
    assert loop.run(workdir=str(killed), recipe=None, overrides={}) == 0
    assert runs.metrics(killed) == runs.metrics(grown)


@pytest.mark.slow
def test_flops_are_those_of_each_phase(grown):
    lines = [line for line in runs.metrics(grown) if "train/flops" in line]
    steps = np.diff([0, *(line["train/flops"] for line in lines)])
    assert len(set(steps[:4])) == len(set(steps[4:])) == 1
    trained = clip_jax.load(grown).preset.architecture
    halved = replace(trained, image=trained.image.dropping(0.5))
    assert steps[4] == 16 * flops.training(halved) < 16 * flops.training(trained)


@pytest.mark.slow
def test_a_checkpoint_loads_as_the_model_of_its_phase(grown, tmp_path):
    assert clip_jax.load(grown).image_size == 96
    assert clip_jax.load(grown).params["image"]["position_embedding"].shape[0] == 1 + 6 * 6
    before = tmp_path / "before"
    shutil.copytree(grown, before)
    for step in range(5, 8):
        shutil.rmtree(before / "checkpoints" / str(step))
    assert clip_jax.load(before).image_size == 64
    run = json.loads((grown / "run.json").read_text())
    assert [phase["start"] for phase in run["phases"]] == [0, 4]


def test_the_cooldown_of_a_later_phase_is_not_longer_than_the_run(tmp_path):
    phases = "({'start': 4, 'optimizer.schedule': 'wsd', 'optimizer.cooldown_steps': 8},)"
    recipe = str(runs.write_recipe(tmp_path))
    with pytest.raises(UserError, match="3 steps of warm-up and 8 of cool-down in a run of 7"):
        loop.run(workdir=str(tmp_path / "run"), recipe=recipe, overrides=GROWING | {"phases": phases})


def test_positions_are_resized_as_foreign_weights_are_and_second_moments_stay_positive():
    positions = np.random.default_rng(0).normal(size=(1 + 16, 5)).astype(np.float32)
    ours = resize_positions(jnp.asarray(positions), 37, image=True)
    np.testing.assert_allclose(ours, resize.resize_positions(positions, 37, image=True), atol=1e-5)
    text = resize_positions(jnp.asarray(positions), 9, image=False)
    np.testing.assert_allclose(text, resize.resize_positions(positions, 9, image=False), atol=1e-5)
    assert jax.numpy.min(resize_positions(jnp.asarray(positions) ** 2, 37, image=True)) >= 0
