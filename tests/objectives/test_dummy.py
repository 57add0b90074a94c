"""A new objective is an entry in the dictionary of objectives: it trains, resumes, is planned, and is exact in
micro-batches on every mesh, without another line changed."""

import shutil

import jax
import numpy as np
import optax
import pytest

import clip_jax
from clip_jax import presets
from clip_jax.config import load
from clip_jax.devices.hardware import tpu
from clip_jax.devices.sharding import make_mesh, to_devices
from clip_jax.errors import UserError
from clip_jax.models.clip import CLIP
from clip_jax.objectives import OBJECTIVES, contrastive
from clip_jax.planning import program
from clip_jax.planning.search import estimate
from clip_jax.training import loop
from clip_jax.training.setup import make_learner
from tests.models.test_clip import SMALL
from tests.objectives import dummy
from tests.training import runs
from tests.training.steps import MESHES, batches, learner_of


@pytest.fixture
def registered(monkeypatch):
    monkeypatch.setitem(OBJECTIVES, "dummy", dummy.SPEC)


def one_step(mesh, **options):
    """(metrics, gradient by parameter, aux) of two steps of plain gradient descent."""
    model = CLIP(SMALL)
    model = CLIP(SMALL, model.compute._replace(mesh=mesh))
    objectives = {
        "contrastive": contrastive.make(contrastive.SPEC.defaults, model, presets.HALF, None),
        "dummy": dummy.make({}, model, presets.HALF, None),
    }
    learner = learner_of(
        mesh, model=model, optimizer=optax.sgd(0.1), objectives=objectives,
        weights={"contrastive": 1.0, "dummy": 0.5}, **options,
    )  # fmt: skip
    step, state = learner.step(), learner.create_state()
    for batch in batches(2, 32):
        batch["crop"] = batch["image"][:, ::-1].copy()
        state, metrics = step(state, to_devices(batch, mesh, 32), {})
    return {name: float(value) for name, value in metrics.items()}, jax.tree.map(np.asarray, (state.params, state.aux))


@pytest.fixture(scope="module")
def one_device():
    return one_step(make_mesh(1, devices=jax.devices()[:1]))


@pytest.mark.parametrize(
    ("mesh", "parts"),
    [
        ((2, 2, 2), 4),
        pytest.param((1, 8, 1), 1, marks=pytest.mark.exhaustive),
        *(pytest.param(mesh, 4, marks=pytest.mark.exhaustive) for mesh in MESHES if mesh != (2, 2, 2)),
    ],
)
def test_it_is_exact_in_micro_batches_on_every_mesh(one_device, mesh, parts):
    metrics, (params, aux) = one_device
    found, (ours, our_aux) = one_step(make_mesh(*mesh), micro_batches=parts)
    assert found["dummy/loss"] == pytest.approx(metrics["dummy/loss"], rel=1e-5)
    assert found["loss"] == pytest.approx(found["contrastive/loss"] + 0.5 * found["dummy/loss"], rel=1e-6)
    assert {n: v for n, v in found.items() if n != "accuracy"} == pytest.approx(
        {n: v for n, v in metrics.items() if n != "accuracy"}, rel=1e-4
    )
    for a, b in zip(jax.tree.leaves((ours, our_aux)), jax.tree.leaves((params, aux)), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-5 * max(1e-3, np.abs(b).max()))
    assert np.abs(our_aux["dummy"]["center"]).max() > 1e-4


@pytest.mark.slow
def test_it_trains_resumes_and_loads(registered, tmp_path):
    """Started again after its third step, the run has the same metrics; the loaded model has no trace of it."""
    recipe, workdir, killed = str(runs.write_recipe(tmp_path)), tmp_path / "run", tmp_path / "killed"
    overrides = {"steps": "6", "objectives.dummy.weight": "0.5", "log.tensorboard": "False"}
    assert loop.run(workdir=str(workdir), recipe=recipe, overrides=overrides) == 0
    metrics = runs.metrics(workdir)
    assert {"train/dummy/loss", "train/contrastive/loss", "train/accuracy"} <= metrics[0].keys()
    shutil.copytree(workdir, killed)
    shutil.rmtree(killed / "checkpoints" / "6")
    assert loop.run(workdir=str(killed), recipe=None, overrides={}) == 0
    assert runs.metrics(killed) == metrics
    assert "objectives" not in clip_jax.load(workdir).params

    # A run that began without it has no such state in its checkpoints.
    plain = tmp_path / "plain"
    shutil.copytree(workdir, plain)
    learner = make_learner(load(recipe, overrides | {"ema_decay": "0.5"}), make_mesh(), steps=6, examples=50)
    from clip_jax.storage.checkpoints import Checkpoints

    checkpoints = Checkpoints(plain, keep_last=2, keep_every=None)
    with pytest.raises(UserError, match="has no trained_params"):
        checkpoints.restore(6, learner.abstract_state())
    checkpoints.close()


def residual_bytes(learner, pairs):
    """Saved by the forward pass of a micro-batch, by JAX's own differentiation, objectives included."""

    def residuals(rows):
        def backward(state, batch):
            def encode(params):
                encoded = learner.forward(state, params, state.batch_stats, batch, {})
                return encoded.cached, encoded.local

            return jax.vjp(encode, state.params)[1]

        batch = learner.batch_spec(rows) | {
            "row": jax.ShapeDtypeStruct((rows,), np.int32),
            "dummy/weight": jax.ShapeDtypeStruct((rows,), np.float32),
        }
        found = jax.eval_shape(backward, learner.abstract_state(), batch)
        return sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(found))

    return residuals(2 * pairs) - residuals(pairs)


@pytest.mark.slow
def test_the_plan_counts_it_as_the_program_does(registered):
    """FLOPs of the jaxpr, bytes that the forward pass saves, parameters and state."""
    recipe, mesh = "configs/demo.py", make_mesh(1, devices=jax.devices()[:1])

    def planned(weight):
        config = load(recipe, {"objectives.dummy.weight": weight, "batch_size": "16"})
        learner = make_learner(config, mesh, steps=1000, examples=1000)
        arguments = (learner.abstract_state(), learner.batch_spec(16), {})
        counted = program.matmul_flops(jax.make_jaxpr(learner.step())(*arguments))
        return estimate(config, tpu("v5e-1")), counted, residual_bytes(learner, 16)

    (with_it, flops, saved), (without, plain_flops, plain_saved) = planned("0.5"), planned("0")
    assert with_it.work.flops - without.work.flops == pytest.approx(flops - plain_flops, rel=0.05)
    # No padding to a TPU's tiles in what the objective adds.
    assert with_it.memory.activations - without.memory.activations == pytest.approx(saved - plain_saved, rel=0.05)
    dim = with_it.learner.model.architecture.embed_dim
    assert with_it.memory.parameters - without.memory.parameters == 4 * dim * dim
    assert with_it.state.aux["dummy"]["center"].shape == (dim,)
