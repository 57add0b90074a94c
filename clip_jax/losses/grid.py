"""The losses on a mesh: every device has one tile of the B x B logit matrix, and never holds even that at once.

The P devices that split a batch are viewed as the most square r x c grid, b = B / P pairs each. Device (i, j) gathers
the images of its grid row (B / r) and the texts of its grid column (B / c), so that every logit exists exactly once
on the mesh; the log-sum-exps of rows and columns are finished by reductions along one axis each. A tile is walked in
blocks of rows. The backward pass rebuilds the blocks, and its gradients are reduce-scattered along row and column.

Per device: 8 b B D matmul FLOPs (sigmoid: 6), traffic and memory in proportion to B D / sqrt(P) instead of B D.

With aligned embeddings the loss is a small difference of large numbers. So the positive is left out of the sums:
loss_i = log(1 + sum over j != i of exp(l_ij - l_ii)), whose gradient needs no ``p_ii - 1``.
"""

import functools

import jax
import jax.numpy as jnp
from jax.sharding import Mesh, PartitionSpec
from jaxtyping import Array, Float

from clip_jax.losses.reference import Metrics
from clip_jax.losses.tile import COLUMNS, ROWS, Tile, finish, grid_of
from clip_jax.sharding import batch_shards

PAIRS = PartitionSpec((ROWS, COLUMNS))
WHOLE = PartitionSpec()


def softmax(
    image: Float[Array, "batch dim"], text: Float[Array, "batch dim"], scale: Float[Array, ""], *, mesh: Mesh
) -> tuple[Float[Array, ""], Metrics]:
    """Symmetric InfoNCE over the global batch (Radford et al. 2021, fig. 3); equals ``reference.softmax``.

    Raises ValueError when the batch does not divide over the mesh.
    """
    _check_batch(image, mesh)
    loss, accuracy = _softmax(image, text, scale, grid_of(mesh))
    return loss, {"accuracy": accuracy}


@functools.partial(jax.custom_vjp, nondiff_argnums=(3,))
def _softmax(image, text, scale, grid):
    return _forward(image, text, scale, grid)[0]


def _forward(image, text, scale, grid):
    batch = image.shape[0]

    def device(image, text, scale):
        tile = Tile(image, text, scale)
        row_maximum, row_sum, column_maximum, column_sum = tile.statistics()
        row_lse, row_maximum = finish(row_maximum, row_sum, COLUMNS)
        column_lse, _ = finish(column_maximum, column_sum, ROWS)
        row_lse, column_lse, row_maximum = (
            tile.own_rows(row_lse),
            tile.own_columns(column_lse),
            tile.own_rows(row_maximum),
        )
        loss = jnp.sum(jax.nn.softplus(row_lse - tile.positives) + jax.nn.softplus(column_lse - tile.positives))
        correct = jnp.sum(tile.positives >= row_maximum)
        loss, correct = jax.lax.psum((loss / (2 * batch), correct / batch), (ROWS, COLUMNS))
        return (loss, correct), (row_lse, column_lse)

    specs = dict(mesh=grid, in_specs=(PAIRS, PAIRS, WHOLE), out_specs=((WHOLE, WHOLE), (PAIRS, PAIRS)))
    out, (row_lse, column_lse) = jax.shard_map(device, **specs)(image, text, scale)
    return out, (image, text, scale, row_lse, column_lse)


