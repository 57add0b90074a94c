"""The losses on a mesh: every device has one tile of the B x B logit matrix, and never holds even that at once.

The P devices that split a batch are viewed as the most square r x c grid, b = B / P pairs each. Device (i, j) gathers
the texts of its grid column (B / c), and the images of its grid row (B / r) come by, b at a time, on a ring of c
devices, so that every logit exists exactly once on the mesh. What is found out about an image follows it around the
ring (the log-sum-exp of its row, its gradient); what is found out about a text stays with the device that gathered it,
and is reduced along the grid column. Where even the texts of a grid column are too many, the grid has fewer rows; a
grid of one row is a plain ring, and nothing is gathered. A tile is walked in blocks; the backward pass rebuilds them.

Per device: 8 b B D matmul FLOPs (sigmoid: 6), traffic in proportion to B D / sqrt(P) instead of B D, and memory to
B D / c. With aligned embeddings the loss is a small difference of large numbers. So the positive is left out of the
sums: loss_i = log(1 + sum over j != i of exp(l_ij - l_ii)), whose gradient needs no ``p_ii - 1``.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, PartitionSpec
from jaxtyping import Array, Float

from clip_jax.losses import tile
from clip_jax.losses.reference import Metrics
from clip_jax.losses.tile import COLUMNS, ROWS
from clip_jax.sharding import batch_sharding, batch_shards

PAIRS = PartitionSpec((ROWS, COLUMNS))
WHOLE = PartitionSpec()
ZERO, LOWEST = np.float32(0), np.float32(-np.inf)


def softmax(
    image: Float[Array, "batch dim"], text: Float[Array, "batch dim"], scale: Float[Array, ""], *, mesh: Mesh
) -> tuple[Float[Array, ""], Metrics]:
    """Symmetric InfoNCE over the global batch (Radford et al. 2021, fig. 3); equals ``reference.softmax``.

    Raises ValueError when the batch does not divide over the mesh.
    """
    image, text = _split(image, text, mesh)
    loss, accuracy = _softmax(image, text, scale, tile.grid_of(mesh, text))
    return loss, {"accuracy": accuracy}


@functools.partial(jax.custom_vjp, nondiff_argnums=(3,))
def _softmax(image, text, scale, grid):
    return _forward(image, text, scale, grid)[0]


def _forward(image, text, scale, grid):
    batch = image.shape[0]

    def device(image, text, pair, scale):
        texts = jax.lax.all_gather((text, pair), ROWS, tiled=True)

        def step(images, texts, of_rows, of_columns):
            logits = tile.logits(*images, *texts, scale)
            return tile.merge(of_rows, tile.summary(logits, 1)), tile.merge(of_columns, tile.summary(logits, 0))

        def walk(images, of_columns):
            return tile.walk(step, lambda x: x, images, texts, (LOWEST, ZERO), of_columns)

        columns = texts[1].shape
        nothing = tile.varying((jnp.full(columns, -jnp.inf), jnp.zeros(columns)))
        of_rows, of_columns = tile.around((image, pair), nothing, walk, tile.merge)
        of_columns = tile.own(_over_grid_rows(of_columns), len(pair))
        row_lse, column_lse = tile.log_sum_exp(of_rows), tile.log_sum_exp(of_columns)
        positives = tile.positives(image, text, scale)
        loss = jnp.sum(jax.nn.softplus(row_lse - positives) + jax.nn.softplus(column_lse - positives))
        correct = _correct(positives, of_rows[0], of_columns[0])
        loss, accuracy = (x / (2 * batch) for x in tile.total((loss, correct)))
        return (loss, accuracy), (row_lse, column_lse)

    specs = dict(mesh=grid, in_specs=(PAIRS, PAIRS, PAIRS, WHOLE), out_specs=((WHOLE, WHOLE), (PAIRS, PAIRS)))
    out, (row_lse, column_lse) = jax.shard_map(device, **specs)(image, text, jnp.arange(batch), scale)
    return out, (image, text, scale, row_lse, column_lse)


def _correct(positives, row_maxima, column_maxima):
    """How many images and texts have no other logit above their pair's."""
    return jnp.sum(positives >= row_maxima) + jnp.sum(positives >= column_maxima)


def _over_grid_rows(summary):
    maximum, total = summary
    largest = jax.lax.pmax(maximum, ROWS)
    return largest, jax.lax.psum(total * jnp.exp(maximum - tile.finite(largest)), ROWS)


