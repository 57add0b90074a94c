"""Frozen parameters have no gradient, no moments and no backward pass; constants are inputs that no step changes."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from clip_jax import presets
from clip_jax.config import load
from clip_jax.devices.sharding import make_mesh, to_devices
from clip_jax.errors import UserError
from clip_jax.models.clip import CLIP
from clip_jax.objectives import contrastive
from clip_jax.objectives.objective import Objective
from clip_jax.planning.memory import saved_bytes, step_memory
from clip_jax.planning.program import matmul_flops
from clip_jax.planning.work import step_work
from clip_jax.training.setup import make_learner
from tests.models.test_clip import SMALL
from tests.training.steps import batches, learner_of


def step_flops(frozen, micro_batches):
    learner = learner_of(make_mesh(1, devices=jax.devices()[:1]), frozen=frozen, micro_batches=micro_batches)
    arguments = (learner.abstract_state(), learner.batch_spec(16), {})
    return matmul_flops(jax.make_jaxpr(learner.step())(*arguments))


@pytest.mark.slow
def test_a_frozen_tower_does_not_change_and_has_no_moments():
    learner = learner_of(make_mesh(2, 2, 2), frozen=("image/*",))
    state = learner.create_state()
    before = jax.tree.map(np.asarray, state.params)
    names = {path[-1].key for path, leaf in jax.tree_util.tree_flatten_with_path(state.opt_state)[0] if leaf.ndim}
    assert "token_embedding" in names and "patch_embedding" not in names
    state, metrics = learner.step()(state, to_devices(next(batches(1)), learner.mesh, 16), {})
    jax.tree.map(np.testing.assert_array_equal, state.params["image"], before["image"])
    assert np.abs(state.params["text"]["projection"] - before["text"]["projection"]).max() > 1e-4
    assert float(metrics["grad_norm"]) > 0


@pytest.mark.parametrize("micro_batches", [1, 4])
def test_a_frozen_tower_has_no_backward_pass(micro_batches):
    """The image tower has three quarters of this model's FLOPs: without its backward pass about half of them remain."""
    assert step_flops(("image/*",), micro_batches) < 0.65 * step_flops((), micro_batches)


def test_the_plan_counts_no_backward_pass_and_no_activations_of_a_frozen_tower():
    mesh = make_mesh(1, devices=jax.devices()[:1])
    learner = learner_of(mesh, frozen=("image/*",))
    state = learner.abstract_state()
    work = step_work(learner, state, step_memory(learner, state, 16, tiled=False), batch_size=16, slices=1)
    assert work.flops == pytest.approx(step_flops(("image/*",), 1), rel=0.05)
    frozen, both = (saved_bytes(CLIP(SMALL), 16, frozen=towers) for towers in (("image",), ()))
    assert frozen < 0.6 * both


def test_a_factor_of_zero_freezes():
    overrides = {"optimizer.rate_factors": "({'image/*': 0.0, 'text/*': 0.5},)"}
    learner = make_learner(load("configs/demo.py", overrides), make_mesh(), steps=10, examples=1000)
    assert learner.frozen == ("image/*",) and learner.frozen_towers == ("image",)
    names = {path[-1].key for path, leaf in jax.tree_util.tree_flatten_with_path(learner.abstract_state().opt_state)[0]
             if leaf.ndim}  # fmt: skip
    assert "token_embedding" in names and "patch_embedding" not in names


def test_a_pattern_without_effect_and_one_that_freezes_everything_are_one_line():
    for frozen, message in ((("imag/*",), "matches no parameter"), (("*",), "nothing is left to train")):
        with pytest.raises(UserError, match=message):
            learner_of(make_mesh(), frozen=frozen).abstract_state()


@pytest.mark.slow
def test_a_teachers_weights_are_constants_sharded_like_parameters_and_not_part_of_the_state():
    mesh, dim = make_mesh(1, 8, 1), SMALL.embed_dim
    boxed = {"kernel": nn.LogicallyPartitioned(jax.ShapeDtypeStruct((dim, dim), jnp.float32), ("embed", None))}

    def local(rows):
        target = jax.lax.stop_gradient(rows.outputs.image) @ rows.constants["kernel"]
        return jnp.sum((rows.outputs.text - target) ** 2) / 16, {}

    teacher = Objective(
        local=local,
        abstract_constants=lambda: boxed,
        load_constants=lambda shardings: {"kernel": jax.device_put(np.eye(dim, dtype=np.float32), shardings["kernel"])},
    )
    model = CLIP(SMALL)
    settings = contrastive.SPEC.defaults | {"max_logit_scale": 0.0}
    objectives = {"contrastive": contrastive.make(settings, model, presets.HALF, None), "teacher": teacher}
    learner = learner_of(mesh, model=model, objectives=objectives)
    constants = learner.load_constants()
    assert constants["teacher"]["kernel"].addressable_shards[0].data.shape == (dim // 8, dim)
    state, batch = learner.create_state(), to_devices(next(batches(1)), mesh, 16)
    state, metrics = learner.step()(state, batch, constants)
    assert float(metrics["teacher/loss"]) > 0 and not constants["teacher"]["kernel"].is_deleted()
    assert "teacher" not in state.aux and "objectives" not in state.params
