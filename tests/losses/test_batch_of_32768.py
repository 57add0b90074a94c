"""A global batch of 32,768, executed and not only compiled: against float64 arithmetic in chunks, on 8 devices."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from clip_jax import presets
from clip_jax.devices.sharding import batch_sharding, make_mesh, to_devices
from clip_jax.losses.sigmoid import sigmoid
from clip_jax.losses.softmax import softmax
from clip_jax.models.clip import Architecture
from clip_jax.models.text import TextTower
from clip_jax.models.vit import ImageTower
from tests.losses.cases import embeddings, relative_error
from tests.training.steps import learner_of

BATCH, CHUNK = 32_768, 512
# The other tests compile in a hurry; what is executed 10^9 times is worth the optimizer's time.
OPTIMIZED = {"xla_backend_optimization_level": 1}


def rows(image, text, scale, bias=0.0):
    """Yields (indices, cosines, logits) of ``CHUNK`` images at a time, in float64."""
    for start in range(0, len(image), CHUNK):
        chosen = np.arange(start, min(start + CHUNK, len(image)))
        cosines = image[chosen] @ text.T
        yield chosen, cosines, scale * cosines + bias


def float64_softmax(image, text, scale):
    """(loss, gradients with respect to images, texts and scale)"""
    image, text, size = image.astype(np.float64), text.astype(np.float64), len(image)
    row_lse, columns = np.empty(size), np.zeros(size)
    for chosen, _, logits in rows(image, text, scale):  # |logits| <= 100: their exponentials are far from overflow
        exponentials = np.exp(logits, out=logits)
        row_lse[chosen] = np.log(exponentials.sum(axis=1))
        columns += exponentials.sum(axis=0)
    column_lse, positives = np.log(columns), scale * np.sum(image * text, axis=1)
    by_image, by_text, by_scale = np.empty_like(image), np.zeros_like(text), 0.0
    by_row, by_column = np.exp(-row_lse), np.exp(-column_lse)
    for chosen, cosines, logits in rows(image, text, scale):
        p = np.exp(logits, out=logits)
        p *= by_row[chosen, None] + by_column[None, :]
        p[np.arange(len(chosen)), chosen] -= 2
        p /= 2 * size
        by_image[chosen] = scale * p @ text
        by_text += scale * p.T @ image[chosen]
        by_scale += np.vdot(p, cosines)
    return np.mean(row_lse + column_lse - 2 * positives) / 2, (by_image, by_text, by_scale)


def float64_sigmoid(image, text, scale, bias):
    """(loss, gradients with respect to images, texts, scale and bias)"""
    image, text, size = image.astype(np.float64), text.astype(np.float64), len(image)
    loss, by_image, by_text, by_scale, by_bias = 0.0, np.empty_like(image), np.zeros_like(text), 0.0, 0.0
    for chosen, cosines, logits in rows(image, text, scale, bias):
        positives = np.arange(len(chosen)), chosen
        logits[positives] *= -1  # -log sigmoid(l) = log(1 + exp(-l))
        exponentials = np.exp(logits, out=logits)
        loss += np.log1p(exponentials).sum() / size
        p = exponentials / (1 + exponentials) / size
        p[positives] *= -1
        by_image[chosen] = scale * p @ text
        by_text += scale * p.T @ image[chosen]
        by_scale += np.vdot(p, cosines)
        by_bias += np.sum(p)
    return loss, (by_image, by_text, by_scale, by_bias)


@pytest.mark.parametrize(
    ("loss", "reference", "scalars", "aligned", "tolerance"),
    [
        pytest.param(
            softmax, float64_softmax, (100.0,), 0.6, 1e-5, id="softmax, trained", marks=pytest.mark.exhaustive
        ),
        pytest.param(sigmoid, float64_sigmoid, (10.0, -10.0), 0.0, 1e-6, id="sigmoid", marks=pytest.mark.exhaustive),
    ],
)
def test_the_loss_of_32768_pairs_and_its_gradients_are_those_of_float64(loss, reference, scalars, aligned, tolerance):
    """The softmax of an untrained model is in the step below."""
    mesh = make_mesh()
    pair = embeddings(BATCH, 32, aligned)
    values = [jax.device_put(x, batch_sharding(mesh)) for x in pair] + [jnp.float32(x) for x in scalars]
    gradient = jax.jit(jax.value_and_grad(lambda *x: loss(*x, mesh=mesh)[0], tuple(range(len(values)))))
    value, found = gradient.lower(*values).compile(OPTIMIZED)(*values)
    expected_value, expected = reference(*pair, *map(float, values[2:]))
    assert float(value) == pytest.approx(expected_value, rel=tolerance)
    for ours, theirs in zip(found, expected, strict=True):
        assert relative_error(ours, theirs) <= tolerance


TINY = Architecture(
    ImageTower(image_size=16, patch_size=8, width=16, layers=1, heads=2, mlp_width=32),
    TextTower(context_length=6, vocab_size=50, width=16, layers=1, heads=2, mlp_width=32),
    embed_dim=16,
)


@pytest.mark.exhaustive
def test_a_step_of_32768_pairs_in_micro_batches_has_the_gradient_of_all_of_them():
    """Gradient descent at rate 1 moves parameters by minus the gradient. Expected: float64's gradient with respect
    to embeddings, pulled back through the towers 4,096 pairs at a time, and summed in float64."""
    mesh = make_mesh(2, 2, 2)
    options = {"max_logit_scale": 0.0, "micro_batches": BATCH // 1024}
    learner = learner_of(mesh, architecture=TINY, optimizer=optax.sgd(1.0), **options)
    model = learner.model
    rng = np.random.default_rng(0)
    pixels = rng.integers(0, 256, (BATCH, 16, 16, 3), np.uint8)
    text = rng.integers(1, 50, (BATCH, 6)).astype(np.int32)
    state = learner.create_state()
    before = jax.tree.map(np.asarray, state.params)

    @jax.jit
    def encode(params, pixels, text):
        batch = {"image": presets.HALF.normalize(pixels), "text": text}
        return model.forward(params, {}, batch, train=True)[:2]

    parts = [slice(start, start + 4096) for start in range(0, BATCH, 4096)]
    encoded = [encode(before, pixels[part], text[part]) for part in parts]
    image, texts = (np.concatenate(x) for x in zip(*encoded, strict=True))
    scale = float(np.exp(np.float64(before["logit_scale"])))
    loss, (by_image, by_text, by_scale) = float64_softmax(image, texts, scale)
    expected = jax.tree.map(lambda x: np.zeros(x.shape), before)
    pull = jax.jit(lambda params, pixels, text, by: jax.vjp(lambda p: encode(p, pixels, text), params)[1](by)[0])
    for part in parts:
        by = tuple(x[part].astype(np.float32) for x in (by_image, by_text))
        expected = jax.tree.map(
            lambda sum_, x: sum_ + np.asarray(x), expected, pull(before, pixels[part], text[part], by)
        )
    expected["logit_scale"] = expected["logit_scale"] + by_scale * scale  # the parameter is its logarithm

    arguments = state, to_devices({"image": pixels, "text": text}, mesh, BATCH), {}
    state, metrics = learner.step().lower(*arguments).compile(OPTIMIZED)(*arguments)
    assert float(metrics["loss"]) == pytest.approx(loss, rel=1e-6)
    largest = max(np.abs(x).max() for x in jax.tree.leaves(expected))
    for old, new, theirs in zip(*map(jax.tree.leaves, (before, state.params, expected)), strict=True):
        np.testing.assert_allclose(old - np.asarray(new), theirs, rtol=1e-5, atol=1e-5 * largest)
