"""Attention for TPUs as one forward and one backward Pallas kernel; the scores never leave VMEM.

XLA writes the scores of a short sequence to HBM several times, padded to 128 lanes: half of an L/14's training step by
the TPU compiler's estimate. Towers have 16 to 1,100 tokens, so all keys of a head fit in fast memory at once: no online
softmax is needed, and the backward kernel recomputes the scores instead of reading saved statistics.

Inside a kernel the scores are transposed, ``[keys, queries]``: the sums of the softmax then run over sublanes, which
the vector unit adds directly, and no product of the backward pass needs a transposed matrix of scores. Two heads
of 64 features share a column of 128 lanes: the other head's lanes are set to zero instead of being sliced away, which
costs the MXU nothing (it multiplies 128 x 128 tiles either way) and avoids moving lanes. Heads of 72 to 104 features
(So400m, H, g, bigG) begin and end inside of columns: a group of heads that fills whole columns is read as the
projections wrote it, and a head uses the one or two columns that it touches. Padded to 128 features, the arrays would
be copied before and after the kernel, which takes four times as long as the kernel itself.
"""

import functools
import math
from dataclasses import dataclass
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu
from jax.sharding import AbstractMesh, Mesh
from jax.sharding import PartitionSpec as P
from jaxtyping import Array, Float

from clip_jax.devices.sharding import BATCH_AXES
from clip_jax.models.attention import Keys, Mask, Queries

LANES = 128
SUBLANES = 8
"""Rows of a tile of float32."""
BF16_SUBLANES = 16
"""Rows of a bfloat16 tile (two float32 tiles): slicing and concatenating at multiples of it is free."""
MASKED_SCORE = -1e30
"""A finite score for keys that a query does not attend to: a softmax over -inf alone would be NaN."""
UNROLLED_SCORES = 12 * 256**2
"""Scores per program. Fewer leave the units idle between programs; more take minutes to compile."""
UNROLLED_HEADS = 16
"""Heads per program, for the same reason: short sequences have few scores."""
VMEM = 16 * 2**20
"""Bytes of VMEM: the compiler's default limit for a kernel, and all that a v4 has."""
QUERY_TILE = 512
"""Queries per tile: the tiles of one head, a few arrays of keys x queries in float32, must fit in 16 MiB."""


@dataclass(frozen=True)
class TPUAttention:
    """An ``Attend`` that splits batch and heads over the mesh, because the kernel works on one device's arrays."""

    mesh: Mesh | AbstractMesh | None = None
    interpret: bool = False
    """Runs the kernel's operations one by one on any platform, for tests."""
    vmem: int = VMEM
    """Bytes of fast memory that the kernel may use."""

    def __call__(
        self, query: Queries, key: Keys, value: Keys, *, causal: bool = False, mask: Mask | None = None
    ) -> Queries:
        attend = functools.partial(_attend, causal=causal, interpret=self.interpret, vmem=self.vmem)
        if self.mesh is None or math.prod(self.mesh.shape.values()) == 1:
            return attend(query, key, value, mask)
        split = P(BATCH_AXES, None, "tensor")
        seen = None if mask is None else P(BATCH_AXES if mask.shape[0] > 1 else None)
        # A Pallas kernel does not declare over which axes its results vary; they are sharded like its arguments.
        mapped = jax.shard_map(
            attend, mesh=self.mesh, in_specs=(split, split, split, seen), out_specs=split, check_vma=False
        )
        return mapped(query, key, value, mask)


