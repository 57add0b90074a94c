"""What holds for all objectives: the same numbers on every mesh and in micro-batches, planned as the program is."""

import functools
import itertools
import shutil
from dataclasses import replace

import flax.linen as nn
import jax
import numpy as np
import optax
import pytest
from jax.interpreters.partial_eval import dce_jaxpr

import clip_jax
from clip_jax import presets
from clip_jax.data.views import batch_spec
from clip_jax.devices.sharding import make_mesh, to_devices
from clip_jax.models.clip import CLIP
from clip_jax.objectives import OBJECTIVES, captioning, distillation, selection
from clip_jax.planning import program
from clip_jax.training import loop
from clip_jax.training.teacher import constants
from tests.models.test_clip import SMALL
from tests.training import runs
from tests.training.steps import learner_of

PAIRS = 32
CROPS = {"local_size": 16, "local_crops": 2, "prototypes": 24, "hidden": 20, "bottleneck": 12}
CASES = {
    "positives of equal captions": {"contrastive": {"positives": "captions", "label_smoothing": 0.1}},
    "labels and hard negatives": {"contrastive": {"positives": "labels", "negatives": 2}},
    "captioning": {"captioning": {"layers": 2}},
    "parallel captioning": {"captioning": {"layers": 2, "parallel": 0.5}},
    "grounding": {"captioning": {"layers": 2, "parallel": 0.5}, "grounding": {}},
    "distillation": {"distillation": {"features": 2.0}},
    "self-distillation": {"self_distillation": CROPS},
    "head-only teacher": {"self_distillation": CROPS | {"teacher": "head", "targets": "all", "local": 0.0}},
    "selection": {"contrastive": {"loss": "sigmoid"}, "selection": {"ratio": 2, "chunks": 4}},
    "all": {
        "contrastive": {"positives": "captions", "negatives": 1, "label_smoothing": 0.1},
        "captioning": {"layers": 1},
        "distillation": {},
        "self_distillation": CROPS,
        "selection": {"ratio": 2, "chunks": 4},
    },
}
"""Settings of the objectives beside their defaults; each is trained with the contrastive loss."""
TEACHER = replace(SMALL, image=replace(SMALL.image, width=96, heads=3), embed_dim=56, init_logit_bias=-9.0)


@functools.lru_cache
def learner(case, mesh, **options):
    architecture = replace(SMALL, init_logit_bias=-10.0)
    if case in ("parallel captioning", "grounding"):
        architecture = replace(architecture, text=replace(SMALL.text, causal=False, pooling="last"))
    if "captioning" in CASES[case]:
        architecture = captioning.adapt(captioning.SPEC.defaults | CASES[case]["captioning"], architecture)
    model = CLIP(architecture)
    model = replace(model, compute=model.compute._replace(mesh=mesh))
    given = {"contrastive": {}} | CASES[case]
    objectives = {name: objective(name, settings, model) for name, settings in given.items()}
    weights = {name: 1.0 if name == "contrastive" else 0.5 for name in objectives}
    views = {name: view for objective in objectives.values() for name, view in objective.views.items()}
    made = learner_of(mesh, model=model, optimizer=optax.sgd(0.1), objectives=objectives, weights=weights, **options)
    return replace(made, views=made.views | views)


def objective(name, settings, model):
    settings = {**OBJECTIVES[name].defaults, **settings}
    teacher = presets.Preset(TEACHER, presets.OPENAI, "clip")
    if name == "distillation":
        made = distillation.from_teachers([teacher], settings, model, presets.HALF)
    elif name == "selection":
        made = selection.from_reference(settings, teacher, model, presets.HALF)
    else:
        return OBJECTIVES[name].make(settings, model, presets.HALF, None)
    params = jax.jit(lambda key: nn.meta.unbox(CLIP(TEACHER).init(key)))(jax.random.key(7))
    found = {"0": constants(params, {}, made.abstract_constants()["0"]["params"])}
    return made._replace(load_constants=lambda shardings: jax.device_put(found, shardings))


def random_batches(learner, steps, pairs=PAIRS):
    """Pixels, tokens, classes and flags; half of the texts are there twice."""
    rng = np.random.default_rng(0)
    for _ in range(steps):
        batch = {}
        for name, leaf in learner.batch_spec(pairs).items():
            high = {np.dtype(bool): 2, np.dtype(np.uint8): 256}.get(
                leaf.dtype, {"label": 8, "region_name": 4}.get(name, 100)
            )
            batch[name] = rng.integers(0, high, leaf.shape).astype(leaf.dtype)
        batch["text"][1::2] = batch["text"][::2]
        yield batch


@functools.lru_cache
def two_steps(case, shape, parts):
    mesh = make_mesh(*shape, devices=jax.devices()[: int(np.prod(shape))])
    made = learner(case, mesh, micro_batches=parts)
    step, state, teachers = made.step(), made.create_state(), made.load_constants()
    for batch in random_batches(made, 2):
        state, metrics = step(state, to_devices(batch, mesh, made.ratio * PAIRS), teachers)
    metrics = {name: float(value) for name, value in metrics.items() if name != "accuracy"}  # one bit decides
    return metrics, jax.tree.map(np.asarray, (state.params, state.aux, state.ema))


