"""The mesh as a grid of devices: what the losses share, and nothing specific to one of them.

The P devices that split a batch of P b pairs form a grid of r rows and c columns, in the order of the mesh. Each device
computes one tile of the logit matrix: its grid row's images against its grid column's texts. Eight devices, 2 x 4;
"images 5" are the b images of device 5:

                            texts 0, 4      texts 1, 5      texts 2, 6      texts 3, 7      gathered along a grid column
                                |               |               |               |
    images 0, 1, 2, 3    +-> device 0 ----> device 1 ----> device 2 ----> device 3 -+
                         +----------------------------------------------------------+       travel around a ring
                                |               |               |               |
    images 4, 5, 6, 7    +-> device 4 ----> device 5 ----> device 6 ----> device 7 -+
                         +----------------------------------------------------------+

After c hops of the ring every logit has been computed exactly once. The row state of an image (the log-sum-exp of its
row of the logit matrix, its gradient) follows the image around the ring. The column state of a text stays on the device
that gathered the text, and is reduced along the grid column at the end. Within a device logits exist one block at a
time. For a batch of B pairs of width D, the most square grid communicates the least: each
device sends O(B D / sqrt(P)) elements and gathers B D / c. A grid of one row is a plain ring, which gathers nothing.
"""

import math
from collections.abc import Callable
from typing import NamedTuple, TypeVar

import jax
import jax.numpy as jnp
from jax.sharding import AbstractMesh, AxisType, Mesh, PartitionSpec
from jaxtyping import Array, Bool, Float, Int32, PyTree, Shaped

from clip_jax.devices.sharding import batch_sharding, batch_shards

ROWS, COLUMNS, REPLICAS = "grid_row", "grid_column", "replica"
BATCH = PartitionSpec((ROWS, COLUMNS))
REPLICATED = PartitionSpec()

# Trees of arrays with one entry per image, which is a row of the logits, or per text, which is a column.
Images = RowState = PyTree[Shaped[Array, "images ..."]]
Texts = ColumnState = PyTree[Shaped[Array, "texts ..."]]
Tree = TypeVar("Tree")


class Tiling(NamedTuple):
    """How the logit matrix is split. Results do not depend on it beyond rounding."""

    block_logits: int = 2**21
    """Logits that a device holds at one time (8 MiB of float32), in blocks as square as the tile allows."""
    gathered_bytes: int = 2**30
    """Limit of the gathered texts and their float32 gradient on a device. A grid of fewer rows gathers less and sends
    more; one of a single row gathers nothing."""


DEFAULT_TILING = Tiling()


class Embeddings(NamedTuple):
    """Embeddings of images or texts, with the ids, groups and padding mask that determine positives and negatives.

    An image and a text with equal ids form a pair. Entries that are not ``valid`` are padding.
    """

    vectors: Float[Array, "n dim"]
    ids: Int32[Array, "n"]
    valid: Bool[Array, "n"] | None = None
    groups: Int32[Array, "n words"] | None = None
    """An image and a text with equal groups are positives of each other; None: only the pairs are positives."""


class ExtraTexts(NamedTuple):
    """Further texts for each image: columns of the logits without a pair, such as hard negatives."""

    vectors: Float[Array, "batch texts dim"]
    groups: Int32[Array, "batch texts words"] | None = None
    """They are positives of images with equal groups; None: negatives of all images."""
    valid: Bool[Array, "batch texts"] | None = None


