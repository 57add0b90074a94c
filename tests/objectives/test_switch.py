"""Runs that turn self-distillation or a selection on in their middle: what the switch creates, and exact resumption on
either side."""

import json
import shutil
import types

import flax.linen as nn
import jax
import numpy as np
import pytest

from clip_jax import config as configs
from clip_jax import presets
from clip_jax.devices.sharding import make_mesh
from clip_jax.errors import UserError
from clip_jax.models.clip import CLIP
from clip_jax.storage.checkpoints import Checkpoints
from clip_jax.training import constants, loop, teacher
from clip_jax.training.phases import convert
from clip_jax.training.setup import make_learner
from tests.training import runs

SWITCH, STEPS = 3, 6
HEADS = {"local_size": "16", "local_crops": "2", "prototypes": "24", "hidden": "20", "bottleneck": "12"}
SWITCHED = {
    **{f"objectives.self_distillation.{key}": value for key, value in HEADS.items()},
    "steps": str(STEPS),
    "phases": f"({{'start': {SWITCH}, 'objectives.self_distillation.weight': 0.25}},)",
    "checkpoint.every_steps": "1",
    "checkpoint.keep_last": "6",
    "log.tensorboard": "False",
    "model.text.vocab_size": "320",
}


def test_the_switch_makes_the_teacher_of_the_student_and_the_rest_anew(tmp_path):
    recipe, mesh = str(runs.write_recipe(tmp_path)), make_mesh(1, devices=jax.devices()[:1])
    first, second = configs.phases(configs.load(recipe, SWITCHED))
    old, new = (make_learner(phase.config, mesh, steps=STEPS, examples=50) for phase in (first, second))
    before = old.create_state(5)
    state = convert(before, old, new, SWITCH)
    teacher, own = state.ema["self_distillation"], state.params["objectives"]["self_distillation"]
    for ours, theirs in ((teacher["image"], before.params["image"]), (state.params["image"], before.params["image"])):
        jax.tree.map(np.testing.assert_array_equal, ours, theirs)
    heads = {name: own[name] for name in ("local_head", "masked_head")}
    jax.tree.map(np.testing.assert_array_equal, teacher["objectives"]["self_distillation"], heads)
    assert set(teacher) == {"image", "objectives"} and set(own) == {*heads, "mask_embedding"}
    assert {name: float(np.abs(center).max()) for name, center in state.aux["self_distillation"].items()} == {
        "local": 0.0,
        "masked": 0.0,
    }
    # The step donates the state: no buffer is there twice.
    pointers = [leaf.unsafe_buffer_pointer() for leaf in jax.tree.leaves(state)]
    assert len(pointers) == len(set(pointers))


@pytest.fixture(scope="module")
def switched(tmp_path_factory):
    folder = tmp_path_factory.mktemp("switched")
    recipe, workdir = str(runs.write_recipe(folder)), folder / "run"
    assert loop.run(workdir=str(workdir), recipe=recipe, overrides=SWITCHED) == 0
    return workdir


@pytest.mark.parametrize(
    "last",
    [pytest.param(step, marks=pytest.mark.exhaustive) for step in (SWITCH, 4)],  # also: test_two_processes.py
)
def test_killed_on_either_side_of_the_switch_it_resumes_digit_for_digit(switched, tmp_path, last):
    metrics, killed = runs.metrics(switched), tmp_path / "killed"
    assert [line["step"] for line in metrics if "train/self_distillation/masked" in line] == [4, 5, 6]
    shutil.copytree(switched, killed)
    for step in range(last + 1, STEPS + 1):
        shutil.rmtree(killed / "checkpoints" / str(step))
    assert loop.run(workdir=str(killed), recipe=None, overrides={}) == 0
    assert runs.metrics(killed) == metrics


