"""How much memory a training step needs on one device, reckoned from shapes and shardings; nothing is compiled.

The compiler knows better (``compiling.py``): it shares buffers, pads tiles and keeps or drops what it likes. This is
the estimate that orders what is worth compiling, and all there is for a GPU.
"""

import functools
import itertools
import math
from dataclasses import replace
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax.sharding import AbstractMesh, Mesh, PartitionSpec
from jaxtyping import Array

from clip_jax.losses.tile import grid_rows
from clip_jax.models.attention import Heads, cudnn
from clip_jax.models.clip import CLIP, Params
from clip_jax.models.resnet import ResNetTower
from clip_jax.models.text import TextTower
from clip_jax.models.vit import ImageTower
from clip_jax.sharding import batch_shards
from clip_jax.training.state import State

FLOAT32 = 4
LOGITS = 4 * 8 * 2**20
"""Some copies of the block of logits that exists at one time."""
SUBLANES, LANES = 8, 128
"""A TPU's tile: two axes of every array are filled up to multiples of these."""
FEW = 7
"""Pairs that the towers are differentiated for, and twice as many: where two shapes differ is the axis of the pairs."""


class Memory(NamedTuple):
    """Bytes on one device at the fullest moment of a step."""

    parameters: int
    optimizer: int
    """Moments, and the moving average of the parameters where there is one."""
    gradients: int
    activations: int
    """What the forward pass keeps for the backward pass."""
    working: int
    """What exists while one block is computed: its recomputed activations, its gathered weights, and the batch."""
    loss: int

    @property
    def state(self) -> int:
        return self.parameters + self.optimizer

    @property
    def total(self) -> int:
        # The loss of an accumulated step is done before the first activation is kept; its buffers are used again.
        return self.state + self.gradients + max(self.activations + self.working, self.loss)


def bytes_per_device(tree: Any) -> int:
    """Of the shards that one device holds of a tree of shapes with shardings."""
    return sum(math.prod(leaf.sharding.shard_shape(leaf.shape)) * leaf.dtype.itemsize for leaf in jax.tree.leaves(tree))


def step_memory(
    model: CLIP, state: State, mesh: Mesh | AbstractMesh, batch_size: int, micro_batches: int, *, tiled: bool
) -> Memory:
    """Of a step over ``batch_size`` pairs in so many micro-batches; ``state`` has shapes and shardings.

    ``tiled``: activations are padded to the tiles of a TPU.
    """
    pairs, tensor = batch_size // batch_shards(mesh), mesh.shape["tensor"]
    at_once = pairs // micro_batches
    parameters = bytes_per_device(state.params)
    inputs = _inputs(model, pairs, micro_batches, tiled)
    block = block_bytes(model, at_once, tensor, tiled=tiled)
    return Memory(
        parameters=parameters,
        optimizer=bytes_per_device(state) - parameters,
        # Accumulated: the sum so far, and the gradient of this micro-batch.
        gradients=parameters * min(micro_batches, 2),
        activations=kept_bytes(model, at_once, tensor, tiled=tiled),
        working=block + _gathered(model, state.params, mesh) + inputs,
        loss=_loss(model, batch_size, mesh) + inputs,
    )


def array_bytes(shape: tuple[int, ...], itemsize: int, *, tiled: bool) -> int:
    """Bytes of an array. A TPU pads two of its axes to tiles: those two, in whatever order, that this costs least.

    The 257 tokens of an L/14, as lanes, take the room of 384; with 128 pairs or more on a chip these are the lanes.
    """
    size = math.prod(shape) * itemsize
    if not tiled or len(shape) < 2:
        return size
    return int(size * min(_padding(a, SUBLANES) * _padding(b, LANES) for a, b in itertools.permutations(shape, 2)))


