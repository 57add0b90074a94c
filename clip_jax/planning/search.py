"""When a run does not fit: the settings nearest to it that do, with as few compilations as possible.

What may change is only how the same run is computed: micro-batch, rematerialisation, and how many devices share the
parameters. Candidates are ordered by the time their step must take, by the estimate of their memory most are never
compiled, and every compilation corrects the estimate for the next.
"""

import itertools
from collections.abc import Callable
from typing import Any, NamedTuple

from jax.sharding import AbstractMesh
from ml_collections import ConfigDict

from clip_jax import config as configs
from clip_jax.errors import UserError
from clip_jax.hardware import Machines
from clip_jax.planning.compiling import Compiled
from clip_jax.planning.memory import Memory, step_memory
from clip_jax.planning.parts import Parts, make_parts
from clip_jax.planning.roofline import Roofline, roofline
from clip_jax.planning.work import Work, step_work
from clip_jax.sharding import AXES, mesh_shape
from clip_jax.training.state import State

REMAT = ("none", "dots", "named", "full")
"""Policies that the search tries, not ``offload``: how fast a host takes activations is not in the chip table."""
SHARED_BY = (8, 16, 32, 64, 128, 256)
"""Sizes of the fsdp axis that the search tries besides the config's own."""

Settings = dict[str, Any]


class Candidate(NamedTuple):
    """A way to compute the run, with what is reckoned of it; nothing of it is compiled yet."""

    changes: Settings
    """What it changes in the config."""
    parts: Parts
    memory: Memory
    work: Work
    roofline: Roofline


Compile = Callable[[Candidate], Compiled]


class Found(NamedTuple):
    """A candidate that fits, and everything that was compiled on the way to it."""

    candidate: Candidate | None
    compiled: Compiled | None
    tried: list[tuple[Settings, Compiled]]


def reckon(
    config: ConfigDict, machines: Machines, changes: Settings | None = None, state: State | None = None
) -> Candidate:
    """The estimates for a config with some changes. Raises UserError where the batch does not divide over the mesh.

    ``state`` may be that of another candidate with the same mesh.
    """
    changes = changes or {}
    if changes:
        config = configs.override(config, {key: str(value) for key, value in changes.items()}, "the plan")
    mesh = abstract_mesh(config, machines)
    parts = make_parts(config, mesh, state)
    memory, unpadded = (
        step_memory(parts.model, parts.state, mesh, config.batch_size, parts.micro_batches, tiled=tiled)
        for tiled in (machines.chip.is_tpu, False)
    )
    work = step_work(
        parts.model,
        parts.state,
        mesh,
        unpadded,  # no tile need travel that holds nothing: times are bounds from below
        batch_size=config.batch_size,
        micro_batches=parts.micro_batches,
        loss_name=config.loss.name,
        slices=machines.slices,
    )
    return Candidate(changes, parts, memory, work, roofline(work, machines))


def abstract_mesh(config: ConfigDict, machines: Machines) -> AbstractMesh:
    """The run's mesh without its devices."""
    sizes = config.mesh
    if sizes.slices not in (configs.AUTO, machines.slices):
        raise UserError(f"config.mesh.slices={sizes.slices} and --slices={machines.slices}: leave the setting at -1")
    if machines.slices > 1 and machines.chip.is_tpu:
        data = mesh_shape(sizes.data, sizes.fsdp, sizes.tensor, machines.devices)[0]
        if data % machines.slices:
            raise UserError(
                f"config.mesh.data={data} does not divide over {machines.slices} slices; "
                "fsdp and tensor lie inside a slice: set mesh.data=-1 and a smaller mesh.fsdp"
            )
    return AbstractMesh(mesh_shape(sizes.data, sizes.fsdp, sizes.tensor, machines.devices), AXES)


def candidates(config: ConfigDict, machines: Machines) -> list[Candidate]:
    """Every other way to compute the run, the fastest first; of equals the one that changes least."""
    given = reckon(config, machines)
    shape = given.parts.mesh.shape
    pairs = config.batch_size // (shape["data"] * shape["fsdp"])
    micro = [n for n in (2**i for i in range(20)) if pairs % n == 0]
    fsdp = [size for size in SHARED_BY if size * shape["tensor"] <= machines.devices // machines.slices]
    found, states = [], {shape["fsdp"]: given.parts.state}
    for parts, remat, shared in itertools.product(micro, REMAT, sorted({shape["fsdp"], *fsdp})):
        micro_batch = configs.AUTO if parts == 1 else config.batch_size // parts
        mesh = {} if shared == shape["fsdp"] else {"mesh.data": configs.AUTO, "mesh.fsdp": shared}
        wanted = {"micro_batch": micro_batch, "model.remat": remat} | mesh
        flat = configs.flatten(config)
        changes = {key: value for key, value in wanted.items() if flat[key] != value}
        if changes and machines.devices % (shared * shape["tensor"]) == 0:
            candidate = reckon(config, machines, changes, states.get(shared))
            states[shared] = candidate.parts.state
            found.append(candidate)
    return sorted(found, key=lambda c: (c.roofline.serial, len(c.changes)))


def search(given: Candidate, machines: Machines, compile: Compile, *, compilations: int) -> Found:
    """The config as it is, if it fits, or the nearest that does; at most so many compilations."""
    free = machines.chip.free_hbm_per_device
    compiled = compile(given)
    tried = [({}, compiled)]
    if compiled.fits:
        return Found(given, compiled, tried)
    # How far the compiler is from the estimate, by policy: what XLA keeps of one policy's activations says little of
    # another's. A policy that was never compiled is believed.
    factors = {given.parts.model.remat: compiled.hbm_bytes / given.memory.total}
    left = candidates(given.parts.config, machines)
    while len(tried) < compilations:
        likely = (c for c in left if c.memory.total * factors.get(c.parts.model.remat, 1.0) <= free)
        candidate = next(likely, None)
        if candidate is None:
            break
        left.remove(candidate)
        compiled = compile(candidate)
        tried.append((candidate.changes, compiled))
        if compiled.fits:
            return Found(candidate, compiled, tried)
        factors[candidate.parts.model.remat] = compiled.hbm_bytes / candidate.memory.total
    return Found(None, None, tried)