AXES = [(8, 1, 1), (1, 8, 1), (1, 1, 8), (2, 2, 2)]
"""Each axis of the mesh alone, and all three; ``test_step.py`` has the others for the contrastive loss."""
MARKS = {
    ("parallel captioning", (2, 2, 2)): pytest.mark.slow,
    ("self-distillation", (2, 2, 2)): pytest.mark.slow,
}


@pytest.mark.parametrize(
    ("case", "shape"),
    [pytest.param(*run, marks=MARKS.get(run, pytest.mark.exhaustive)) for run in itertools.product(CASES, AXES)],
)
def test_it_is_exact_in_micro_batches_on_every_mesh(case, shape):
    metrics, state = two_steps(case, (1, 1, 1), 1)
    found, ours = two_steps(case, shape, 4)
    assert found == pytest.approx(metrics, rel=1e-4)
    for a, b in zip(jax.tree.leaves(ours), jax.tree.leaves(state), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-5 * max(1e-2, np.abs(b).max()))


def saved(made, pairs):
    """Saved by the forward pass of a micro-batch, by JAX's own differentiation, objectives included."""

    def residuals(rows):
        def backward(state, batch, constants):
            def encode(params):
                encoded = made.forward(state, params, state.batch_stats, batch, constants)
                return encoded.cached, encoded.local

            return jax.vjp(encode, state.params)[1]

        batch = batch_spec(made.views, rows, made.mesh) | {"row": jax.ShapeDtypeStruct((rows,), np.int32)}
        for objective in made.objectives.values():
            batch |= jax.eval_shape(objective.prepare, batch)
        found = jax.eval_shape(backward, made.abstract_state(), batch, made.abstract_constants())
        return sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(found))

    return residuals(2 * pairs) - residuals(pairs)


COUNTED = ("self-distillation", "grounding")
PLANNED = [
    pytest.param(*(case, parts), marks=() if parts > 1 and case in COUNTED else pytest.mark.exhaustive)
    for case in CASES
    for parts in (1, 4)
    if case != "positives of equal captions"  # no part of a plan
]


@pytest.mark.slow
@pytest.mark.parametrize(("case", "parts"), PLANNED)
def test_the_plan_counts_it_as_the_program_does(case, parts):
    """FLOPs of the jaxpr, and bytes that the forward pass saves."""
    mesh = make_mesh(1, devices=jax.devices()[:1])
    made = learner(case, mesh, micro_batches=parts)
    plain = replace(learner_of(mesh, model=made.model, optimizer=optax.sgd(0.1), micro_batches=parts))

    def flops(learner):
        arguments = (learner.abstract_state(), learner.batch_spec(PAIRS), learner.abstract_constants())
        jaxpr = jax.make_jaxpr(learner.step())(*arguments).jaxpr
        used, _ = dce_jaxpr(jaxpr, [True] * len(jaxpr.outvars))  # what the compiler leaves out
        return program.matmul_flops(used)

    def cost(learner):
        options = dict(batch_size=PAIRS, micro_batches=parts, mesh=mesh, slices=1)
        costs = [objective.cost(**options) for objective in learner.objectives.values()]
        return sum(cost.flops for cost in costs), sum(cost.activations for cost in costs)

    (with_it, bytes_with), (without, bytes_without) = cost(made), cost(plain)
    counted, all_of_it = flops(made) - flops(plain), flops(made)
    assert with_it - without == pytest.approx(counted, rel=0.05, abs=0.01 * all_of_it)
    saved_more = saved(made, PAIRS // parts) - saved(plain, PAIRS // parts)
    assert bytes_with - bytes_without == pytest.approx(saved_more, rel=0.05, abs=4096)


SWITCHED = {
    "steps": "6",
    "objectives.contrastive.positives": "captions",
    "objectives.contrastive.negatives": "1",
    "phases": "({'start': 3, 'objectives.captioning.weight': 0.5, 'objectives.captioning.layers': 1},)",
    "optimizer.name": "stable_adamw",
    "optimizer.layer_decay": "0.9",
    "checkpoint.every_steps": "1",
    "checkpoint.keep_last": "6",
    "log.tensorboard": "False",
}


@pytest.mark.exhaustive  # test_two_processes.py shows it with one process before the switch and two after
def test_killed_before_a_switch_of_objectives_a_run_resumes_digit_for_digit(tmp_path):
    recipe, workdir = str(runs.write_recipe(tmp_path)), tmp_path / "run"
    assert loop.run(workdir=str(workdir), recipe=recipe, overrides=SWITCHED) == 0
    metrics = runs.metrics(workdir)
    with_captions = [line["step"] for line in metrics if "train/captioning/loss" in line]
    assert with_captions == [4, 5, 6] and all("train/loss" in line for line in metrics if line["step"] < 4)
    killed = tmp_path / "killed"
    shutil.copytree(workdir, killed)
    for step in range(3, 7):
        shutil.rmtree(killed / "checkpoints" / str(step))
    assert loop.run(workdir=str(killed), recipe=None, overrides={}) == 0
    assert runs.metrics(killed) == metrics
    model = clip_jax.load(workdir)
    assert "objectives" not in model.params and len(model.generate(np.zeros((2, 64, 64, 3), np.uint8))) == 2
    assert "decoder" not in clip_jax.load(workdir, step=3).params
