"""An estimate of the memory of a training step on one device, from shapes and shardings; nothing is compiled.

The compiler knows better (``compiling.py``): it shares buffers, pads tiles, and saves or recomputes as it chooses. The
estimate decides what is worth compiling, and is all there is for a GPU.
"""

import functools
import itertools
import math
from dataclasses import replace
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import AbstractMesh, Mesh, PartitionSpec
from jaxtyping import Array

from clip_jax.devices.sharding import batch_shards
from clip_jax.models.attention import Queries, cudnn, xla
from clip_jax.models.attention_tpu import TPUAttention
from clip_jax.models.clip import CLIP, Params
from clip_jax.models.text import TextTower
from clip_jax.models.vit import ImageTower
from clip_jax.objectives.cost import Cost
from clip_jax.training.learner import Learner
from clip_jax.training.state import TrainState, select

FLOAT32 = 4
SUBLANES, LANES = 8, 128
"""A TPU's tile: two axes of every array are padded to multiples of these."""
PROBE_PAIRS = 7
"""The towers are differentiated for this many pairs and for twice as many: the axis that differs is the batch."""


class Memory(NamedTuple):
    """Bytes on one device at the peak of a step."""

    parameters: int
    optimizer: int
    """Moments, EMAs of the parameters, and the objectives' state and constants."""
    gradients: int
    activations: int
    """Saved by the forward pass for the backward pass."""
    working: int
    """Exists while one block is computed: its recomputed activations, its gathered weights, and the batch."""
    loss: int

    @property
    def state(self) -> int:
        return self.parameters + self.optimizer

    @property
    def total(self) -> int:
        # With micro-batches, the loss is computed before activations are saved, so they share memory. Otherwise the
        # loss coexists with the activations, but not with the gradients: there this is an approximation.
        return self.state + self.gradients + max(self.activations + self.working, self.loss)


def bytes_per_device(tree: Any) -> int:
    """The bytes of a tree's shards on one device, from shapes and shardings."""
    return sum(math.prod(leaf.sharding.shard_shape(leaf.shape)) * leaf.dtype.itemsize for leaf in jax.tree.leaves(tree))


def objectives_cost(learner: Learner, batch_size: int, slices: int = 1) -> Cost:
    """The cost of all objectives of a step together."""
    costs = [
        objective.cost(batch_size=batch_size, micro_batches=learner.micro_batches, mesh=learner.mesh, slices=slices)
        for objective in learner.objectives.values()
    ]
    return Cost(
        flops=sum(cost.flops for cost in costs),
        activations=sum(cost.activations for cost in costs),
        across=sum(cost.across for cost in costs),
        working=max((cost.working for cost in costs), default=0),
        transfers=tuple(transfer for cost in costs for transfer in cost.transfers),
    )


def step_memory(learner: Learner, state: TrainState, batch_size: int, *, tiled: bool) -> Memory:
    """The memory of a learner's step over ``batch_size`` pairs; ``state`` has shapes and shardings.

    ``tiled``: activations are padded to the tiles of a TPU.
    """
    mesh, micro_batches = learner.mesh, learner.micro_batches
    model = without_mesh(learner.model)
    pairs, tensor = batch_size // batch_shards(mesh), mesh.shape["tensor"]
    at_once = pairs // micro_batches
    parameters = bytes_per_device(state.params)
    inputs = _inputs(learner, learner.ratio * pairs, tiled)
    block = block_bytes(model, at_once, tensor, tiled=tiled)
    cost = objectives_cost(learner, batch_size)
    options = dict(patch_dropout=learner.patch_dropout, tiled=tiled, frozen=learner.frozen_towers)
    saved = saved_bytes(model, at_once, tensor, **options)
    trained = bytes_per_device(select(state.params, learner.frozen, trainable=True))
    return Memory(
        parameters=parameters,
        optimizer=bytes_per_device(state) - parameters + bytes_per_device(learner.abstract_constants()),
        # In micro-batches: the sum so far, and the gradient of this one.
        gradients=trained * min(micro_batches, 2),
        activations=saved + cost.activations,
        working=block + cost.working + _gathered(model, state.params, mesh) + inputs,
        loss=cost.across + inputs,
    )


