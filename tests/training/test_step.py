"""The training step: the same numbers on every mesh, its state sharded as the parameters are."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from clip_jax import presets
from clip_jax.models.clip import CLIP
from clip_jax.sharding import make_mesh, to_devices
from clip_jax.training.optimizer import adamw, schedule
from clip_jax.training.step import create_state, make_train_step
from tests.models.test_clip import SMALL

STEPS = 4


def train(mesh, max_logit_scale=100.0, rate=1e-2):
    """The metrics of a few steps and the last state."""
    clip, rates = CLIP(SMALL), schedule("constant", rate, 0, STEPS)
    optimizer = adamw(rates, weight_decay=0.1, decay="matrices", beta1=0.9, beta2=0.98, eps=1e-6, clip_norm=1.0)
    step = make_train_step(clip, presets.HALF, optimizer, rates, mesh, max_logit_scale=max_logit_scale)
    state, rng, seen = create_state(clip, optimizer, mesh, seed=0), np.random.default_rng(0), []
    for _ in range(STEPS):
        image, text = rng.integers(0, 256, (16, 32, 32, 3), np.uint8), rng.integers(0, 100, (16, 12)).astype(np.int32)
        state, metrics = step(state, to_devices({"image": image, "text": text}, mesh, 16))
        seen.append({name: float(value) for name, value in metrics.items()})
    return seen, state


@pytest.fixture(scope="module")
def one_device():
    return train(make_mesh(1, devices=jax.devices()[:1]))


@pytest.mark.parametrize("shape", [(8, 1, 1), (1, 8, 1), (2, 2, 2)])
def test_every_mesh_gives_the_numbers_of_one_device(one_device, shape):
    expected, _ = one_device
    found, state = train(make_mesh(*shape))
    for ours, theirs in zip(found, expected, strict=True):
        assert ours == pytest.approx(theirs, rel=1e-4, abs=1e-5)
    assert int(state.step) == int(state.data_step) == STEPS


def test_moments_are_sharded_as_their_parameters():
    _, state = train(make_mesh(1, 8, 1))
    moments = next(part.mu for part in state.opt_state if hasattr(part, "mu"))
    qkv, mu = (tree["image"]["transformer"]["blocks"]["attention"]["qkv"] for tree in (state.params, moments))
    assert qkv.sharding == mu.sharding and "fsdp" in str(qkv.sharding.spec)
    assert qkv.addressable_shards[0].data.shape[1] == 64 // 8


def test_the_loss_goes_down_and_metrics_are_all_there(one_device):
    seen, _ = one_device
    assert set(seen[0]) == {
        "loss", "accuracy", "grad_norm", "param_norm", "update_norm", "logit_scale", "learning_rate",
    }  # fmt: skip
    assert seen[0]["logit_scale"] == pytest.approx(1 / 0.07, rel=1e-5)
    assert seen[0]["learning_rate"] == pytest.approx(1e-2)


def test_the_logit_scale_is_clamped_after_the_update():
    _, state = train(make_mesh(8), max_logit_scale=14.0)
    assert float(jnp.exp(state.params["logit_scale"])) <= 14.0001