def _padding(size: int, multiple: int) -> float:
    """How many times as large an axis is when it is filled up to a multiple."""
    return -(-size // multiple) * multiple / size


def _inputs(model: CLIP, pairs: int, micro_batches: int, tiled: bool) -> int:
    """The batch's pixels and tokens; on a TPU the pixels once more in micro-batches, whose pairs are its lanes."""
    side, length = model.architecture.image.image_size, model.architecture.text.context_length
    pixels = array_bytes((pairs, side, side, 3), 1, tiled=tiled)
    if tiled and micro_batches > 1:
        pixels += int(pairs * side * side * 3 * _padding(pairs // micro_batches, LANES))
    return pixels + pairs * length * 4


@functools.lru_cache(maxsize=1024)
def kept_bytes(model: CLIP, pairs: int, tensor: int = 1, *, tiled: bool = False) -> int:
    """Bytes that the forward pass keeps for the backward pass: what JAX's own differentiation says.

    Parameters, which it keeps as well, are not counted again; what is cast from them once for all pairs neither.
    What ``offload`` sends to the host leaves the blocks' inputs, as ``full`` does.
    """
    if model.remat == "offload":
        model = replace(model, remat="full")
    if model.attend is cudnn:
        model = replace(model, attend=_fused)
    total = 0
    for few, many, itemsize in _kept(model):
        shape = tuple(a + (b - a) // FEW * (pairs - FEW) for a, b in zip(few, many, strict=True))
        total += array_bytes(shape, itemsize, tiled=tiled) // (tensor if _split(shape, model) else 1)
    return total


@functools.lru_cache(maxsize=256)
def _kept(model: CLIP) -> tuple[tuple[tuple[int, ...], tuple[int, ...], int], ...]:
    """(shape for few pairs, shape for twice as many, bytes of an element) of every array that grows with the pairs."""
    few, many = _differentiated(model, FEW), _differentiated(model, 2 * FEW)
    return tuple((a.shape, b.shape, a.dtype.itemsize) for a, b in zip(few, many, strict=True) if a.shape != b.shape)


def _differentiated(model: CLIP, pairs: int) -> list[jax.ShapeDtypeStruct]:
    params = nn.meta.unbox(jax.eval_shape(model.init, jax.random.key(0)))
    batch_stats = jax.eval_shape(model.init_batch_stats)
    image, text = model.architecture.image, model.architecture.text
    pixels = jax.ShapeDtypeStruct((pairs, image.image_size, image.image_size, 3), jnp.float32)
    tokens = jax.ShapeDtypeStruct((pairs, text.context_length), jnp.int32)

    def backward(params, batch_stats, pixels, tokens):
        keys = jax.random.split(jax.random.key(0), pairs)

        def embed(params):
            return model.forward(params, batch_stats, pixels, tokens, train=True, keys=keys)[:2]

        return jax.vjp(embed, params)[1]

    return jax.tree.leaves(jax.eval_shape(backward, params, batch_stats, pixels, tokens))


@functools.partial(jax.custom_vjp, nondiff_argnums=(3,))
def _fused(query: Heads, key: Heads, value: Heads, causal: bool) -> Heads:
    """Keeps for the backward pass what cuDNN's kernel does, which cannot be traced on a machine without CUDA."""
    return value


def _fused_forward(query: Heads, key: Heads, value: Heads, causal: bool) -> tuple[Heads, tuple[Array, ...]]:
    sums_of_exponentials = jnp.sum(query.astype(jnp.float32), axis=-1)
    mixed = value * 1
    padded = mixed * 1 if value.shape[1] % 2 else mixed  # an odd length is cut from it
    return mixed, (query, key, value, padded, sums_of_exponentials)


_fused.defvjp(_fused_forward, lambda causal, kept, gradient: (gradient,) * 3)


def _split(shape: tuple[int, ...], model: CLIP) -> bool:
    """Whether an activation has an axis that tensor parallelism divides: heads, or the width of an MLP."""
    towers = (model.architecture.image, model.architecture.text)
    sizes = {size for t in towers if not isinstance(t, ResNetTower) for size in (t.heads, t.mlp_width)}
    return any(size in sizes for size in shape[2:])


def block_bytes(model: CLIP, pairs: int, tensor: int = 1, *, tiled: bool = False) -> int:
    """What one block keeps when it recomputes: the larger of an image block's and a text block's; 0 without remat."""
    if model.remat == "none":
        return 0
    image, text = model.architecture.image, model.architecture.text
    towers = [tower for tower in (image, text) if not isinstance(tower, ResNetTower)]
    return max(_transformer_block(tower, model, pairs, tensor, tiled) for tower in towers)


def tokens_of(tower: ImageTower | TextTower) -> int:
    """How long the sequence is that a tower's blocks work on."""
    return tower.tokens if isinstance(tower, ImageTower) else tower.context_length


def _transformer_block(tower: ImageTower | TextTower, model: CLIP, pairs: int, tensor: int, tiled: bool) -> int:
    """Attention logits and weights, unless a fused kernel has them for itself; queries, keys, values and their mix; the
    MLP before and after its activation."""
    size, tokens = jnp.dtype(model.dtype).itemsize, tokens_of(tower)

    def held(*shape):
        return array_bytes((pairs, *shape), 1, tiled=tiled)

    attention = 0 if model.attend is cudnn else held(tower.heads, tokens, tokens) * (FLOAT32 + size)
    wide = 4 * held(tokens, tower.heads, tower.width // tower.heads) * size + 3 * held(tokens, tower.mlp_width) * size
    return (attention + wide) // tensor + held(tokens, tower.width) * (2 * FLOAT32 + 2 * size)


def _gathered(model: CLIP, params: Params, mesh: Mesh | AbstractMesh) -> int:
    """Weights gathered for use: one block's and, while it computes, the next one's; the largest that is no block's."""
    if mesh.shape["fsdp"] == 1:
        return 0
    size, tensor = jnp.dtype(model.dtype).itemsize, mesh.shape["tensor"]
    blocks = 0
    for tower in ("image", "text"):
        stacked = params[tower].get("transformer", {}).get("blocks", {})
        layers = getattr(model.architecture, tower).layers if stacked else 1
        blocks = max(blocks, sum(leaf.size for leaf in jax.tree.leaves(stacked)) * size // layers // tensor)
    embedding = params["text"]["token_embedding"]
    return 2 * blocks + sum(leaf.size for leaf in jax.tree.leaves(embedding)) * FLOAT32 // tensor


def _loss(model: CLIP, batch_size: int, mesh: Mesh | AbstractMesh) -> int:
    """The batch's own embeddings and gradients; a grid column's texts, their float32 gradient (``losses/tile.py``)."""
    own, texts = batch_size // batch_shards(mesh), batch_size // grid_shape(model, batch_size, mesh)[1]
    size = jnp.dtype(model.dtype).itemsize
    return model.architecture.embed_dim * (8 * FLOAT32 * own + (size + FLOAT32) * texts) + LOGITS


def grid_shape(model: CLIP, batch_size: int, mesh: Mesh | AbstractMesh) -> tuple[int, int]:
    """Rows and columns of the grid of tiles, as ``losses.tile.grid_of`` makes it."""
    shards, size = batch_shards(mesh), jnp.dtype(model.dtype).itemsize
    rows = grid_rows(shards, batch_size, model.architecture.embed_dim, size)
    return rows, shards // rows


def undivided(state: State, mesh: Mesh | AbstractMesh) -> int:
    """Bytes of parameters that the fsdp axis ought to divide and does not, for their width is no multiple of it."""
    if mesh.shape["fsdp"] == 1:
        return 0
    whole = [
        leaf for leaf in jax.tree.leaves(state.params) if "fsdp" not in _axes(leaf.sharding.spec) and leaf.ndim > 1
    ]
    return bytes_per_device(whole)


def _axes(spec: PartitionSpec) -> set[str]:
    return {axis for part in spec if part for axis in ((part,) if isinstance(part, str) else part)}
