"""Captioning: its definition, and what the decoder may see."""

import functools
from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax.traverse_util import flatten_dict

from clip_jax import presets
from clip_jax.devices.sharding import batch_sharding, make_mesh, replicated
from clip_jax.losses import vocabulary
from clip_jax.losses.vocabulary import cross_entropy
from clip_jax.models.clip import CLIP
from clip_jax.models.text import class_mask
from clip_jax.objectives import captioning
from clip_jax.objectives.objective import Rows
from clip_jax.planning import program
from tests.models.test_clip import SMALL, params_of

BIDIRECTIONAL = replace(SMALL, text=replace(SMALL.text, causal=False, pooling="last"))
ROWS, LENGTH = 4, SMALL.text.context_length
TEXT = np.random.default_rng(0).integers(1, 99, (ROWS, LENGTH)).astype(np.int32)
ENDS = (5, 11, 3, 8)
for row, end in enumerate(ENDS):
    TEXT[row, end], TEXT[row, end + 1 :] = 99, 0


def case(architecture=SMALL, **settings):
    """(model, settings, the parameters, normalized images)"""
    settings = captioning.SPEC.defaults | {"layers": 2} | settings
    model = CLIP(captioning.adapt(settings, architecture))
    params = params_of(model)
    head = params["decoder"]["projection"]
    params["decoder"] = params["decoder"] | {"projection": jax.random.normal(jax.random.key(2), head.shape) / 7}
    image = np.random.default_rng(1).normal(size=(ROWS, 32, 32, 3)).astype(np.float32)
    return model, settings, params, image


@functools.partial(jax.jit, static_argnums=0)
def predicted(model, params, image, text, parallel=None):
    """The logits of the tokens of all captions."""
    out = model.forward(params, {}, {"image": image, "text": text}, train=False)
    hidden, head, bias = model.decode(params, out.tokens, out.patches, text, parallel)
    return hidden @ head + (0 if bias is None else bias)


@pytest.mark.parametrize(
    "architecture", [SMALL, pytest.param(BIDIRECTIONAL, marks=pytest.mark.slow)], ids=["coca", "cappa"]
)
def test_the_loss_is_the_mean_over_tokens(architecture):
    """CoCa's over the tokens of all captions, CapPa's over those of each caption and then over captions."""
    model, settings, params, image = case(architecture)
    made, text = captioning.make(settings, model, presets.HALF, None), jnp.asarray(TEXT)

    @jax.jit
    def ours(params):
        batch = {"image": image, "text": text}
        outputs = model.forward(params, {}, batch, train=False)
        keys = jax.random.split(jax.random.key(0), ROWS)
        return made.local(Rows(params, {}, {}, {}, {}, outputs, batch | made.prepare(batch), keys))

    loss, sums = ours(params)
    logits = np.asarray(predicted(model, params, image, text))
    coca = architecture.text.causal
    losses, right = [], []
    for row, end in enumerate(ENDS):
        tokens = range(1, end + 1) if coca else range(min(end + 2, LENGTH))
        scored = [(t, logits[row, t - coca], TEXT[row, t]) for t in tokens]
        losses.append([-jax.nn.log_softmax(values)[token] for _, values, token in scored])
        right.append([values.argmax() == token for _, values, token in scored])

    def mean(rows):
        return np.mean(np.concatenate(rows)) if coca else np.mean([np.mean(row) for row in rows])

    assert float(loss) == pytest.approx(float(mean(losses)), rel=1e-5)
    assert float(sums["accuracy"]) == pytest.approx(mean(right), abs=1e-6)


POOLED = replace(
    SMALL,
    image=replace(SMALL.image, pooling="queries", queries=5, query_heads=2),
    text=replace(SMALL.text, pooling="class"),
)


@pytest.mark.parametrize("architecture", [SMALL, POOLED, BIDIRECTIONAL], ids=["clip", "coca", "cappa"])
def test_a_prediction_sees_the_image_and_no_token_after_its_own(architecture):
    model, _, params, image = case(architecture)
    text = np.random.default_rng(3).integers(1, 99, TEXT.shape).astype(np.int32)
    plain, at = predicted(model, params, image, text), 6
    later = text.copy()
    later[:, at:] = later[:, at:] % 90 + 1
    # state i predicts token i + 1 (or i, without a start token) from the tokens before it
    seen = at if architecture.text.causal else at + 1
    changed = np.abs(predicted(model, params, image, later) - plain).max(axis=(0, 2))
    assert np.all(changed[:seen] == 0) and np.all(changed[seen:] > 1e-4)
    assert np.abs(predicted(model, params, image[::-1], text) - plain).max() > 1e-3


def test_with_all_inputs_masked_it_sees_the_image_alone():
    model, _, params, image = case(BIDIRECTIONAL, parallel=0.5)
    parallel = np.arange(ROWS) % 2 == 0
    plain, other = (predicted(model, params, image, text, parallel) for text in (TEXT, TEXT[::-1]))
    changed = np.abs(plain - other).max(axis=(1, 2))
    assert np.all(changed[parallel] == 0) and np.all(changed[~parallel] > 1e-3)


def test_a_decoder_of_cappas_begins_with_equal_logits_and_has_no_bias_but_its_heads():
    model = CLIP(captioning.adapt(captioning.SPEC.defaults | {"parallel": 0.75}, BIDIRECTIONAL))
    decoder = flatten_dict(params_of(model)["decoder"], sep="/")
    assert not np.any(decoder["projection"]) and decoder["mask_embedding"].shape == (48,)
    assert [name for name in decoder if name.endswith("bias")] == ["projection_bias"]
    assert float(decoder["token_embedding"].std()) == pytest.approx(1, abs=0.05)  # N(0, 1)