def _backward(grid, residuals, cotangents):
    image = residuals[0]
    batch = image.shape[0]

    def device(image, text, scale, row_lse, column_lse, cotangent):
        tile = Tile(image, text, scale)
        weight = cotangent / (2 * batch)
        # Of all logits of a row, the positive included: what exp(l - lse) is a probability of.
        row_whole = jnp.logaddexp(row_lse, tile.positives)
        column_whole = jnp.logaddexp(column_lse, tile.positives)
        image_gradient, text_gradient, scale_gradient = tile.gradients(
            *(jax.lax.all_gather(x, COLUMNS, tiled=True) for x in (row_whole, tile.positives)),
            *(jax.lax.all_gather(x, ROWS, tiled=True) for x in (column_whole, tile.positives)),
        )
        image_gradient = jax.lax.psum_scatter(image_gradient, COLUMNS, tiled=True)
        text_gradient = jax.lax.psum_scatter(text_gradient, ROWS, tiled=True)
        # p_ii - 1 is minus the sum of all other probabilities, of the row and of the column.
        positive = -jax.nn.sigmoid(row_lse - tile.positives) - jax.nn.sigmoid(column_lse - tile.positives)
        own_image, own_text = image.astype(jnp.float32), text.astype(jnp.float32)
        image_gradient = weight * scale * (image_gradient + positive[:, None] * own_text)
        text_gradient = weight * scale * (text_gradient + positive[:, None] * own_image)
        scale_gradient = weight / scale * jax.lax.psum(scale_gradient, (ROWS, COLUMNS))
        return image_gradient.astype(image.dtype), text_gradient.astype(text.dtype), scale_gradient

    specs = dict(mesh=grid, in_specs=(PAIRS, PAIRS, WHOLE, PAIRS, PAIRS, WHOLE), out_specs=(PAIRS, PAIRS, WHOLE))
    return jax.shard_map(device, **specs)(*residuals, cotangents[0])


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
    _check_batch(image, mesh)
    loss, accuracy = _sigmoid(image, text, scale, bias, grid_of(mesh))
    return loss, {"accuracy": accuracy}


@functools.partial(jax.custom_vjp, nondiff_argnums=(4,))
def _sigmoid(image, text, scale, bias, grid):
    return _sigmoid_forward(image, text, scale, bias, grid)[0]


def _sigmoid_forward(image, text, scale, bias, grid):
    batch = image.shape[0]

    def device(image, text, scale, bias):
        tile = Tile(image, text, scale)
        loss, row_maximum, image_gradient, text_gradient, scale_gradient, bias_gradient = tile.sigmoid(bias)
        positives = tile.positives + bias
        row_maximum = tile.own_rows(jax.lax.pmax(row_maximum, COLUMNS))
        pull = -jax.nn.sigmoid(-positives)
        own_image, own_text = image.astype(jnp.float32), text.astype(jnp.float32)
        image_gradient = jax.lax.psum_scatter(image_gradient, COLUMNS, tiled=True) + pull[:, None] * own_text
        text_gradient = jax.lax.psum_scatter(text_gradient, ROWS, tiled=True) + pull[:, None] * own_image
        sums = (
            loss + jnp.sum(jax.nn.softplus(-positives)),
            jnp.sum(positives >= row_maximum),
            scale_gradient + jnp.sum(pull * tile.positives) / scale,
            bias_gradient + jnp.sum(pull),
        )
        loss, accuracy, scale_gradient, bias_gradient = (x / batch for x in jax.lax.psum(sums, (ROWS, COLUMNS)))
        image_gradient, text_gradient = (x * scale / batch for x in (image_gradient, text_gradient))
        return (loss, accuracy), (image_gradient, text_gradient, scale_gradient, bias_gradient)

    gradient_specs = (PAIRS, PAIRS, WHOLE, WHOLE)
    specs = dict(mesh=grid, in_specs=gradient_specs, out_specs=((WHOLE, WHOLE), gradient_specs))
    out, gradients = jax.shard_map(device, **specs)(image, text, scale, bias)
    types = [x.dtype for x in (image, text)]
    return out, (*(g.astype(t) for g, t in zip(gradients[:2], types, strict=True)), *gradients[2:])


def _sigmoid_backward(grid, gradients, cotangents):
    return tuple((cotangents[0] * gradient).astype(gradient.dtype) for gradient in gradients)


_sigmoid.defvjp(_sigmoid_forward, _sigmoid_backward)


def _check_batch(image: Float[Array, "batch dim"], mesh: Mesh) -> None:
    if image.shape[0] % batch_shards(mesh):
        raise ValueError(f"a batch of {image.shape[0]} pairs does not divide over {batch_shards(mesh)} devices")
