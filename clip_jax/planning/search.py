"""When a run does not fit: the nearest settings that do, with as few compilations as possible.

Only how the run is computed may change: micro-batch, rematerialization, and the number of devices that share the
parameters. Candidates are ordered by their corrected roofline; the estimate of their memory rules out most without a
compilation, and every compilation corrects both estimates for the next. Those that fit are ranked by the compiler's
cycles.
"""

import itertools
from collections.abc import Callable
from typing import Any, NamedTuple

from jax.sharding import AbstractDevice, AbstractMesh
from ml_collections import ConfigDict

from clip_jax import config as configs
from clip_jax.devices.hardware import Machines
from clip_jax.devices.sharding import AXES, mesh_shape
from clip_jax.errors import UserError
from clip_jax.models.attention_choice import Choice, choose_attention
from clip_jax.planning.compiling import Compiled
from clip_jax.planning.cycles import clock
from clip_jax.planning.memory import Memory, step_memory
from clip_jax.planning.roofline import Roofline, roofline
from clip_jax.planning.work import Work, step_work
from clip_jax.training.learner import Learner
from clip_jax.training.setup import make_learner
from clip_jax.training.state import TrainState

REMAT = ("none", "dots", "named", "full")
"""Policies that the search tries; not ``offload``: the chip table has no bandwidth between a chip and its host."""
FSDP_SIZES = (8, 16, 32, 64, 128, 256)
"""Sizes of the fsdp axis that the search tries besides the config's own."""

FITTING = 3
"""Candidates that fit are compiled until there are this many, and the fastest is taken."""

SLOWDOWN = {"compute": 2.4}
"""The compiler's time relative to the peak rate of the resource under which the plan counts it. Norms, copies and
element-wise work grow with the products that they lie between, so that a step of a B/16 takes 2.4 times the time of its
products at peak; what is saved and read again costs little beside it (benchmarks/RESULTS.md)."""

STEPS = 1_000_000
"""A placeholder for the length of the run and the size of its dataset, neither of which changes any shape."""

Settings = dict[str, Any]


class Candidate(NamedTuple):
    """A way to compute the run, with its estimates; nothing is compiled yet."""

    changes: Settings
    """The differences from the user's config."""
    config: ConfigDict
    learner: Learner
    state: TrainState
    """Shapes and shardings."""
    memory: Memory
    work: Work
    roofline: Roofline

    @property
    def attention(self) -> Choice:
        """The implementation of attention and why it was selected."""
        model = self.learner.model
        return choose_attention(self.config.model.attention, model.compute.dtype, model.architecture, self.learner.mesh)


Compile = Callable[[Candidate], Compiled]


class SearchResult(NamedTuple):
    """A candidate that fits, and everything that was compiled on the way to it."""

    candidate: Candidate | None
    compiled: Compiled | None
    tried: list[tuple[Settings, Compiled]]


def estimate(
    config: ConfigDict, machines: Machines, changes: Settings | None = None, state: TrainState | None = None
) -> Candidate:
    """The estimates for a config with some changes. Raises UserError if the batch does not divide over the mesh.

    ``state`` may be that of another candidate with the same mesh.
    """
    changes = changes or {}
    if changes:
        config = configs.override(config, {key: str(value) for key, value in changes.items()}, "the plan")
    learner = make_learner(config, abstract_mesh(config, machines), steps=STEPS, examples=STEPS)
    if state is None:
        state = learner.abstract_state()
    memory, unpadded = (
        step_memory(learner, state, config.batch_size, tiled=tiled) for tiled in (machines.chip.is_tpu, False)
    )
    # Padding need not travel: times are lower bounds.
    work = step_work(learner, state, unpadded, batch_size=config.batch_size, slices=machines.slices)
    return Candidate(changes, config, learner, state, memory, work, roofline(work, machines))


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
    # The kind of device decides which attention the run takes.
    chip = machines.chip
    device = AbstractDevice(chip.device_kinds[0], 1 if chip.is_tpu else None, "tpu" if chip.is_tpu else "gpu")
    shape = mesh_shape(sizes.data, sizes.fsdp, sizes.tensor, machines.devices)
    return AbstractMesh(shape, AXES, abstract_device=device)