def test_a_class_token_does_not_see_padding():
    """Nor does it see itself instead, with the mask of OpenCLIP's published weights."""
    text = np.asarray([[7, 3, 9, 0, 0], [7, 3, 2, 4, 9]], np.int32)
    assert class_mask(text, shifted=False).tolist() == [[True] * 3 + [False] * 2 + [True], [True] * 6]
    assert class_mask(text, shifted=True).tolist() == [[True] * 4 + [False] * 2, [True] * 6]


def test_the_end_of_a_caption_is_found_with_and_without_an_end_token():
    clip, siglip = replace(SMALL.text, pooling="argmax"), replace(SMALL.text, pooling="last")
    text = np.asarray([[7, 0, 3, 9, 0, 0], [7, 3, 2, 4, 5, 9]], np.int32)
    assert captioning.caption_mask(text, clip).sum(axis=1).tolist() == [4, 6]
    text = np.asarray([[7, 1, 3, 1, 1, 1], [7, 3, 2, 4, 5, 9]], np.int32)
    assert captioning.caption_mask(text, siglip).sum(axis=1).tolist() == [4, 6]


def vocabulary_case(rows=8, length=6, width=4, size=50):
    rng = np.random.default_rng(0)
    hidden, head = rng.normal(size=(rows, length, width)), rng.normal(size=(width, size))
    weights = rng.random((rows, length)) * (rng.random((rows, length)) < 0.6)
    targets = rng.integers(0, size, (rows, length))
    return [x.astype(np.float32) for x in (hidden, head)], targets, weights.astype(np.float32)


def test_chunks_are_large_enough_for_the_traffic_of_the_head_and_of_equal_size():
    assert vocabulary.chunk_size(8192, 256_000) == 1024  # the head's gradient is read and written 8 times
    assert vocabulary.chunk_size(1500, 256_000) == 750
    assert vocabulary.chunk_size(8192, 1000) == 8192


@pytest.mark.parametrize("mesh", [(1, 1, 1), (2, 2, 2), (8, 1, 1)])
def test_the_vocabularys_loss_in_chunks_equals_the_definition(mesh, monkeypatch):
    monkeypatch.setattr(vocabulary, "CHUNK_LOGITS", 0)
    monkeypatch.setattr(vocabulary, "MIN_CHUNK_TOKENS", 8)  # or all of a device's
    (hidden, head), targets, weights = vocabulary_case()
    bias = np.random.default_rng(1).normal(size=head.shape[1]).astype(np.float32)
    mesh = make_mesh(*mesh, devices=jax.devices()[: int(np.prod(mesh))])

    def definition(hidden, head, bias):
        own = jnp.take_along_axis(jax.nn.log_softmax(hidden @ head + bias), targets[..., None], 2)[..., 0]
        return -jnp.sum(weights * own)

    def ours(hidden, head, bias):
        return cross_entropy(hidden, head, targets, weights, mesh, bias)[0]

    found = jax.jit(jax.value_and_grad(ours, (0, 1, 2)))(hidden, head, bias)
    expected = jax.value_and_grad(definition, (0, 1, 2))(hidden, head, bias)
    for ours, theirs in zip(jax.tree.leaves(found), jax.tree.leaves(expected), strict=True):
        np.testing.assert_allclose(ours, theirs, rtol=2e-5, atol=1e-5)


def test_chunks_of_padding_are_skipped_and_no_array_has_the_logits_of_the_batch(monkeypatch):
    """What would be multiplied in a skipped chunk is NaN."""
    monkeypatch.setattr(vocabulary, "CHUNK_LOGITS", 0)
    monkeypatch.setattr(vocabulary, "MIN_CHUNK_TOKENS", 8)
    (hidden, head), targets, weights = vocabulary_case(32, 16, size=600)
    weights[:] = 1
    weights[:, 8:] = 0
    hidden[:, 8:] = np.nan
    mesh = make_mesh(8)
    run = jax.jit(jax.value_and_grad(lambda *x: cross_entropy(*x, targets, weights, mesh)[0], (0, 1)))
    loss, (_, gradient) = run(hidden, head)
    assert np.isfinite(loss) and np.isfinite(gradient).all()
    shapes = [shape.split("[")[1] for shape in program.buffers(run.lower(hidden, head).compile().as_text())]
    sizes = [np.prod([int(n) for n in shape.rstrip("]").split(",") if n]) for shape in shapes]
    assert max(sizes) <= 16 * 600 < 32 * 16 * 600 / 8


def test_the_heads_gradient_is_summed_over_the_devices_once_and_not_in_each_chunk(monkeypatch):
    monkeypatch.setattr(vocabulary, "CHUNK_LOGITS", 0)
    monkeypatch.setattr(vocabulary, "MIN_CHUNK_TOKENS", 8)
    (hidden, head), targets, weights = vocabulary_case(32, 16, size=600)
    mesh = make_mesh(4, 2)
    rows = [jax.device_put(x, batch_sharding(mesh)) for x in (hidden, targets, weights)]

    @jax.jit
    def run(head, hidden, targets, weights):
        return jax.value_and_grad(lambda *x: cross_entropy(*x, targets, weights, mesh)[0], (0, 1))(hidden, head)

    sent = program.collectives(run.lower(jax.device_put(head, replicated(mesh)), *rows).compile().as_text())
    assert len(jax.devices()) == 8 and sum(c.bytes * c.times for c in sent) < 1.1 * head.nbytes