def make_grid(mesh: Mesh, texts: Float[Array, "texts dim"], tiling: Tiling) -> AbstractMesh:
    """Reshapes the combined data and fsdp axes into grid rows and columns; the tensor axis becomes replicas.

    The mesh is abstract because JAX accepts only one concrete mesh in a program with custom partitioning (cuDNN's
    attention). The devices follow from the shardings of the arguments, see ``global_batch``.
    """
    shards = batch_shards(mesh)
    rows = grid_rows(shards, *texts.shape, texts.dtype.itemsize, tiling.gathered_bytes)
    sizes = (rows, shards // rows, mesh.shape["tensor"])
    return AbstractMesh(sizes, (ROWS, COLUMNS, REPLICAS), axis_types=(AxisType.Auto,) * 3)


def grid_rows(
    shards: int, texts: int, dim: int, itemsize: int, gathered_bytes: int = DEFAULT_TILING.gathered_bytes
) -> int:
    """Rows of the most square grid of ``shards`` devices whose gathered texts fit into ``gathered_bytes``."""
    row_bytes = texts // shards * dim * (itemsize + 4)
    rows = range(1, math.isqrt(shards) + 1)
    return max(r for r in rows if shards % r == 0 and (r == 1 or r * row_bytes <= gathered_bytes))


def global_batch(
    image: Float[Array, "batch dim"],
    text: Float[Array, "batch dim"],
    valid: Bool[Array, "batch"] | None,
    mesh: Mesh,
    groups: Int32[Array, "batch words"] | None = None,
    extra: ExtraTexts | None = None,
) -> tuple[Float[Array, "batch dim"], Embeddings]:
    """The batch split over the devices of the mesh, each pair with an id of its own; padding becomes zeros.

    ``extra`` texts follow the pairs' texts on each device, with an id that no image has.
    Raises ValueError when the batch does not divide over the devices.
    """
    batch = image.shape[0]
    if batch % batch_shards(mesh):
        raise ValueError(f"a batch of {batch} pairs does not divide over {batch_shards(mesh)} devices")
    if extra is not None and extra.valid is not None and valid is None:
        valid = jnp.ones(batch, bool)
    if valid is not None:  # padding may be NaN, and its gradient is zero
        image, text = (jnp.where(valid[:, None], x, 0) for x in (image, text))
    texts = Embeddings(text, jnp.arange(batch), valid, groups)
    if extra is not None:
        texts = _with_extra(texts, extra, batch_shards(mesh))
    image, text = (jax.lax.with_sharding_constraint(x, batch_sharding(mesh)) for x in (image, texts.vectors))
    return image, texts._replace(vectors=text)


def _with_extra(texts: Embeddings, extra: ExtraTexts, shards: int) -> Embeddings:
    """The texts of the pairs and the extra ones, device by device."""
    batch, number = extra.vectors.shape[:2]
    valid = texts.valid
    if valid is not None:
        valid = jnp.broadcast_to(valid[:, None], (batch, number))
        valid = valid if extra.valid is None else valid & extra.valid
        extra = extra._replace(vectors=jnp.where(valid[:, :, None], extra.vectors, 0))
    groups = extra.groups
    if texts.groups is not None and groups is None:
        # A group that no pair has: those of examples without a label are -1 - row (contrastive.positive_groups).
        groups = jnp.full((batch, number, texts.groups.shape[1]), jnp.iinfo(jnp.int32).min, texts.groups.dtype)
    added = Embeddings(extra.vectors, jnp.full((batch, number), -1), valid, groups)

    def interleave(pairs: Array, more: Array) -> Array:
        rest = pairs.shape[1:]
        parts = [x.reshape(shards, -1, *rest) for x in (pairs, more.astype(pairs.dtype))]
        return jnp.concatenate(parts, axis=1).reshape(-1, *rest)

    return jax.tree.map(interleave, texts, added)


def paired_images(image: Float[Array, "images dim"], texts: Embeddings) -> Embeddings:
    """A device's images, with the ids of their texts: the first of the device's texts."""
    return jax.tree.map(lambda x: x[: len(image)], texts)._replace(vectors=image)


def pair_count(images: Embeddings) -> int | Int32[Array, ""]:
    """The number of pairs in the global batch without padding, from a device's images."""
    if images.valid is not None:
        return psum_grid(jnp.sum(images.valid))
    return len(images.ids) * jax.lax.axis_size(ROWS) * jax.lax.axis_size(COLUMNS)


def masked_logits(images: Embeddings, texts: Embeddings, scale: Float[Array, ""]) -> Float[Array, "images texts"]:
    """float32 logits, -inf for the pairs themselves and for padding.

    With the pairs, the loss of aligned embeddings would be a small difference of large numbers. Without them,
    loss_i = log(1 + sum over j != i of exp(l_ij - l_ii)), and its gradient does not need ``p_ii - 1``.
    """
    cosines = matmul(images.vectors, texts.vectors.T)
    excluded = images.ids[:, None] == texts.ids[None, :]
    if images.valid is not None:
        excluded |= ~(images.valid[:, None] & texts.valid[None, :])
    return jnp.where(excluded, -jnp.inf, scale * cosines)


def positive_logits(
    image: Float[Array, "pairs dim"], text: Float[Array, "texts dim"], scale: Float[Array, ""] | float
) -> Float[Array, "pairs"]:
    """float32 logits of the pairs. Multiplied in float32, because bfloat16 products would not match the matrix's."""
    return scale * jnp.sum(image.astype(jnp.float32) * text[: len(image)].astype(jnp.float32), axis=-1)


def same_group(images: Embeddings, texts: Embeddings) -> Bool[Array, "images texts"]:
    """Whether an image and a text are positives of each other."""
    return jnp.all(images.groups[:, None] == texts.groups[None], axis=-1)


def count_correct(
    best: Float[Array, "pairs"], best_negative: Float[Array, "texts"], valid: Bool[Array, "texts"] | None
) -> Int32[Array, ""]:
    """The number of images, or of texts, whose best positive logit is not below that of their best negative."""
    return jnp.sum(where_valid(best >= best_negative[: len(best)], valid))


def scan_ring(
    scan_tile: Callable[[Images, ColumnState], tuple[RowState, ColumnState]],
    merge: Callable[[RowState, RowState], RowState],
    images: Images,
    column_state: ColumnState,
) -> tuple[RowState, ColumnState]:
    """Rotates the images of each device around its grid row; their row state returns to the device they came from.

    ``scan_tile(images, column_state) -> (row_state, column_state)`` runs on every device for the images of each hop.
    Its row state travels one hop later than the images, and is merged with that of the next device. Each hop is issued
    before the scan that it overlaps with. The last hop returns the images too, unused, so that all hops are alike.
    """
    size = jax.lax.axis_size(COLUMNS)

    def shift(tree: Images) -> Images:
        return jax.lax.ppermute(tree, COLUMNS, [(i, (i + 1) % size) for i in range(size)])

    def hop(carry: tuple[Images, RowState, ColumnState], _: None) -> tuple[tuple[Images, RowState, ColumnState], None]:
        images, row_state, column_state = carry
        next_images, arrived = shift((images, row_state))
        row_state, column_state = scan_tile(images, column_state)
        return (next_images, merge(arrived, row_state), column_state), None

    if size == 1:
        return scan_tile(images, column_state)
    next_images = shift(images)
    row_state, column_state = scan_tile(images, column_state)
    carry = next_images, row_state, column_state
    (_, row_state, column_state), _ = jax.lax.scan(hop, carry, length=size - 1)
    return shift(row_state), column_state


def scan_blocks(
    step: Callable[[Images, Texts, RowState, ColumnState], tuple[RowState, ColumnState]],
    images: Images,
    texts: Texts,
    row_init: PyTree[Shaped[Array, "..."]],
    column_state: ColumnState,
    tiling: Tiling,
    cast: Callable[[RowState], RowState] = lambda row_state: row_state,
) -> tuple[RowState, ColumnState]:
    """Scans over the blocks of a tile, and returns the row state of its images and the column state of its texts.

    ``step(images, texts, row_state, column_state) -> (row_state, column_state)`` computes one block from its slices.
    The row state of each image starts as ``row_init``; after a row of blocks ``cast`` is applied to it.
    """
    height, width = (jax.tree.leaves(x)[0].shape[0] for x in (images, texts))
    block_height = largest_divisor(height, math.isqrt(tiling.block_logits))
    block_width = largest_divisor(width, tiling.block_logits // block_height)

    def columns(tree: Texts | ColumnState, block: Int32[Array, ""]) -> Texts | ColumnState:
        return jax.tree.map(lambda x: jax.lax.dynamic_slice_in_dim(x, block * block_width, block_width), tree)

    def row_of_blocks(column_state: ColumnState, images: Images) -> tuple[ColumnState, RowState]:
        def one_block(block: Int32[Array, ""], carry: tuple[RowState, ColumnState]) -> tuple[RowState, ColumnState]:
            row_state, column_state = carry
            row_state, new = step(images, columns(texts, block), row_state, columns(column_state, block))
            column_state = jax.tree.map(
                lambda x, new: jax.lax.dynamic_update_slice_in_dim(x, new, block * block_width, axis=0),
                column_state,
                new,
            )
            return row_state, column_state

        row_state = jax.tree.map(lambda x: varying(jnp.broadcast_to(x, (block_height, *x.shape))), row_init)
        row_state, column_state = jax.lax.fori_loop(0, width // block_width, one_block, (row_state, column_state))
        return column_state, cast(row_state)

    rows = jax.tree.map(lambda x: x.reshape(height // block_height, block_height, *x.shape[1:]), images)
    column_state, row_state = jax.lax.scan(row_of_blocks, column_state, rows)
    return jax.tree.map(lambda x: x.reshape(height, *x.shape[2:]), row_state), column_state


def gather_texts(tree: Texts) -> Texts:
    """The texts of the grid column, from the local texts of its devices."""
    return jax.lax.all_gather(tree, ROWS, tiled=True)


def local_slice(tree: ColumnState, size: int) -> ColumnState:
    """The entries of this device's ``size`` texts, out of those of its grid column."""
    start = jax.lax.axis_index(ROWS) * size
    return jax.tree.map(lambda x: jax.lax.dynamic_slice_in_dim(x, start, size), tree)


def psum_grid(tree: Tree) -> Tree:
    """The sum over all devices of the grid, as one psum per axis.

    In a single psum over both, XLA aborts if the mesh's data axis is split over both grid axes (jax 0.12, data 4 x fsdp
    2): it rejects adjacent parts of one axis that could be merged.
    """
    return jax.lax.psum(jax.lax.psum(tree, COLUMNS), ROWS)


def varying(tree: Tree) -> Tree:
    """Marks values as varying over the grid, as the carry of a scan must be from the start."""
    return jax.lax.pcast(tree, (ROWS, COLUMNS), to="varying")


def where_valid(x: Shaped[Array, "pairs"], valid: Bool[Array, "texts"] | None) -> Shaped[Array, "pairs"]:
    """``x``, with 0 for padding."""
    return x if valid is None else jnp.where(valid[: len(x)], x, 0)


def add_pairs(
    gradient: Float[Array, "n dim"], positive_gradient: Float[Array, "pairs"], partners: Float[Array, "m dim"]
) -> Float[Array, "n dim"]:
    """Adds the gradient through the logit of each pair: ``positive_gradient`` times the pair's other embedding."""
    through_pairs = positive_gradient[:, None] * partners[: len(positive_gradient)].astype(jnp.float32)
    return gradient + pad_rows(through_pairs, len(gradient), 0)


def pad_rows(x: Shaped[Array, "pairs ..."], size: int, fill: float) -> Shaped[Array, "texts ..."]:
    """Extends the first axis to ``size``, for texts without an image."""
    missing = size - len(x)
    return jnp.concatenate([x, jnp.full((missing, *x.shape[1:]), fill, x.dtype)]) if missing else x


def matmul(x: Float[Array, "m k"], y: Float[Array, "k n"]) -> Float[Array, "m n"]:
    """A matrix product accumulated in float32; float32 inputs are not rounded first, as TPUs and GPUs do by default."""
    precision = jax.lax.Precision.HIGHEST if x.dtype == jnp.float32 else None
    return jnp.dot(x, y, precision=precision, preferred_element_type=jnp.float32)


def largest_divisor(size: int, limit: int) -> int:
    """The largest divisor of ``size`` that is at most ``limit``."""
    return max(k for k in range(1, min(size, limit) + 1) if size % k == 0)
