"""The training step: the same numbers on every mesh and in micro-batches, its state sharded as the parameters are."""

import dataclasses
import re

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from clip_jax.devices.sharding import make_mesh, to_devices
from clip_jax.models.clip import CLIP, Architecture
from clip_jax.models.compute import Compute
from clip_jax.models.resnet import ResNetTower
from clip_jax.models.text import TextTower
from clip_jax.planning.program import buffers, collectives, matmul_flops
from clip_jax.training.learner import update_ema
from clip_jax.training.optimizer import adafactor
from clip_jax.training.state import EMA
from tests.models.test_clip import SMALL
from tests.training.steps import MESHES, batches, learner_of, train

SIGMOID = dataclasses.replace(SMALL, init_logit_scale=float(np.log(10)), init_logit_bias=-10.0)


def one():
    return make_mesh(1, devices=jax.devices()[:1])


@pytest.fixture(scope="module")
def one_device():
    return train(one(), steps=10, rate=1e-3)


OVER_TWO_SLICES = [(4, 2, 1, 2), (2, 2, 2, 2)]
MARKS = {(2, 2, 2): (), **dict.fromkeys([(1, 2, 4), (4, 2, 1), (2, 2, 2, 2)], pytest.mark.slow)}


@pytest.mark.parametrize(
    "shape", [pytest.param(m, marks=MARKS.get(m, pytest.mark.exhaustive)) for m in MESHES + OVER_TWO_SLICES]
)
def test_every_mesh_gives_the_losses_of_one_device_over_10_steps(one_device, shape):
    expected, _ = one_device
    found, state = train(make_mesh(*shape), steps=10, rate=1e-3)
    assert [m["loss"] for m in found] == pytest.approx([m["loss"] for m in expected], rel=1e-5)
    for ours, theirs in zip(found, expected, strict=True):
        assert continuous(ours) == pytest.approx(continuous(theirs), rel=1e-3)
    assert int(state.step) == int(state.data_step) == 10


def continuous(metrics):
    """Without the accuracy, of which one bit decides."""
    return {name: value for name, value in metrics.items() if name != "accuracy"}


def gradient_of_one_step(mesh, **options):
    """(metrics, change of every parameter) of a step of plain gradient descent at rate 1: minus the gradient."""
    (metrics,), state = train(mesh, optimizer=optax.sgd(1.0), steps=1, **options)
    return metrics, jax.tree.map(np.asarray, state.params)


@pytest.mark.parametrize(
    ("mesh", "loss", "patch_dropout"),
    [
        pytest.param((1,), "softmax", 0.5, marks=pytest.mark.exhaustive),
        ((8, 1, 1), "sigmoid", 0.5),
        pytest.param((2, 2, 2), "softmax", 0.0, marks=pytest.mark.slow),
    ],
)
def test_micro_batches_give_the_gradient_of_the_full_batch(mesh, loss, patch_dropout):
    """Scale and bias included, and with patches dropped: each pair draws its own, however it is batched."""
    architecture = SIGMOID if loss == "sigmoid" else SMALL
    mesh = make_mesh(*mesh, devices=jax.devices()[: int(np.prod(mesh))])
    options = {"model": CLIP(architecture), "loss": loss, "pairs": 32, "patch_dropout": patch_dropout}
    expected, full_batch = gradient_of_one_step(one(), **options)
    found, cached = gradient_of_one_step(mesh, micro_batches=4, **options)
    assert continuous(found) == pytest.approx(continuous(expected), rel=1e-5)
    for ours, theirs in zip(jax.tree.leaves(cached), jax.tree.leaves(full_batch), strict=True):
        np.testing.assert_allclose(ours, theirs, rtol=1e-5, atol=1e-5 * np.abs(theirs).max())


@pytest.mark.exhaustive
def test_a_run_in_micro_batches_has_the_losses_of_one_without_over_10_steps(one_device):
    found, _ = train(make_mesh(2, 2, 2), steps=10, rate=1e-3, micro_batches=2)
    assert [m["loss"] for m in found] == pytest.approx([m["loss"] for m in one_device[0]], rel=1e-5)


@pytest.mark.slow
def test_batch_norm_in_micro_batches_moves_its_running_statistics():
    architecture = Architecture(ResNetTower(32, (1, 1, 1, 1), 8, 4), TextTower(12, 100, 32, 1, 2, 64), 16)
    model = CLIP(architecture)
    _, state = train(one(), model=model, micro_batches=2, steps=1)
    moved = jax.tree.leaves(jax.tree.map(lambda a, b: np.abs(a - b).max(), state.batch_stats, model.init_batch_stats()))
    assert min(moved) > 0 and np.isfinite(moved).all()