def without_mesh(model: CLIP) -> CLIP:
    """The same model for tracing shapes, which no mesh changes; so that one trace serves all meshes."""
    return replace(model, compute=model.compute._replace(mesh=None))


def array_bytes(shape: tuple[int, ...], itemsize: int, *, tiled: bool) -> int:
    """Bytes of an array. A TPU pads two of its axes to tiles: those two, in the order, that cost least.

    The 257 tokens of an L/14 as lanes take the space of 384; with 128 or more pairs on a chip, the pairs are the lanes.
    """
    size = math.prod(shape) * itemsize
    if not tiled or len(shape) < 2:
        return size
    return int(size * min(_padding(a, SUBLANES) * _padding(b, LANES) for a, b in itertools.permutations(shape, 2)))


def _padding(size: int, multiple: int) -> float:
    """The factor by which an axis grows when it is padded to a multiple."""
    return -(-size // multiple) * multiple / size


def _inputs(learner: Learner, pairs: int, tiled: bool) -> int:
    """The arrays of the batch; on a TPU the pixels once more in micro-batches, whose pairs are the lanes."""
    total = 0
    for view in learner.views.values():
        for shape, dtype in view.arrays.values():
            is_image = dtype == np.uint8
            total += array_bytes((pairs, *shape), dtype.itemsize, tiled=tiled and is_image)
            if is_image and tiled and learner.micro_batches > 1:
                total += int(pairs * math.prod(shape) * _padding(pairs // learner.micro_batches, LANES))
    return total


@functools.lru_cache(maxsize=1024)
def saved_bytes(
    model: CLIP,
    pairs: int,
    tensor: int = 1,
    *,
    patch_dropout: float = 0.0,
    tiled: bool = False,
    frozen: tuple[str, ...] = (),
) -> int:
    """Bytes that the forward pass saves for the backward pass, by JAX's own differentiation.

    Parameters, which are saved as well, are not counted again, and neither is what is cast from them once for all
    pairs. ``offload`` leaves the blocks' inputs on the device, as ``full`` does. ``frozen`` towers save nothing.
    """
    compute = model.compute
    if compute.remat == "offload":
        compute = compute._replace(remat="full")
    if compute.attend is cudnn:
        compute = compute._replace(attend=_fused_attention)
    if isinstance(compute.attend, TPUAttention):
        compute = compute._replace(attend=TPUAttention())  # a few pairs do not divide over the mesh
    model, total = replace(model, compute=compute), 0
    for few, many, itemsize in _saved(model, patch_dropout, frozen):
        shape = tuple(a + (b - a) // PROBE_PAIRS * (pairs - PROBE_PAIRS) for a, b in zip(few, many, strict=True))
        total += array_bytes(shape, itemsize, tiled=tiled) // (tensor if _is_split(shape, model) else 1)
    return total


@functools.lru_cache(maxsize=256)
def _saved(
    model: CLIP, patch_dropout: float, frozen: tuple[str, ...]
) -> tuple[tuple[tuple[int, ...], tuple[int, ...], int], ...]:
    """(shape for few pairs, shape for twice as many, bytes of an element) of every array that grows with the pairs."""
    few, many = (_differentiated(model, n * PROBE_PAIRS, patch_dropout, frozen) for n in (1, 2))
    return tuple((a.shape, b.shape, a.dtype.itemsize) for a, b in zip(few, many, strict=True) if a.shape != b.shape)


def _differentiated(
    model: CLIP, pairs: int, patch_dropout: float, frozen: tuple[str, ...]
) -> list[jax.ShapeDtypeStruct]:
    params = nn.meta.unbox(jax.eval_shape(model.init, jax.random.key(0)))
    batch_stats = jax.eval_shape(model.init_batch_stats)
    image, text = model.architecture.image, model.architecture.text
    batch = {
        "image": jax.ShapeDtypeStruct((pairs, image.image_size, image.image_size, 3), jnp.float32),
        "text": jax.ShapeDtypeStruct((pairs, text.context_length), jnp.int32),
    }

    def backward(params, batch_stats, batch):
        keys = jax.random.split(jax.random.key(0), pairs)

        def embed(trained):
            options = dict(train=True, keys=keys, patch_dropout=patch_dropout)
            return model.forward(params | trained, batch_stats, batch, **options)[:2]

        return jax.vjp(embed, {name: tree for name, tree in params.items() if name not in frozen})[1]

    return jax.tree.leaves(jax.eval_shape(backward, params, batch_stats, batch))


def _fused_attention(query: Queries, key: Queries, value: Queries, *, causal: bool, mask: None) -> Queries:
    return _fused(query, key, value)


@jax.custom_vjp
def _fused(query: Queries, key: Queries, value: Queries) -> Queries:
    """Saves what cuDNN's kernel saves for its backward pass; the kernel cannot be traced on a machine without CUDA."""
    return value


def _fused_forward(query: Queries, key: Queries, value: Queries) -> tuple[Queries, tuple[Array, ...]]:
    sums_of_exponentials = jnp.sum(query.astype(jnp.float32), axis=-1)
    mixed = value * 1
    padded = mixed * 1 if value.shape[1] % 2 else mixed  # an odd length is sliced from it
    return mixed, (query, key, value, padded, sums_of_exponentials)


_fused.defvjp(_fused_forward, lambda saved, gradient: (gradient,) * 3)


def _is_split(shape: tuple[int, ...], model: CLIP) -> bool:
    """Whether an activation has an axis that tensor parallelism divides: heads, or the width of an MLP."""
    sizes = {size for tower in model.architecture.transformers for size in (tower.heads, tower.mlp_width)}
    return any(size in sizes for size in shape[2:])


def block_bytes(model: CLIP, pairs: int, tensor: int = 1, *, tiled: bool = False) -> int:
    """What one block recomputes at a time: the larger of an image block and a text block; 0 without remat."""
    if model.compute.remat == "none":
        return 0
    return max(_transformer_block(tower, model, pairs, tensor, tiled) for tower in model.architecture.transformers)


def _transformer_block(tower: ImageTower | TextTower, model: CLIP, pairs: int, tensor: int, tiled: bool) -> int:
    """Attention logits and weights, unless a fused kernel keeps them on chip; queries, keys, values and the attention's
    output; the MLP before and after its activation."""
    size, tokens = jnp.dtype(model.compute.dtype).itemsize, tower.tokens

    def allocated(*shape: int) -> int:
        return array_bytes((pairs, *shape), 1, tiled=tiled)

    attention = allocated(tower.heads, tokens, tokens) * (FLOAT32 + size) * (model.compute.attend is xla)
    heads, mlp = allocated(tokens, tower.heads, tower.width // tower.heads), allocated(tokens, tower.mlp_width)
    wide = 4 * heads * size + 3 * mlp * size
    return (attention + wide) // tensor + allocated(tokens, tower.width) * (2 * FLOAT32 + 2 * size)


def _gathered(model: CLIP, params: Params, mesh: Mesh | AbstractMesh) -> int:
    """Weights gathered for use: one block's and, while it computes, the next one's; the largest outside the blocks."""
    if mesh.shape["fsdp"] == 1:
        return 0
    size, tensor = jnp.dtype(model.compute.dtype).itemsize, mesh.shape["tensor"]
    blocks = 0
    for tower in ("image", "text"):
        stacked = params[tower].get("transformer", {}).get("blocks", {})
        layers = getattr(model.architecture, tower).layers if stacked else 1
        blocks = max(blocks, sum(leaf.size for leaf in jax.tree.leaves(stacked)) * size // layers // tensor)
    embedding = params["text"]["token_embedding"]
    return 2 * blocks + sum(leaf.size for leaf in jax.tree.leaves(embedding)) * FLOAT32 // tensor


def unsharded_bytes(state: TrainState, mesh: Mesh | AbstractMesh) -> int:
    """Bytes of parameters that the fsdp axis should divide and does not, because their width is no multiple of it."""
    if mesh.shape["fsdp"] == 1:
        return 0
    full_size = [
        leaf for leaf in jax.tree.leaves(state.params) if "fsdp" not in _axes(leaf.sharding.spec) and leaf.ndim > 1
    ]
    return bytes_per_device(full_size)


def _axes(spec: PartitionSpec) -> set[str]:
    return {axis for part in spec if part for axis in ((part,) if isinstance(part, str) else part)}
