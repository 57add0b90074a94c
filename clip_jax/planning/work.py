"""What a training step has to do on one device: FLOPs, bytes to and from its memory, bytes to and from other devices.

All are the least that the step as it is written can do, so that times reckoned from them are bounds from below.
"""

import math
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.sharding import AbstractMesh, Mesh, PartitionSpec

from clip_jax.models import flops
from clip_jax.models.attention import cudnn
from clip_jax.models.clip import CLIP
from clip_jax.models.resnet import ResNetTower
from clip_jax.planning.memory import FLOAT32, Memory, grid_shape, tokens_of
from clip_jax.planning.program import Collective
from clip_jax.sharding import batch_shards
from clip_jax.training.state import State

LOSS_PASSES = {"softmax": 4, "sigmoid": 3}
"""Products of a tile's size: softmax makes its logits twice and two gradients from them, sigmoid makes them once."""


class Transfer(NamedTuple):
    """What one device receives in a step, and sends as much of: inside its slice (ICI), and from other slices (DCN)."""

    what: str
    ici_bytes: int
    dcn_bytes: int = 0


class Work(NamedTuple):
    """Of one step, on one device."""

    model_flops: int
    """Forward and backward of the towers: what MFU counts."""
    flops: int
    """With what is computed again (remat, micro-batches) and the loss."""
    hbm_bytes: int
    transfers: tuple[Transfer, ...]

    @property
    def ici_bytes(self) -> int:
        return sum(t.ici_bytes for t in self.transfers)

    @property
    def dcn_bytes(self) -> int:
        return sum(t.dcn_bytes for t in self.transfers)


def step_work(
    model: CLIP,
    state: State,
    mesh: Mesh | AbstractMesh,
    memory: Memory,
    *,
    batch_size: int,
    micro_batches: int,
    loss_name: str,
    slices: int,
) -> Work:
    """Of the whole step; ``state`` has shapes and shardings, ``memory`` is the step's."""
    pairs, tensor = batch_size // batch_shards(mesh), mesh.shape["tensor"]
    passes = 1 + (micro_batches > 1)  # forward passes that are written as such
    repeated = repeated_flops(model) + (sum(flops.forward(model.architecture).values()) if micro_batches > 1 else 0)
    loss = LOSS_PASSES[loss_name] * 2 * pairs * batch_size * model.architecture.embed_dim
    model_flops = pairs * flops.training(model.architecture) // tensor
    return Work(
        model_flops=model_flops,
        flops=model_flops + pairs * repeated // tensor + loss,
        hbm_bytes=_hbm(model, memory, micro_batches, passes),
        transfers=tuple(
            t
            for t in (
                *_parameters(model, state, mesh, micro_batches, passes, slices),
                _activations(model, mesh, pairs, passes),
                _loss(model, mesh, batch_size, loss_name, slices),
            )
            if t.ici_bytes or t.dcn_bytes
        ),
    )


def repeated_flops(model: CLIP) -> int:
    """FLOPs that rematerialisation repeats for one pair.

    ``full`` repeats a block but its last product, which no gradient needs; ``dots`` keeps what the weights made and
    repeats the attention's own two products; ``named`` and ``offload`` keep what goes into the attention and comes out
    of it, and repeat its logits and what follows it. cuDNN's attention makes its logits once more than XLA's.
    """
    total = 0
    for tower in (model.architecture.image, model.architecture.text):
        if isinstance(tower, ResNetTower):
            continue
        tokens, width = tokens_of(tower), tower.width
        logits = 2 * tokens**2 * width
        after = 2 * tokens * width * (width + (2 if tower.block.swiglu else 1) * tower.mlp_width)
        queries_keys_values = 2 * tokens * width * 3 * width
        total += (
            tower.layers
            * {
                "none": 0,
                "dots": 2 * logits,
                "named": logits + after,
                "offload": logits + after,
                "full": 2 * logits + queries_keys_values + after,
            }[model.remat]
        )
        total += tower.layers * logits * (model.attend is cudnn)
    return total


def _hbm(model: CLIP, memory: Memory, micro_batches: int, passes: int) -> int:
    """The state is read and written, gradients written and read, kept activations too; each pass reads the weights."""
    size = jnp.dtype(model.dtype).itemsize
    repeats = passes + 1 + (model.remat != "none")
    weights = memory.parameters // FLOAT32 * size * repeats * micro_batches
    return 2 * memory.state + 2 * memory.gradients + 2 * memory.activations * micro_batches + weights