@pytest.mark.slow
def test_the_teacher_follows_the_student_slowly(switched):
    """After one step of a momentum of 0.996 it has moved by 0.004 of the student's way, or by more in early steps."""
    config = configs.phases(configs.load(str(switched.parent / "recipe.py"), SWITCHED))[1].config
    learner = make_learner(config, make_mesh(), steps=STEPS, examples=50)
    with Checkpoints(switched, keep_last=6, keep_every=None) as checkpoints:
        four, five = (checkpoints.restore(step, learner.abstract_state()) for step in (4, 5))
    decay = min(0.996, (1 + 4) / (10 + 4))
    for old, new, student in zip(
        *(jax.tree.leaves(state.ema["self_distillation"]["image"]) for state in (four, five)),
        jax.tree.leaves(five.params["image"]),
        strict=True,
    ):
        np.testing.assert_allclose(new, decay * old + (1 - decay) * student, rtol=1e-5, atol=1e-6)


SELECTING = {
    "steps": str(STEPS),
    "objectives.contrastive.loss": "sigmoid",
    "objectives.selection.chunks": "4",
    "objectives.selection.reference": "Reference",
    "objectives.selection.reference_weights": "weights",
    "phases": f"({{'start': {SWITCH}, 'objectives.selection.weight': 1.0}},)",
    "checkpoint.every_steps": "1",
    "checkpoint.keep_last": "6",
    "log.tensorboard": "False",
    "model.text.vocab_size": "320",
}


@pytest.mark.slow
def test_a_run_selects_from_its_switch_on_and_resumes_digit_for_digit(tmp_path, monkeypatch):
    recipe, workdir = str(runs.write_recipe(tmp_path)), tmp_path / "run"
    preset = configs.resolve_preset(configs.load(recipe, SELECTING))
    params = jax.jit(lambda key: nn.meta.unbox(CLIP(preset.architecture).init(key)))(jax.random.key(5))
    monkeypatch.setitem(presets.PRESETS, "Reference", preset)
    monkeypatch.setattr(teacher, "load", lambda weights: types.SimpleNamespace(params=params, batch_stats={}))
    assert loop.run(workdir=str(workdir), recipe=recipe, overrides=SELECTING) == 0
    metrics = runs.metrics(workdir)
    assert [line["step"] for line in metrics if "train/selection/selected" in line] == [4, 5, 6]
    trained = [line for line in metrics if "train/pairs" in line]
    assert [line["train/pairs"] for line in trained] == [16 * step for step in range(1, 7)]
    assert [line.get("train/pairs_seen") for line in trained] == [None] * 3 + [48 + 32 * n for n in (1, 2, 3)]
    assert all(line["train/selection/selected"] > line["train/selection/all"] for line in trained[SWITCH:])
    # Steps of one and of two batches take all of the examples in their order, none of them twice.
    seen = [json.loads(line) for line in (workdir / "samples.0.jsonl").read_text().splitlines()]
    taken = np.concatenate([line["samples"] for line in seen])
    assert len(taken) == 48 + 96 and all(len(set(taken[start : start + 50])) == 50 for start in (0, 50))

    killed = tmp_path / "killed"
    shutil.copytree(workdir, killed)
    recorded = json.loads((workdir / "run.json").read_text())["constants"]
    assert recorded == {f"selection@{SWITCH}": constants.checksum({"0": {"params": params, "batch_stats": {}}})}
    for step in range(5, STEPS + 1):
        shutil.rmtree(killed / "checkpoints" / str(step))
    assert loop.run(workdir=str(killed), recipe=None, overrides={}) == 0
    assert runs.metrics(killed) == metrics

    # The same path with other weights.
    shutil.rmtree(killed / "checkpoints" / str(STEPS))
    other = jax.tree.map(lambda leaf: leaf.at[(0,) * leaf.ndim].add(1e-3), params)
    monkeypatch.setattr(teacher, "load", lambda weights: types.SimpleNamespace(params=other, batch_stats={}))
    with pytest.raises(UserError, match="the weights of a teacher are not those this run began with"):
        loop.run(workdir=str(killed), recipe=None, overrides={})
