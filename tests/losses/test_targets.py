"""Losses with other targets than the diagonal: groups, extra texts and smoothing, against their ten-line definition."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from clip_jax.devices.sharding import make_mesh
from clip_jax.losses import reference
from clip_jax.losses.mesh_grid import ExtraTexts
from clip_jax.losses.sigmoid import sigmoid
from clip_jax.losses.softmax import softmax
from tests.losses import cases

LOSSES = {
    "softmax": (softmax, reference.softmax_targets, (14.3,)),
    "sigmoid": (sigmoid, reference.sigmoid_targets, (10.0, -10.0)),
}
BATCH, EXTRA, DIM = 48, 2, 16
GROUPS = (np.arange(BATCH) * 7 % 20).astype(np.int32)
"""Groups of two or three pairs, on different devices."""
EXTRA_GROUPS = np.where(np.arange(BATCH * EXTRA) % 5 == 0, np.arange(BATCH * EXTRA) % 20, -1).astype(np.int32)
"""Every fifth extra text is a positive of some images."""


def case():
    image, text = cases.embeddings(BATCH, DIM, 0.4)
    extra = np.random.default_rng(1).normal(size=(BATCH, EXTRA, DIM)).astype(np.float32)
    return image, text, extra / np.linalg.norm(extra, axis=-1, keepdims=True)


def close(found, expected, tolerance=2e-6):
    for ours, theirs in zip(jax.tree.leaves(found), jax.tree.leaves(expected), strict=True):
        assert cases.relative_error(ours, np.asarray(theirs, np.float64)) < tolerance


@functools.lru_cache
def expected(name, smoothing, with_extra):
    _, definition, scalars = LOSSES[name]
    texts = np.concatenate([GROUPS, EXTRA_GROUPS]) if with_extra else GROUPS

    def loss(image, text, extra, *scalars):
        text = jnp.concatenate([text, extra.reshape(-1, DIM)]) if with_extra else text
        return definition(image, text, *scalars, image_groups=GROUPS, text_groups=texts, smoothing=smoothing)

    arguments = (*case(), *map(np.float32, scalars))
    return jax.jit(jax.value_and_grad(loss, tuple(range(len(arguments)))))(*arguments)


@pytest.mark.parametrize(("smoothing", "with_extra"), [(0.0, False), (0.1, True)])
@pytest.mark.parametrize("name", LOSSES)
@pytest.mark.parametrize(("shape", "rows", "block_logits"), cases.GRIDS)
def test_groups_extra_texts_and_smoothing_equal_the_definition_on_every_grid(
    shape, rows, block_logits, name, smoothing, with_extra
):
    mesh, tiling = cases.grid(shape, rows, max(block_logits, 6))
    loss, _, scalars = LOSSES[name]

    def ours(image, text, extra, *scalars):
        groups = EXTRA_GROUPS.reshape(BATCH, EXTRA, 1)
        extra = ExtraTexts(extra, jnp.asarray(groups)) if with_extra else None
        options = {"groups": jnp.asarray(GROUPS)[:, None], "extra": extra, "smoothing": smoothing}
        return loss(image, text, *scalars, mesh=mesh, tiling=tiling, **options)[0]

    arguments = (*case(), *map(np.float32, scalars))
    found = jax.jit(jax.value_and_grad(ours, tuple(range(len(arguments)))))(*arguments)
    value, gradients = expected(name, smoothing, with_extra)
    assert float(found[0]) == pytest.approx(float(value), rel=2e-6)
    close([g for i, g in enumerate(found[1]) if with_extra or i != 2],
          [g for i, g in enumerate(gradients) if with_extra or i != 2])  # fmt: skip


@pytest.mark.parametrize("name", LOSSES)
def test_with_a_group_for_each_pair_it_is_the_plain_loss(name):
    """At scale 100 with aligned embeddings, where the loss is a small difference of large numbers."""
    loss, _, scalars = LOSSES[name]
    image, text = cases.embeddings(BATCH, DIM, 0.6)
    scalars = tuple(map(np.float32, (100.0, *scalars[1:])))
    arguments = (image, text, *scalars)

    def gradients(**options):
        mesh = make_mesh(2, 2, 2)
        run = jax.jit(
            jax.value_and_grad(lambda *x: loss(*x, mesh=mesh, **options), tuple(range(len(arguments))), has_aux=True)
        )
        return run(*arguments)

    ids = jnp.stack([jnp.arange(BATCH), jnp.zeros(BATCH, int)], axis=1)
    close(gradients(groups=ids), gradients(), 1e-6)


@pytest.mark.parametrize("name", LOSSES)
def test_padding_and_extra_texts_that_are_not_there_count_for_nothing(name):
    loss, _, scalars = LOSSES[name]
    image, text, extra = case()
    mesh, scalars = make_mesh(8), tuple(map(np.float32, scalars))
    groups, there = jnp.asarray(GROUPS)[:, None], np.arange(BATCH * EXTRA).reshape(BATCH, EXTRA) % 3 > 0
    noise = np.where(there[:, :, None], extra, np.nan)

    def ours(extra, valid=None):
        options = {"groups": groups, "extra": extra, "smoothing": 0.1, "valid": valid}
        run = jax.jit(jax.value_and_grad(lambda *x: loss(*x, mesh=mesh, **options)[0], (0, 1)))
        return run(image, text, *scalars)

    found = ours(ExtraTexts(jnp.asarray(noise), None, jnp.asarray(there)))

    def by_definition(image, text):
        texts = jnp.concatenate([text, extra[there]])
        text_groups = np.concatenate([GROUPS, np.full(int(there.sum()), -1, np.int32)])
        return LOSSES[name][1](image, texts, *scalars, image_groups=GROUPS, text_groups=text_groups, smoothing=0.1)

    close(found, jax.value_and_grad(by_definition, (0, 1))(image, text))
    valid = np.arange(BATCH) % 4 > 0
    value, _ = ours(None, jnp.asarray(valid))
    kept = GROUPS[valid]
    options = {"image_groups": kept, "text_groups": kept, "smoothing": 0.1}
    assert float(value) == pytest.approx(
        float(LOSSES[name][1](image[valid], text[valid], *scalars, **options)), rel=1e-5
    )


@pytest.mark.parametrize("name", LOSSES)
def test_a_hard_negative_is_no_positive_of_an_example_without_a_label(name):
    """Whose groups are -1, -2, ...: ``contrastive.positive_groups``."""
    loss, definition, scalars = LOSSES[name]
    image, text, extra = case()
    groups = np.where(np.arange(BATCH) < 5, -1 - np.arange(BATCH), GROUPS).astype(np.int32)
    options = {"groups": jnp.asarray(groups)[:, None], "extra": ExtraTexts(jnp.asarray(extra), None, None)}
    arguments, mesh = (image, text, *map(np.float32, scalars)), make_mesh(8)
    found = jax.jit(lambda *x: loss(*x, mesh=mesh, **options)[0])(*arguments)
    texts = np.concatenate([text, extra.reshape(-1, DIM)])
    text_groups = np.concatenate([groups, np.full(BATCH * EXTRA, -1000, np.int32)])
    of = definition(image, texts, *scalars, image_groups=groups, text_groups=text_groups)
    assert float(found) == pytest.approx(float(of), rel=1e-5)


@pytest.mark.parametrize("name", LOSSES)
def test_any_text_of_the_group_counts_as_correct(name):
    """Four images of two groups; each image finds the other image's text of its group first."""
    image = np.eye(4, dtype=np.float32)
    text, groups = image[[1, 0, 3, 2]], jnp.asarray([0, 0, 1, 1])[:, None]
    loss, _, scalars = LOSSES[name]
    arguments, mesh = (image, text, *map(np.float32, scalars)), make_mesh(2, devices=jax.devices()[:2])

    def accuracy(**options):
        return float(jax.jit(lambda *x: loss(*x, mesh=mesh, **options)[1]["accuracy"])(*arguments))

    assert accuracy() == 0 and accuracy(groups=groups) == 1