def _backward(grid, residuals, cotangents):
    batch = residuals[0].shape[0]

    def device(image, text, pair, scale, row_lse, column_lse, cotangent):
        positives = tile.positives(image, text, scale)
        # Of all logits of a row, the positive included: what exp(l - lse) is a probability of.
        row_whole, column_whole = jnp.logaddexp(row_lse, positives), jnp.logaddexp(column_lse, positives)
        texts = jax.lax.all_gather((text, pair, column_whole, positives), ROWS, tiled=True)

        def step(images, texts, of_rows, text_gradient):
            """p @ texts, p.T @ images, and p times how far a logit is above its positive, which is the gradient by
            scale with nothing left to cancel; p of the row and of the column, without positives."""
            image_gradient, scale_gradient = of_rows
            image, image_pair, row_whole, row_positives = images
            text, text_pair, column_whole, column_positives = texts
            logits = tile.logits(image, image_pair, text, text_pair, scale)
            row_p, column_p = jnp.exp(logits - row_whole[:, None]), jnp.exp(logits - column_whole[None, :])
            above = row_p * (logits - row_positives[:, None]) + column_p * (logits - column_positives[None, :])
            scale_gradient += jnp.sum(jnp.where(jnp.isfinite(logits), above, 0), axis=1)
            p = (row_p + column_p).astype(image.dtype)
            image_gradient += tile.product(p, text)
            text_gradient += tile.product(p.T, image)
            return (image_gradient, scale_gradient), text_gradient

        def walk(images, text_gradient):
            start = (jnp.zeros(image.shape[1]), ZERO)
            return tile.walk(step, send, images, texts, start, text_gradient)

        def send(of_rows):
            # In the embeddings' own type: in bfloat16 half of the memory and of the traffic.
            return of_rows[0].astype(image.dtype), of_rows[1]

        nothing = tile.varying(jnp.zeros(texts[0].shape, jnp.float32))
        images = (image, pair, row_whole, positives)
        of_rows, text_gradient = tile.around(images, nothing, walk, _add)
        image_gradient, scale_gradient = of_rows
        text_gradient = jax.lax.psum_scatter(text_gradient.astype(text.dtype), ROWS, tiled=True)
        # p_ii - 1 is minus the sum of all other probabilities, of the row and of the column.
        positive = -jax.nn.sigmoid(row_lse - positives) - jax.nn.sigmoid(column_lse - positives)
        weight = cotangent / (2 * batch)
        own_image, own_text = image.astype(jnp.float32), text.astype(jnp.float32)
        image_gradient = weight * scale * (image_gradient + positive[:, None] * own_text)
        text_gradient = weight * scale * (text_gradient + positive[:, None] * own_image)
        scale_gradient = weight / scale * tile.total(jnp.sum(scale_gradient))
        return image_gradient.astype(image.dtype), text_gradient.astype(text.dtype), scale_gradient

    image, text, *others = residuals
    specs = dict(mesh=grid, in_specs=(*[PAIRS] * 3, WHOLE, PAIRS, PAIRS, WHOLE), out_specs=(PAIRS, PAIRS, WHOLE))
    return jax.shard_map(device, **specs)(image, text, jnp.arange(batch), *others, cotangents[0])


_softmax.defvjp(_forward, _backward)


def sigmoid(
    image: Float[Array, "batch dim"],
    text: Float[Array, "batch dim"],
    scale: Float[Array, ""],
    bias: Float[Array, ""],
    *,
    mesh: Mesh,
) -> tuple[Float[Array, ""], Metrics]:
    """The pairwise sigmoid loss (Zhai et al. 2023, equation 1); equals ``reference.sigmoid``.

    Raises ValueError when the batch does not divide over the mesh.
    """
    image, text = _split(image, text, mesh)
    loss, accuracy = _sigmoid(image, text, scale, bias, tile.grid_of(mesh, text))
    return loss, {"accuracy": accuracy}


@functools.partial(jax.custom_vjp, nondiff_argnums=(4,))
def _sigmoid(image, text, scale, bias, grid):
    return _sigmoid_forward(image, text, scale, bias, grid)[0]


