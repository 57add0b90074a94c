"""The EMA of the parameters in the life of a run: it is evaluated, stored, loaded and exported."""

import shutil

import jax
import numpy as np
import pytest

import clip_jax
from clip_jax import commands
from clip_jax import config as configs
from clip_jax.devices.sharding import make_mesh
from clip_jax.storage.checkpoints import Checkpoints
from clip_jax.training import loop
from clip_jax.training.setup import make_learner
from tests.training import runs

AVERAGED = {
    "ema_decay": "0.5",
    "steps": "6",
    "model.text.vocab_size": "320",
    "optimizer.warmup_steps": "0",
    "optimizer.learning_rate": "1e-2",
    "optimizer.schedule": "constant",
    "log.tensorboard": "False",
}


def state_of(recipe, workdir):
    """The state in a run's last checkpoint."""
    learner = make_learner(configs.load(recipe, AVERAGED), make_mesh(), steps=6, examples=50)
    checkpoints = Checkpoints(workdir, keep_last=2, keep_every=None)
    state = checkpoints.restore(6, learner.abstract_state())
    checkpoints.close()
    return state


def assert_equal(ours, theirs):
    jax.tree.map(np.testing.assert_array_equal, ours, theirs)


@pytest.mark.slow
def test_the_average_is_evaluated_kept_loaded_and_exported(tmp_path):
    recipe, workdir = str(runs.write_recipe(tmp_path)), tmp_path / "run"
    assert loop.run(workdir=str(workdir), recipe=recipe, overrides=AVERAGED) == 0
    state, model = state_of(recipe, workdir), clip_jax.load(workdir)
    assert_equal(model.params, state.evaluation_params)
    patches = [tree["image"]["patch_embedding"] for tree in (state.evaluation_params, state.params)]
    assert max(np.abs(a - p).max() for a, p in zip(*map(jax.tree.leaves, patches), strict=True)) > 1e-3

    # Interrupted after its third step and gone on with, it is the same run.
    resumed = tmp_path / "resumed"
    shutil.copytree(workdir, resumed)
    shutil.rmtree(resumed / "checkpoints" / "6")
    assert loop.run(workdir=str(resumed), recipe=None, overrides={}) == 0
    assert runs.metrics(resumed) == runs.metrics(workdir)
    assert_equal(state_of(recipe, resumed), state)

    # What is exported is the average, and it has the held-out loss that the run was given.
    exported = tmp_path / "exported"
    assert commands.main(["export", f"--model={workdir}", "--format=openclip", f"--to={exported}"]) == 0
    assert_equal(clip_jax.load(exported).params, state.evaluation_params)
    frozen = {"model.init_from": str(exported), "model.init_from_allow": "('tokenizer',)"}  # OpenCLIP names no such one
    frozen |= {"steps": "1", "optimizer.learning_rate": "0", "ema_decay": "0"}
    assert loop.run(workdir=str(tmp_path / "frozen"), recipe=recipe, overrides=AVERAGED | frozen) == 0
    losses = [runs.metrics(folder)[-1]["eval/held_out/loss"] for folder in (tmp_path / "frozen", workdir)]
    assert losses[0] == pytest.approx(losses[1], rel=1e-5)