def _parameters(
    model: CLIP, state: State, mesh: Mesh | AbstractMesh, micro_batches: int, passes: int, slices: int
) -> list[Transfer]:
    """Weights gathered along fsdp in each pass and gradients scattered back; gradients summed over the other devices.

    Weights and their gradients travel in the compute type, once for each micro-batch.
    """
    size, fsdp = jnp.dtype(model.dtype).itemsize, mesh.shape["fsdp"]
    divided = whole = 0
    for leaf in jax.tree.leaves(state.params):
        shard = math.prod(leaf.sharding.shard_shape(leaf.shape))
        if _is_divided(leaf.sharding.spec):
            divided += shard
        else:
            whole += shard
    data = mesh.shape["data"]
    gathered = micro_batches * (passes + 1) * (fsdp - 1) * divided * size
    scattered = micro_batches * (fsdp - 1) * divided * size
    ici, dcn = 0, 0
    for count, members in ((divided, data), (whole, data * fsdp)):
        across = crossing(2 * count * size, members, slices)
        dcn += across
        ici += 2 * (members - 1) * count * size // members - across
    return [
        Transfer("weights gathered along fsdp", gathered),
        Transfer("gradients scattered along fsdp", scattered),
        Transfer("gradients summed over the batch", micro_batches * ici, micro_batches * dcn),
    ]


def _activations(model: CLIP, mesh: Mesh | AbstractMesh, pairs: int, passes: int) -> Transfer:
    """Tensor parallelism sums the outputs of attention and MLP in each pass, and their inputs' gradients backward."""
    tensor, size = mesh.shape["tensor"], jnp.dtype(model.dtype).itemsize
    sums = 2 * passes + 2 + (model.remat == "full")
    one = sum(
        tower.layers * tokens_of(tower) * tower.width * size
        for tower in (model.architecture.image, model.architecture.text)
        if not isinstance(tower, ResNetTower)
    )
    return Transfer("activations summed along tensor", sums * pairs * one * 2 * (tensor - 1) // tensor)


def _loss(model: CLIP, mesh: Mesh | AbstractMesh, batch_size: int, loss_name: str, slices: int) -> Transfer:
    """Images and their gradients go around a row of the grid; texts are gathered along a column, their gradients
    scattered back.

    The softmax sends its images around again in its backward pass. Slices divide the rows: texts come from all of them.
    """
    rows, columns = grid_shape(model, batch_size, mesh)
    embedding = jnp.dtype(model.dtype).itemsize * model.architecture.embed_dim
    circles = 3 if loss_name == "softmax" else 2
    images = circles * batch_size // rows * embedding if columns > 1 else 0
    texts = 2 * batch_size // columns * embedding
    dcn = crossing(texts, rows, min(slices, rows))
    return Transfer("embeddings and their gradients", images + texts * (rows - 1) // rows - dcn, dcn)


def crossing(size: int, members: int, slices: int) -> int:
    """Bytes that each of a group's members gets from other slices when ``size`` bytes are gathered, or summed.

    What comes from another slice comes once, and goes around inside the slice then.
    """
    return size * (slices - 1) // slices // (members // slices)


def compiled_transfers(collectives: list[Collective], coordinates: list[tuple[int, ...]]) -> tuple[Transfer, ...]:
    """What a compiled program moves, by kind; ``coordinates`` are of the mesh's devices, their slice's number first.

    What a group's devices get from other slices comes over DCN, once for all of them that are in the same slice.
    """
    totals: dict[str, list[int]] = {}
    for collective in collectives:
        group = collective.groups[0] if collective.groups else (0,)
        slices = len({coordinates[device][0] for device in group})
        passes = 2 if collective.kind == "all-reduce" else 1
        dcn = crossing(collective.times * passes * collective.bytes, len(group), slices)
        if collective.kind == "collective-permute":
            dcn = collective.traffic if slices > 1 else 0
        entry = totals.setdefault(collective.kind, [0, 0])
        entry[0] += collective.traffic - dcn
        entry[1] += dcn
    return tuple(Transfer(kind, *both) for kind, both in sorted(totals.items(), key=lambda item: -sum(item[1])))


def _is_divided(spec: PartitionSpec) -> bool:
    return any("fsdp" in ((part,) if isinstance(part, str) else part) for part in spec if part)