def _sigmoid_forward(image, text, scale, bias, grid):
    """With the gradients, in the same walk: a logit's gradient depends on that logit alone."""
    batch = image.shape[0]

    def device(image, text, pair, scale, bias):
        texts = jax.lax.all_gather((text, pair), ROWS, tiled=True)

        def step(images, texts, of_rows, of_columns):
            """All but the positives: maxima of rows and columns, sums of softplus(l), and with p = sigmoid(l)
            p @ texts, p.T @ images, sums of p * l and of p."""
            image_gradient, maximum, loss, by_scale, by_bias = of_rows
            text_gradient, column_maximum = of_columns
            logits = tile.logits(*images, *texts, scale) + bias
            p = jax.nn.sigmoid(logits)
            loss += jnp.sum(jax.nn.softplus(logits), axis=1)
            by_scale += jnp.sum(jnp.where(jnp.isfinite(logits), p * (logits - bias), 0), axis=1)
            by_bias += jnp.sum(p, axis=1)
            maximum = jnp.maximum(maximum, jnp.max(logits, axis=1))
            column_maximum = jnp.maximum(column_maximum, jnp.max(logits, axis=0))
            p = p.astype(image.dtype)
            image_gradient += tile.product(p, texts[0])
            text_gradient += tile.product(p.T, images[0])
            return (image_gradient, maximum, loss, by_scale, by_bias), (text_gradient, column_maximum)

        def walk(images, of_columns):
            start = (jnp.zeros(image.shape[1]), LOWEST, ZERO, ZERO, ZERO)
            return tile.walk(step, send, images, texts, start, of_columns)

        def send(of_rows):
            return of_rows[0].astype(image.dtype), *of_rows[1:]

        def merge(one, other):
            gradient, maximum, *sums = zip(one, other, strict=True)
            return _add(*gradient), jnp.maximum(*maximum), *(_add(*x) for x in sums)

        nothing = tile.varying((jnp.zeros(texts[0].shape, jnp.float32), jnp.full(texts[1].shape, -jnp.inf)))
        of_rows, (text_gradient, column_maximum) = tile.around((image, pair), nothing, walk, merge)
        image_gradient, maximum, *sums = of_rows
        text_gradient = jax.lax.psum_scatter(text_gradient.astype(text.dtype), ROWS, tiled=True)
        column_maximum = tile.own(jax.lax.pmax(column_maximum, ROWS), len(pair))
        cosines = tile.positives(image, text, 1.0)
        positives = scale * cosines + bias
        pull = -jax.nn.sigmoid(-positives)
        own_image, own_text = image.astype(jnp.float32), text.astype(jnp.float32)
        image_gradient = scale / batch * (image_gradient + pull[:, None] * own_text)
        text_gradient = scale / batch * (text_gradient + pull[:, None] * own_image)
        sums = (
            jnp.sum(sums[0] + jax.nn.softplus(-positives)),
            _correct(positives, maximum, column_maximum) / 2,
            jnp.sum(sums[1] / scale + pull * cosines),
            jnp.sum(sums[2] + pull),
        )
        loss, accuracy, *by_scale_and_bias = (x / batch for x in tile.total(sums))
        gradients = (image_gradient.astype(image.dtype), text_gradient.astype(text.dtype), *by_scale_and_bias)
        return (loss, accuracy), gradients

    specs = dict(
        mesh=grid,
        in_specs=(PAIRS, PAIRS, PAIRS, WHOLE, WHOLE),
        out_specs=((WHOLE, WHOLE), (PAIRS, PAIRS, WHOLE, WHOLE)),
    )
    return jax.shard_map(device, **specs)(image, text, jnp.arange(batch), scale, bias)


def _sigmoid_backward(grid, gradients, cotangents):
    return tuple((cotangents[0] * gradient).astype(gradient.dtype) for gradient in gradients)


_sigmoid.defvjp(_sigmoid_forward, _sigmoid_backward)


def _add(one, other):
    return jax.tree.map(jnp.add, one, other)


def _split(image: Float[Array, "batch dim"], text: Float[Array, "batch dim"], mesh: Mesh) -> tuple[Array, Array]:
    """Over the devices of the mesh, which says to JAX which devices they are: the grid is named by its shape alone.

    JAX takes one mesh of devices in a program with a custom partitioning, as cuDNN's attention is.
    """
    if image.shape[0] % batch_shards(mesh):
        raise ValueError(f"a batch of {image.shape[0]} pairs does not divide over {batch_shards(mesh)} devices")
    rows = batch_sharding(mesh)
    return jax.lax.with_sharding_constraint(image, rows), jax.lax.with_sharding_constraint(text, rows)