def candidates(config: ConfigDict, machines: Machines) -> list[Candidate]:
    """Every other way to compute the run, the fastest first; among equals the one that changes least."""
    given = estimate(config, machines)
    shape = given.learner.mesh.shape
    pairs = config.batch_size // (shape["data"] * shape["fsdp"])
    micro = [n for n in (2**i for i in range(20)) if pairs % n == 0]
    fsdp = [size for size in FSDP_SIZES if size * shape["tensor"] <= machines.devices // machines.slices]
    found, states = [], {shape["fsdp"]: given.state}
    for parts, remat, shared in itertools.product(micro, REMAT, sorted({shape["fsdp"], *fsdp})):
        micro_batch = configs.AUTO if parts == 1 else config.batch_size // parts
        mesh = (
            {}
            if shared == shape["fsdp"]
            else {"mesh.data": configs.AUTO, "mesh.fsdp": shared, "mesh.tensor": shape["tensor"]}
        )
        wanted = {"micro_batch": micro_batch, "model.remat": remat} | mesh
        flat = configs.flatten(config)
        changes = {key: value for key, value in wanted.items() if flat[key] != value}
        if changes and machines.devices % (shared * shape["tensor"]) == 0:
            candidate = estimate(config, machines, changes, states.get(shared))
            states[shared] = candidate.state
            found.append(candidate)
    return sorted(found, key=lambda c: (corrected(c.roofline), len(c.changes)))


def corrected(bound: Roofline) -> float:
    """Seconds of a step by its roofline and by how far the compiler's own times lie above it."""
    return sum(SLOWDOWN.get(name, 1.0) * getattr(bound, name) for name in bound._fields)


def compiled_seconds(candidate: Candidate, compiled: Compiled, machines: Machines) -> float | None:
    """Seconds of a step by the compiler's cycles, transfers overlapping as far as they can; None without cycles."""
    if compiled.cycles is None:
        return None
    return max(compiled.cycles / clock(machines.chip), candidate.roofline.ici, candidate.roofline.dcn)


def search(
    given: Candidate, machines: Machines, compile: Compile, *, compilations: int, compare: int | None = None
) -> SearchResult:
    """The config as it is, if it fits, or the fastest that does; after at most ``compilations`` compilations.

    ``FITTING`` candidates that fit are compared by the compiler's cycles; without cycles the first is taken. With
    ``compare`` that number is compared, also if the config fits, which is then one of them.
    """
    free = machines.chip.free_hbm_per_device
    compiled = compile(given)
    tried = [({}, compiled)]
    if compiled.fits and (compare is None or compiled.cycles is None):
        return SearchResult(given, compiled, tried)
    # The compiler's figure relative to the estimate, by policy: what XLA saves under one policy says little about
    # another. The estimate of a policy that was never compiled is taken as it is. The same for the time.
    factors, slower = {given.config.model.remat: compiled.hbm_bytes / given.memory.total}, {}
    left = candidates(given.config, machines)
    found = [(compiled_seconds(given, compiled, machines), given, compiled)] if compiled.fits else []
    while len(tried) < compilations and len(found) < (compare or FITTING):
        likely = [c for c in left if c.memory.total * factors.get(c.config.model.remat, 1.0) <= free]
        if not likely:
            break
        candidate = min(likely, key=lambda c: corrected(c.roofline) * slower.get(c.config.model.remat, 1.0))
        left.remove(candidate)
        compiled = compile(candidate)
        tried.append((candidate.changes, compiled))
        policy, seconds = candidate.config.model.remat, compiled_seconds(candidate, compiled, machines)
        factors[policy] = compiled.hbm_bytes / candidate.memory.total
        if not compiled.fits:
            continue
        found.append((seconds, candidate, compiled))
        if seconds is None:
            break
        slower[policy] = seconds / corrected(candidate.roofline)
    if not found:
        return SearchResult(None, None, tried)
    return SearchResult(*min(found, key=lambda item: item[0] or 0.0)[1:], tried)