def _attend(
    query: Queries, key: Keys, value: Keys, mask: Mask | None, *, causal: bool, interpret: bool, vmem: int
) -> Queries:
    """Attention on one device; pads heads to a divisor of 128 lanes if no group of heads fills whole columns."""
    batch, queries, heads, dim = query.shape
    keys, padded_dim, padded_heads = key.shape[1], dim, heads
    needed = _vmem(dim, queries, keys, query.dtype.itemsize)
    if needed and mask is not None and mask.shape[1] > 1:
        needed += 2 * 4 * _round_up_to_lanes(queries) * _round_up_to_lanes(keys)
    if dim % SUBLANES or heads * dim % math.lcm(dim, LANES) or needed > vmem:
        padded_dim = next(size for size in (32, 64, LANES, 2 * LANES) if size >= dim)
        per_column = max(1, LANES // padded_dim)
        padded_heads = -(-heads // per_column) * per_column

    def columns(x: Array) -> Array:
        x = jnp.pad(x, ((0, 0), (0, 0), (0, padded_heads - heads), (0, padded_dim - dim)))
        return x.reshape(*x.shape[:2], -1)

    seen = None
    if mask is not None:
        # A mask that is the same for all queries stays a column: as a square it would fill the fast memory.
        rows = 1 if mask.shape[1] == 1 else queries
        seen = jnp.broadcast_to(mask, (mask.shape[0], rows, keys)).swapaxes(1, 2).astype(jnp.float32)
    limit = vmem if VMEM < needed <= vmem else None
    shape = _Shape(padded_dim, dim**-0.5, queries, keys, causal, interpret, limit)
    mixed = _kernel(shape, columns(query), columns(key), columns(value), seen)
    return mixed.reshape(batch, queries, padded_heads, padded_dim)[:, :, :heads, :dim]


def _vmem(dim: int, queries: int, keys: int, size: int) -> int:
    """Approximate bytes of VMEM in the backward pass of a group of heads; 0 for heads that fit into a column."""
    group = math.lcm(dim, LANES)
    if group == max(dim, LANES):
        return 0
    # Twice, for the transfers in progress.
    blocks = 2 * size * (3 * _round_up_to_lanes(queries) + 4 * _round_up_to_lanes(keys))
    sums = 4 * (2 * _round_up_to_sublanes(keys) + min(QUERY_TILE, _round_up_to_lanes(queries)))
    return int(1.2 * group * (blocks + sums + 2 * size * _round_up_to_lanes(keys)))


@dataclass(frozen=True)
class _Shape:
    dim: int
    scale: float
    queries: int
    keys: int
    """Tokens; the kernel's blocks are longer, and their rows after the last token are undefined."""
    causal: bool
    interpret: bool
    vmem: int | None
    """The compiler's limit of fast memory; None: its own."""


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _kernel(
    shape: _Shape,
    query: Float[Array, "batch queries width"],
    key: Float[Array, "batch keys width"],
    value: Float[Array, "batch keys width"],
    seen: Float[Array, "#batch keys #queries"] | None,
) -> Float[Array, "batch queries width"]:
    return _call(_forward, shape, (query, key, value), seen, (query,))[0]


def _kernel_forward(shape, query, key, value, seen):
    return _kernel(shape, query, key, value, seen), (query, key, value, seen)


def _kernel_backward(shape, saved, gradient):
    *arrays, seen = saved
    gradients = _call(_backward, shape, (*arrays, gradient), seen, arrays)
    return *gradients, None if seen is None else jnp.zeros_like(seen)


_kernel.defvjp(_kernel_forward, _kernel_backward)


def _call(body, shape: _Shape, arrays, seen, results) -> list[Array]:
    """One program handles a few images and groups of heads, unrolled, so that their work overlaps."""
    batch, width = arrays[0].shape[0], arrays[0].shape[2]
    queries, keys, lanes = _round_up_to_lanes(shape.queries), _round_up_to_lanes(shape.keys), math.lcm(LANES, shape.dim)
    budget = max(1, min(UNROLLED_HEADS, UNROLLED_SCORES // (queries * keys)) // (lanes // shape.dim))
    groups = _divisor(width // lanes, budget)
    images = _divisor(batch, budget // groups) if groups == width // lanes else 1

    def block(x: Array) -> pl.BlockSpec:
        # The block may be longer than the array: the copy to VMEM stops at the array's end, so XLA need not pad.
        return pl.BlockSpec((images, _round_up_to_lanes(x.shape[1]), groups * lanes), lambda i, j: (i, 0, j))

    specs, masks = [block(x) for x in arrays], ()
    if seen is not None:
        images_seen = images if seen.shape[0] > 1 else 1
        shared = seen.shape[0] == 1
        specs.append(
            pl.BlockSpec(
                (images_seen, keys, queries if seen.shape[2] > 1 else 1), lambda i, j: (0 if shared else i, 0, 0)
            )
        )
        masks = (seen,)

    def program(*refs):
        inputs, outputs = refs[: len(specs)], refs[len(specs) :]
        mask = inputs[-1] if masks else None
        for image in range(images):
            for group in range(groups):
                at = image, slice(None), slice(group * lanes, (group + 1) * lanes)
                visible = None if mask is None else mask[image if mask.shape[0] > 1 else 0]
                body(shape, [ref.at[at] for ref in inputs[: len(arrays)]], visible, [ref.at[at] for ref in outputs])

    return pl.pallas_call(
        program,
        grid=(batch // images, width // lanes // groups),
        in_specs=specs,
        out_specs=[block(x) for x in results],
        out_shape=[jax.ShapeDtypeStruct(x.shape, x.dtype) for x in results],
        compiler_params=pltpu.CompilerParams(dimension_semantics=("parallel", "parallel"), vmem_limit_bytes=shape.vmem),
        interpret=shape.interpret,
    )(*arrays, *masks)


class _Head(NamedTuple):
    """Where a head is in its group."""

    columns: slice
    """The lanes of the columns that it touches."""
    lanes: tuple[int, int] | None
    """Its own lanes in them; None: all."""
    rows: slice
    """The tiles of rows that it touches, when a group is transposed."""
    inner_rows: slice
    """Its own rows in them."""


def _forward(shape: _Shape, inputs, visible, outputs) -> None:
    query, key = inputs[0][...], inputs[1][...]
    transposed = _zero_after(inputs[2][...], shape.keys).T
    for rows in _tiles(query):
        mixed = []
        for head in _heads(shape, query.shape[1]):
            weights, denominator = _softmax(shape, key[:, head.columns], _select_head(query[rows], head), visible, rows)
            product = _dot(transposed[head.rows], _pad_rows(weights, key).astype(key.dtype), 1, 0)
            mixed.append(product[head.inner_rows] / denominator)
        outputs[0][rows] = jnp.concatenate(mixed).astype(outputs[0].dtype).T


def _backward(shape: _Shape, inputs, visible, outputs) -> None:
    tokens = shape.queries, shape.keys, shape.keys, shape.queries
    query, key, value, gradient = (_zero_after(ref[...], n) for ref, n in zip(inputs, tokens, strict=True))
    transposed, used = key.T, slice(_round_up_to_sublanes(shape.keys))
    d_key, d_value = ([0.0] * (query.shape[1] // LANES) for _ in range(2))
    for rows in _tiles(query):
        d_query = []
        for head in _heads(shape, query.shape[1]):
            one, d_mixed = _select_head(query[rows], head), _select_head(gradient[rows], head)
            weights, denominator = _softmax(shape, key[:, head.columns], one, visible, rows)
            weights = weights * (1 / denominator)
            d_weights = weights * _dot(value[used, head.columns], d_mixed, 1, 1)
            d_scores = d_weights - weights * jnp.sum(d_weights, axis=0, keepdims=True)
            _accumulate(d_value, head, _dot(weights.astype(value.dtype), d_mixed, 1, 0))
            _accumulate(d_key, head, _dot(d_scores.astype(key.dtype), one, 1, 0))
            product = _dot(transposed[head.rows], _pad_rows(d_scores, key).astype(key.dtype), 1, 0)
            d_query.append(product[head.inner_rows])
        outputs[0][rows] = (jnp.concatenate(d_query) * shape.scale).astype(outputs[0].dtype).T
    outputs[1][used] = (jnp.concatenate(d_key, axis=1) * shape.scale).astype(outputs[1].dtype)
    outputs[2][used] = jnp.concatenate(d_value, axis=1).astype(outputs[2].dtype)


def _accumulate(sums: list[Array | float], head: _Head, x: Array) -> None:
    """Adds what a head gives to the sums of the columns that it touches."""
    first = head.columns.start // LANES
    for column in range(x.shape[1] // LANES):
        sums[first + column] += x[:, column * LANES : (column + 1) * LANES]


def _softmax(shape: _Shape, key, query, visible, rows: slice) -> tuple[Array, Array]:
    """(unnormalized weights float32[keys, queries], their sums [1, queries]); a sum is 1 if all keys are masked."""
    used = _round_up_to_sublanes(shape.keys)
    scores = _dot(key[:used], query, 1, 1) * shape.scale
    conditions = []
    if shape.causal:
        queries = jax.lax.broadcasted_iota(jnp.int32, scores.shape, 1) + rows.start
        conditions.append(jax.lax.broadcasted_iota(jnp.int32, scores.shape, 0) <= queries)
    if visible is not None:
        conditions.append((visible[:used, rows] if visible.shape[1] > 1 else visible[:used]) > 0)
    seen = functools.reduce(jnp.logical_and, conditions) if conditions else None
    if seen is not None:
        scores = jnp.where(seen, scores, MASKED_SCORE)
    scores = _fill_after(scores, shape.keys, MASKED_SCORE)
    weights = jnp.exp(scores - jnp.max(scores, axis=0, keepdims=True))
    if visible is None:  # every query sees a key
        return weights, jnp.sum(weights, axis=0, keepdims=True)
    weights = _fill_after(jnp.where(seen, weights, 0.0), shape.keys, 0.0)
    denominator = jnp.sum(weights, axis=0, keepdims=True)
    return weights, jnp.where(denominator > 0, denominator, 1.0)


def _tiles(query: Array) -> list[slice]:
    """Tiles of queries; products of float32 are split into several of bfloat16 and need more memory."""
    size = QUERY_TILE if query.dtype == jnp.bfloat16 else max(LANES, QUERY_TILE // 4)
    return [slice(start, min(start + size, query.shape[0])) for start in range(0, query.shape[0], size)]


def _heads(shape: _Shape, lanes: int) -> list[_Head]:
    """The heads of a group of whole columns."""
    heads = []
    for start in range(0, lanes, shape.dim):
        stop = start + shape.dim
        columns = slice(start // LANES * LANES, -(-stop // LANES) * LANES)
        rows = slice(start // BF16_SUBLANES * BF16_SUBLANES, -(-stop // BF16_SUBLANES) * BF16_SUBLANES)
        inside = start - columns.start, stop - columns.start
        heads.append(
            _Head(
                columns,
                None if columns == slice(start, stop) else inside,
                rows,
                slice(start - rows.start, stop - rows.start),
            )
        )
    return heads


def _select_head(x: Array, head: _Head) -> Array:
    """The columns of a head, zero outside its lanes; selected in float32, because Mosaic has no select of packed
    bfloat16 on older chips."""
    x = x[:, head.columns]
    if head.lanes is None:
        return x
    lane = jax.lax.broadcasted_iota(jnp.int32, (1, x.shape[1]), 1)
    inside = (lane >= head.lanes[0]) & (lane < head.lanes[1])
    return jnp.where(inside, x.astype(jnp.float32), 0.0).astype(x.dtype)


def _zero_after(x: Array, tokens: int) -> Array:
    """Sets the rows after the last token to zero: they are undefined, and 0 * NaN is NaN.

    Clears bits instead of selecting: converting bfloat16 to float32 and back crashes Mosaic on older chips.
    """
    if x.shape[0] == tokens:
        return x
    bits = pltpu.bitcast(x, jnp.int32)  # packs two rows of bfloat16 into one, the first in the lower half
    packed = x.shape[0] // bits.shape[0]
    row = jax.lax.broadcasted_iota(jnp.int32, bits.shape, 0) * packed
    mask = jnp.where(row < tokens, -1, 0)
    if packed == 2:
        mask = jnp.where(row + 1 == tokens, 0xFFFF, mask)
    return pltpu.bitcast(bits & mask, x.dtype)


def _fill_after(x: Array, tokens: int, value: float) -> Array:
    """Scores with all rows after the last token replaced; only the last tile of rows is touched."""
    if x.shape[0] == tokens:
        return x
    start = tokens // BF16_SUBLANES * BF16_SUBLANES
    last = x[start:]
    inside = jax.lax.broadcasted_iota(jnp.int32, (last.shape[0], 1), 0) < tokens - start
    last = jnp.where(inside, last, value)
    return last if start == 0 else jnp.concatenate([x[:start], last])


def _pad_rows(x: Array, like: Array) -> Array:
    """``x`` with rows of zeros up to the number of rows of ``like``, for products that sum over whole lanes."""
    missing = like.shape[0] - x.shape[0]
    return x if missing == 0 else jnp.concatenate([x, jnp.zeros((missing, x.shape[1]), x.dtype)])


def _round_up_to_sublanes(tokens: int) -> int:
    """Tokens rounded up to whole tiles of rows: the scores of the other rows of a block are not computed."""
    return -(-tokens // BF16_SUBLANES) * BF16_SUBLANES


def _round_up_to_lanes(tokens: int) -> int:
    """Tokens rounded up to whole lanes: the rows of a block."""
    return -(-tokens // LANES) * LANES


def _dot(left: Array, right: Array, left_axis: int, right_axis: int) -> Array:
    """The product over one axis of each, summed in float32; float32 operands keep their precision."""
    precision = jax.lax.Precision.HIGHEST if left.dtype == jnp.float32 else None
    numbers = (((left_axis,), (right_axis,)), ((), ()))
    return jax.lax.dot_general(left, right, numbers, precision=precision, preferred_element_type=jnp.float32)


def _divisor(number: int, most: int) -> int:
    """The largest divisor of ``number`` that is at most ``most``."""
    return max(size for size in range(1, number + 1) if number % size == 0 and size <= max(1, most))
