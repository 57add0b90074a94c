"""How much memory a training step needs on one device, reckoned from shapes and shardings; nothing is compiled.

The compiler knows better (``compiling.py``): it shares buffers, pads tiles and keeps or drops what it likes. This is
the estimate that orders what is worth compiling, and all there is for a GPU.
"""

import functools
import math
from collections import Counter
from dataclasses import replace
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax.sharding import AbstractMesh, Mesh, PartitionSpec

from clip_jax.models.clip import CLIP, Params
from clip_jax.models.resnet import ResNetTower
from clip_jax.models.text import TextTower
from clip_jax.models.vit import ImageTower
from clip_jax.sharding import batch_shards
from clip_jax.training.state import State

FLOAT32 = 4
LOGITS = 4 * 8 * 2**20
"""Some copies of the block of logits that exists at one time."""


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


def step_memory(model: CLIP, state: State, mesh: Mesh | AbstractMesh, batch_size: int, micro_batches: int) -> Memory:
    """Of a step over ``batch_size`` pairs in so many micro-batches; ``state`` has shapes and shardings."""
    pairs = batch_size // batch_shards(mesh)
    at_once = pairs // micro_batches
    parameters = bytes_per_device(state.params)
    kept = kept_bytes_per_pair(model, mesh.shape["tensor"])
    inputs = model.architecture.image.image_size**2 * 3 + model.architecture.text.context_length * 4
    working = at_once * block_bytes_per_pair(model, mesh.shape["tensor"]) + _gathered(model, state.params, mesh)
    return Memory(
        parameters=parameters,
        optimizer=bytes_per_device(state) - parameters,
        # Accumulated: the sum so far, and the gradient of this micro-batch.
        gradients=parameters * min(micro_batches, 2),
        activations=at_once * kept,
        working=working + pairs * inputs,
        loss=_loss(model.architecture.embed_dim, batch_size, mesh) + pairs * inputs,
    )


@functools.lru_cache(maxsize=256)
def kept_bytes_per_pair(model: CLIP, tensor: int = 1) -> int:
    """Bytes that the forward pass keeps for the backward pass, for one pair: what JAX's own differentiation says.

    Parameters, which it keeps as well, are not counted again; what is cast from them once for all pairs neither.
    What ``offload`` sends to the host leaves the blocks' inputs, as ``full`` does.
    """
    if model.remat == "offload":
        return kept_bytes_per_pair(replace(model, remat="full"), tensor)
    few, many = 7, 14  # no size of a model: what has the shape of a parameter is taken for one
    return (_kept(model, many, tensor) - _kept(model, few, tensor)) // (many - few)


def _kept(model: CLIP, pairs: int, tensor: int) -> int:
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

    kept = jax.tree.leaves(jax.eval_shape(backward, params, batch_stats, pixels, tokens))
    already = Counter((leaf.shape, leaf.dtype) for leaf in jax.tree.leaves(params))
    total = 0
    for leaf in kept:
        if already[leaf.shape, leaf.dtype] > 0:
            already[leaf.shape, leaf.dtype] -= 1
            continue
        total += leaf.size * leaf.dtype.itemsize // (tensor if _split(leaf, model) else 1)
    return total


def _split(leaf: Any, model: CLIP) -> bool:
    """Whether an activation has an axis that tensor parallelism divides: heads, or the width of an MLP."""
    towers = (model.architecture.image, model.architecture.text)
    sizes = {size for t in towers if not isinstance(t, ResNetTower) for size in (t.heads, t.mlp_width)}
    return any(size in sizes for size in leaf.shape[2:])


def block_bytes_per_pair(model: CLIP, tensor: int = 1) -> int:
    """What one block keeps when it recomputes: the larger of an image block's and a text block's; 0 without remat."""
    if model.remat == "none":
        return 0
    image, text = model.architecture.image, model.architecture.text
    towers = [tower for tower in (image, text) if not isinstance(tower, ResNetTower)]
    return max(_transformer_block(tower, model.dtype, tensor) for tower in towers)


def tokens_of(tower: ImageTower | TextTower) -> int:
    """How long the sequence is that a tower's blocks work on."""
    return tower.tokens if isinstance(tower, ImageTower) else tower.context_length


def _transformer_block(tower: ImageTower | TextTower, dtype: Any, tensor: int) -> int:
    """Attention logits and weights; queries, keys, values and their mix; the MLP before and after its activation."""
    size, tokens = jnp.dtype(dtype).itemsize, tokens_of(tower)
    attention = tower.heads * tokens**2 * (FLOAT32 + size)
    wide = tokens * (4 * tower.width + 3 * tower.mlp_width) * size
    return (attention + wide) // tensor + tokens * tower.width * (2 * FLOAT32 + 2 * size)


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


def _loss(embed_dim: int, batch_size: int, mesh: Mesh | AbstractMesh) -> int:
    """The batch's own embeddings and gradients; a grid column's texts and their gradient (``losses/tile.py``)."""
    own, texts = batch_size // batch_shards(mesh), batch_size // grid_shape(mesh)[1]
    return FLOAT32 * embed_dim * (8 * own + 2 * texts) + LOGITS


def grid_shape(mesh: Mesh | AbstractMesh) -> tuple[int, int]:
    """Rows and columns of the grid of tiles, as ``losses.tile.grid_of`` makes it."""
    shards = batch_shards(mesh)
    rows = max(r for r in range(1, int(shards**0.5) + 1) if shards % r == 0)
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
