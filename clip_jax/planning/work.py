"""The work of a training step on one device: FLOPs, bytes to and from its memory, bytes to and from other devices.

All are lower bounds of the step as it is written, so that times estimated from them are lower bounds too.
"""

import math
from collections.abc import Collection
from dataclasses import replace
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.sharding import AbstractMesh, Mesh, PartitionSpec

from clip_jax.devices.sharding import batch_shards
from clip_jax.models import flops
from clip_jax.models.attention import xla
from clip_jax.models.clip import CLIP, Params
from clip_jax.objectives.cost import Transfer, crossing
from clip_jax.planning.memory import FLOAT32, Memory, objectives_cost
from clip_jax.planning.program import Collective
from clip_jax.training.learner import Learner
from clip_jax.training.state import TrainState, select


class Work(NamedTuple):
    """The work of one step on one device."""

    model_flops: int
    """The towers' forward and backward pass: what MFU counts."""
    flops: int
    """All FLOPs, with recomputation (remat, micro-batches) and the objectives."""
    hbm_bytes: int
    transfers: tuple[Transfer, ...]

    @property
    def ici_bytes(self) -> int:
        return sum(t.ici_bytes for t in self.transfers)

    @property
    def dcn_bytes(self) -> int:
        return sum(t.dcn_bytes for t in self.transfers)


def step_work(learner: Learner, state: TrainState, memory: Memory, *, batch_size: int, slices: int) -> Work:
    """The whole step; ``state`` has shapes and shardings, ``memory`` is the step's."""
    model = replace(learner.model, architecture=learner.trained_architecture)
    mesh, micro_batches = learner.mesh, learner.micro_batches
    pairs, tensor = batch_size // batch_shards(mesh), mesh.shape["tensor"]
    passes = 1 + (micro_batches > 1)  # forward passes that are written as such
    frozen = learner.frozen_towers
    repeated = repeated_flops(model, frozen) + (
        sum(flops.forward(model.architecture).values()) if micro_batches > 1 else 0
    )
    cost = objectives_cost(learner, batch_size, slices)
    model_flops = pairs * flops.training(model.architecture, frozen) // tensor
    trained = select(state.params, learner.frozen, trainable=True)
    transfers = (
        *_parameters(model, state.params, trained, mesh, micro_batches, passes, slices),
        _activations(model, mesh, pairs, passes),
        *cost.transfers,
    )
    return Work(
        model_flops=model_flops,
        flops=model_flops + pairs * repeated // tensor + cost.flops + learner.update_flops(trained),
        hbm_bytes=_hbm(model, memory, micro_batches, passes),
        transfers=tuple(transfer for transfer in transfers if transfer.ici_bytes or transfer.dcn_bytes),
    )


def repeated_flops(model: CLIP, frozen: Collection[str] = ()) -> int:
    """FLOPs that rematerialization repeats for one pair; in ``frozen`` towers nothing is."""
    towers = (("image", model.architecture.image), ("text", model.architecture.text))
    fused = model.compute.attend is not xla
    return sum(
        flops.repeated(tower, model.compute.remat, fused=fused)
        for name, tower in towers
        if tower.block is not None and name not in frozen
    )


def _hbm(model: CLIP, memory: Memory, micro_batches: int, passes: int) -> int:
    """The state is read and written, gradients and saved activations written and read; each pass reads the weights."""
    size = jnp.dtype(model.compute.dtype).itemsize
    repeats = passes + 1 + (model.compute.remat != "none")
    weights = memory.parameters // FLOAT32 * size * repeats * micro_batches
    return 2 * memory.state + 2 * memory.gradients + 2 * memory.activations * micro_batches + weights


def _parameters(
    model: CLIP,
    params: Params,
    trained: Params,
    mesh: Mesh | AbstractMesh,
    micro_batches: int,
    passes: int,
    slices: int,
) -> list[Transfer]:
    """Weights gathered along fsdp in each pass and gradients scattered back; gradients summed over the other devices.

    Weights and their gradients travel in the compute type, once for each micro-batch.
    """
    size, fsdp = jnp.dtype(model.compute.dtype).itemsize, mesh.shape["fsdp"]
    divided, replicated = _shards(trained)
    data = mesh.shape["data"]
    gathered = micro_batches * (passes * _shards(params)[0] + divided) * (fsdp - 1) * size
    scattered = micro_batches * (fsdp - 1) * divided * size
    ici, dcn = 0, 0
    for count, members in ((divided, data), (replicated, data * fsdp)):
        across = crossing(2 * count * size, members, slices)
        dcn += across
        ici += 2 * (members - 1) * count * size // members - across
    return [
        Transfer("weights gathered along fsdp", gathered),
        Transfer("gradients scattered along fsdp", scattered),
        Transfer("gradients summed over the batch", micro_batches * ici, micro_batches * dcn),
    ]


def _shards(params: Params) -> tuple[int, int]:
    """The elements on one device of the parameters that fsdp divides, and of the others."""
    divided = replicated = 0
    for leaf in jax.tree.leaves(params):
        shard = math.prod(leaf.sharding.shard_shape(leaf.shape))
        if _is_divided(leaf.sharding.spec):
            divided += shard
        else:
            replicated += shard
    return divided, replicated


def _activations(model: CLIP, mesh: Mesh | AbstractMesh, pairs: int, passes: int) -> Transfer:
    """Tensor parallelism sums the outputs of attention and MLP in each pass, and their inputs' gradients backward."""
    tensor, size = mesh.shape["tensor"], jnp.dtype(model.compute.dtype).itemsize
    sums = 2 * passes + 2 + (model.compute.remat == "full")
    one = sum(tower.layers * tower.tokens * tower.width * size for tower in model.architecture.transformers)
    return Transfer("activations summed along tensor", sums * pairs * one * 2 * (tensor - 1) // tensor)


def compiled_transfers(collectives: list[Collective], coordinates: list[tuple[int, ...]]) -> tuple[Transfer, ...]:
    """The traffic of a compiled program by kind of collective; ``coordinates`` are the devices', slice number first.

    What a group receives from another slice crosses DCN once for all of its devices in a slice.
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