def traced(micro_batches=1, pairs=256, mesh=None, architecture=SMALL, **computation):
    """The step, and the shapes that it takes."""
    model = CLIP(architecture, Compute(**computation))
    learner = learner_of(mesh or one(), model=model, optimizer=optax.sgd(0.1), micro_batches=micro_batches)
    return learner.step(), (learner.abstract_state(), learner.batch_spec(pairs), {})


def test_micro_batches_cost_a_forward_pass_more_and_no_more():
    full_batch, cached = (matmul_flops(jax.make_jaxpr(step)(*of)) for step, of in map(traced, (1, 8)))
    assert 1.30 < cached / full_batch < 1.36


def test_on_a_cpu_no_weights_gradient_sums_over_two_axes():
    """Batch and tokens are one axis there: XLA would transpose the activations in memory for a sum over two."""
    step, of = traced()
    assert "contracting_dims = [0, 1] x [0, 1]" not in step.lower(*of).as_text()


@pytest.mark.slow
def test_activation_memory_is_proportional_to_the_micro_batch():
    """Temporary bytes of the compiled step: micro-batches of half the size halve all but a small constant."""
    of_64, of_32, of_16 = (temporary(*traced(256 // pairs)) for pairs in (64, 32, 16))
    assert of_64 - of_32 == pytest.approx(2 * (of_32 - of_16), rel=0.03)
    assert of_64 > 3.5 * of_16


def deep(layers):
    towers = {name: dataclasses.replace(getattr(SMALL, name), layers=layers) for name in ("image", "text")}
    return dataclasses.replace(SMALL, **towers)


@pytest.mark.parametrize("micro_batches", [1, 2])
def test_a_deeper_model_is_no_larger_program(micro_batches):
    """Its layers are one loop's: what there is to compile does not grow with them."""

    def lines(layers):
        step, of = traced(micro_batches, architecture=deep(layers), remat="full")
        return len(step.lower(*of).as_text().splitlines())

    assert lines(12) == lines(3)


@pytest.mark.slow
def test_remat_policies_take_less_memory_the_more_they_compute():
    policies = ("none", "dots", "named", "full")
    steps = [traced(remat=policy) for policy in policies]
    flops = [matmul_flops(jax.make_jaxpr(step)(*of)) for step, of in steps]
    assert flops == sorted(flops) and flops[-1] < 1.34 * flops[0]
    sizes = [temporary(*step) for step in steps]
    assert sizes == sorted(sizes, reverse=True)


def temporary(step, shapes):
    return step.lower(*shapes).compile().memory_analysis().temp_size_in_bytes


def test_fully_sharded_parameters_travel_layer_by_layer_and_activations_not_at_all():
    """The largest message is the gradient of one layer; the activations of the batch would be five times that."""
    step, shapes = traced(mesh=make_mesh(1, 8, 1))
    layer = sum(leaf[0].size for leaf in jax.tree.leaves(layers_of(shapes[0].params)))
    activations = 256 * SMALL.image.tokens * SMALL.image.width
    sent = [collective.bytes // 4 for collective in collectives(step.lower(*shapes).compile().as_text())]
    assert 0.9 * layer < max(sent) <= 1.1 * layer < activations / 5


@pytest.mark.parametrize("micro_batches", [pytest.param(1, marks=pytest.mark.slow), 4])
def test_no_device_ever_holds_the_gradients_of_more_than_a_layer(micro_batches):
    """No array of the compiled step has the whole shape of a stack of layers that fsdp divides."""
    step, (state, batch, _) = traced(micro_batches, pairs=64, mesh=make_mesh(1, 8, 1), architecture=deep(5))
    full_batch = {
        f"f32[{','.join(map(str, leaf.shape))}]"
        for leaf in jax.tree.leaves(state.params)
        if leaf.ndim > 2 and not leaf.sharding.is_fully_replicated
    }
    buffers_of_step = buffers(step.lower(state, batch, {}).compile().as_text()).keys()
    assert len(full_batch) == 8 and full_batch & buffers_of_step == set()
    assert "f32[5,8,3,2,32]" in buffers_of_step  # queries, keys and values of five layers: an eighth of the width


def layers_of(params):
    return jax.tree.map(lambda leaf: np.empty(leaf.shape, np.bool_), params["image"]["transformer"]["blocks"])


def test_a_bfloat16_model_sends_its_embeddings_as_bfloat16():
    """And the gradients of images on their way around the ring: all that the loss moves and is as wide."""
    step, of = traced(mesh=make_mesh(), dtype=jnp.bfloat16)
    text = step.lower(*of).as_text()
    moved = re.findall(r"stablehlo\.(?:all_gather|collective_permute|reduce_scatter).*-> tensor<\d+x40x(\w+)>", text)
    assert len(moved) >= 3 and set(moved) == {"bf16"}


@pytest.fixture(scope="module")
def averaged():
    """The run of ``one_device`` with an EMA, on parameters that are sharded."""
    return train(make_mesh(1, 8, 1), ema_decay=0.5, steps=10, rate=1e-3)


def test_moments_are_sharded_as_their_parameters(averaged):
    _, state = averaged
    moments = next(part.mu for part in state.opt_state if hasattr(part, "mu"))
    trees = (state.params, moments, state.evaluation_params)
    qkv, mu, average = (tree["image"]["transformer"]["blocks"]["attention"]["qkv"] for tree in trees)
    assert qkv.sharding == mu.sharding == average.sharding and "fsdp" in str(qkv.sharding.spec)
    assert qkv.addressable_shards[0].data.shape[1] == 64 // 8


@pytest.mark.slow
def test_factored_moments_train_on_any_mesh_as_on_one_device():
    """Adafactor's row and column moments have fewer axes than their parameters, and are whole everywhere."""

    def losses(mesh):
        options = {"beta1": 0.9, "beta2": 0.95, "weight_decay": 0.1, "decay": "kernels", "clip_norm": 1.0}
        seen, state = train(mesh, optimizer=adafactor(lambda _: 1e-3, **options))
        return [metrics["loss"] for metrics in seen], state

    (expected, _), (found, state) = losses(one()), losses(make_mesh(2, 2, 2))
    assert found == pytest.approx(expected, rel=1e-4)  # bfloat16 moments round differences up
    momentum = next(leaf for leaf in jax.tree.leaves(state.opt_state) if leaf.dtype == jnp.bfloat16 and leaf.ndim > 2)
    assert not momentum.sharding.is_fully_replicated


def test_the_average_follows_the_parameters_as_tensorflows_does():
    """By hand: decays 1/10, 2/11, 3/12 below a decay of 0.9; the first average is the initial value."""
    average, expected = jnp.asarray(0.0), 0.0
    for step, value in enumerate([1.0, 2.0, 3.0]):
        decay = (1 + step) / (10 + step)
        expected = decay * expected + (1 - decay) * value
        average = update_ema(average, jnp.asarray(value), 0.9, jnp.asarray(step))
    assert float(average) == pytest.approx(expected, rel=1e-6)
    assert float(update_ema(jnp.asarray(0.0), jnp.asarray(1.0), 0.9, jnp.asarray(10**6))) == pytest.approx(0.1)


def test_the_state_keeps_an_average_only_where_asked(one_device, averaged):
    (found, with_ema), (expected, without) = averaged, one_device
    assert without.ema == {} and without.evaluation_params is without.params
    assert with_ema.evaluation_params is with_ema.ema[EMA]
    leaves = [jax.tree.leaves(tree["image"]) for tree in (with_ema.evaluation_params, with_ema.params)]
    assert any(np.abs(a - p).max() > 1e-4 for a, p in zip(*leaves, strict=True))
    assert [metrics["loss"] for metrics in found] == pytest.approx([m["loss"] for m in expected], rel=1e-5)


def test_the_loss_goes_down_and_metrics_are_all_there(one_device):
    """Chance is ln(16) = 2.77; the ten batches are random, so only a batch that is seen again can be learned."""
    learner = learner_of(one(), rate=1e-3)
    step, state, batch = learner.step(), learner.create_state(), next(batches(1))
    losses = []
    for _ in range(8):
        state, metrics = step(state, to_devices(batch, one(), 16), {})
        losses.append(float(metrics["loss"]))
    assert losses[-1] < losses[0] - 0.5
    seen, _ = one_device
    assert set(seen[0]) == {
        "loss", "accuracy", "grad_norm", "param_norm", "update_norm", "logit_scale", "learning_rate",
    }  # fmt: skip
    assert seen[0]["logit_scale"] == pytest.approx(1 / 0.07, rel=1e-5)
    assert seen[0]["learning_rate"] == pytest.approx(1e-3)


@pytest.mark.slow
def test_the_logit_scale_is_clamped_after_the_update():
    _, state = train(make_mesh(8), max_logit_scale=14.0)
    assert float(jnp.exp(state.params["logit_scale"])) <= 14.0001
