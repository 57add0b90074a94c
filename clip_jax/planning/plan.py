"""The plan of a run as data: whether it fits, how fast it can be, how long it takes and what it costs."""

import math
from typing import Any, NamedTuple

import jax
from ml_collections import ConfigDict

from clip_jax import __version__
from clip_jax import config as configs
from clip_jax.devices.hardware import Machines
from clip_jax.errors import UserError
from clip_jax.models import flops
from clip_jax.models.clip import parameter_counts
from clip_jax.planning import compiling
from clip_jax.planning.compiling import Compiled
from clip_jax.planning.cycles import clock
from clip_jax.planning.memory import unsharded_bytes
from clip_jax.planning.roofline import Roofline, roofline
from clip_jax.planning.search import Candidate, SearchResult, estimate, search
from clip_jax.training.setup import check_attention

COMPILATIONS = 6
"""Each takes one to two minutes for a large model."""
WORTH_A_WARNING = 0.02
"""The share of a device's memory from which replicated parameters are reported."""


class Request(NamedTuple):
    """The user's question."""

    config: ConfigDict
    machines: Machines
    samples: int | None = None
    """Examples of the dataset, for a run that lasts epochs; None: what the config says."""
    price: float | None = None
    """The price of one chip per hour."""
    mfu: float | None = None
    """The MFU that is assumed for all times, in place of the upper bound of the speed."""
    compile: bool = True
    compilations: int = COMPILATIONS
    compare: int | None = None
    """The number of settings that fit to compare by the compiler's time; None: three if the config does not fit."""
    phase: tuple[int, int | None] = (0, None)
    """The steps after which the planned phase starts and stops; None: at the end of the run."""


class Plan(NamedTuple):
    """The answer. Estimates are of the candidate that was found to fit, or of the config where none does."""

    request: Request
    given: Candidate
    found: SearchResult
    is_compiled: bool

    @property
    def fits(self) -> bool:
        """Whether the config fits as it is."""
        return self.found.tried[0][1].fits

    @property
    def chosen(self) -> Candidate:
        return self.found.candidate or self.given

    @property
    def chosen_compiled(self) -> Compiled:
        return self.found.compiled or self.found.tried[0][1]

    @property
    def roofline(self) -> Roofline:
        """The work of a step, with the traffic of the compiled program if there is one."""
        work, transfers = self.chosen.work, self.chosen_compiled.transfers
        return roofline(work._replace(transfers=transfers) if transfers else work, self.request.machines)

    @property
    def cycle_seconds(self) -> float | None:
        """The compiler's estimate of a step without transfers between devices; None if it made none."""
        cycles = self.chosen_compiled.cycles
        return None if cycles is None else cycles / clock(self.request.machines.chip)

    @property
    def compiler_seconds(self) -> float | None:
        """The compiler's estimate of a step whose transfers overlap with its computation as far as they can."""
        seconds = self.roofline
        return None if self.cycle_seconds is None else max(self.cycle_seconds, *seconds)

    @property
    def serial_seconds(self) -> float:
        """A step in which no transfer between devices overlaps with computation."""
        seconds = self.roofline
        return seconds.serial if self.cycle_seconds is None else self.cycle_seconds + seconds.ici + seconds.dcn

    @property
    def step_seconds(self) -> float:
        """A step at the MFU that the user assumes, else by the compiler's estimate, else its lower bound."""
        if self.request.mfu:
            return max(self.roofline.overlapped, self.chosen.work.model_flops / self._peak / self.request.mfu)
        return self.compiler_seconds or self.roofline.overlapped

    @property
    def is_bound(self) -> bool:
        """Whether all times are lower bounds: neither the user nor the compiler estimated any."""
        return self.request.mfu is None and self.compiler_seconds is None

    @property
    def pairs_per_second(self) -> float:
        return self.request.config.batch_size / self.step_seconds

    @property
    def mfu(self) -> float:
        return self.chosen.work.model_flops / self._peak / self.step_seconds

    @property
    def _peak(self) -> float:
        """FLOP/s of one JAX device."""
        return self.request.machines.chip.flops / self.request.machines.chip.devices_per_chip

    @property
    def steps(self) -> int | None:
        """None if the run lasts epochs and the number of examples is unknown."""
        config = self.request.config
        samples = config.data.samples if self.request.samples is None else self.request.samples
        if config.epochs != configs.AUTO and samples == configs.AUTO:
            return None
        start, stop = self.request.phase
        return (configs.duration(config, "", samples) if stop is None else stop) - start

    @property
    def hours(self) -> float | None:
        return None if self.steps is None else self.steps * self.step_seconds / 3600

    @property
    def chip_hours(self) -> float | None:
        return None if self.hours is None else self.hours * self.request.machines.chips

    @property
    def cost(self) -> float | None:
        price = self.request.price
        return None if price is None or self.chip_hours is None else price * self.chip_hours

    @property
    def warnings(self) -> list[str]:
        """Warnings about the config as given."""
        given, free = self.given, self.request.machines.chip.free_hbm_per_device
        mesh, architecture = given.learner.mesh, given.learner.model.architecture
        unsharded = unsharded_bytes(given.state, mesh)
        if unsharded < WORTH_A_WARNING * free:
            return []
        widths = sorted({architecture.image.width, architecture.text.width})
        best = math.gcd(*widths, mesh.shape["fsdp"])
        return [
            f"mesh.fsdp={mesh.shape['fsdp']} does not divide the widths {' and '.join(map(str, widths))}: "
            f"{unsharded / 1e9:.1f} GB of parameters are replicated on every chip; mesh.fsdp={best} divides them"
        ]


def make_plans(request: Request) -> tuple[Plan, ...]:
    """A plan for each phase of the run; most runs have one."""
    phases = configs.phases(request.config)
    stops = [*(phase.start for phase in phases[1:]), None]
    return tuple(
        make_plan(request._replace(config=phase.config, phase=(phase.start, stop)))
        for phase, stop in zip(phases, stops, strict=True)
    )


def make_plan(request: Request) -> Plan:
    """Estimates, compiles where it can, and searches where the run does not fit. Raises UserError."""
    config, machines = request.config, request.machines
    if config.model.init_from and config.model.name == "":
        raise UserError("config.model.name is empty: a plan needs the model's name")
    check_attention(config, "tpu" if machines.chip.is_tpu else "gpu")
    given = estimate(config, machines)
    is_compiled = request.compile and machines.chip.is_tpu and compiling.is_installed()
    if is_compiled:
        found = search(
            given,
            machines,
            lambda candidate: compiling.compile_step(candidate.config, machines),
            compilations=max(request.compilations, 2 * (request.compare or 0)),
            compare=request.compare,
        )
    else:
        found = search(given, machines, lambda candidate: estimated(candidate, machines), compilations=2)
    return Plan(request, given, found, is_compiled)


def estimated(candidate: Candidate, machines: Machines) -> Compiled:
    """The estimate in place of the compiler's answer."""
    free = machines.chip.free_hbm_per_device
    return Compiled(candidate.memory.total <= free, candidate.memory.total, free, 0.0)


def to_json(plan: Plan) -> dict[str, Any]:
    """The output of ``clip-jax plan --json``. Bytes and FLOPs are per chip and step unless the name says otherwise."""
    chosen, machines = plan.chosen, plan.request.machines
    config, per_chip = chosen.config, machines.chip.devices_per_chip
    work, memory = chosen.work, chosen.memory
    transfers = plan.chosen_compiled.transfers or work.transfers
    architecture, shape = chosen.learner.trained_architecture, chosen.learner.mesh.shape
    flops_per_pair = flops.training(architecture, chosen.learner.frozen_towers)
    return {
        "fits": plan.fits,
        "compiled": plan.is_compiled,
        "hbm_bytes_per_chip": plan.found.tried[0][1].hbm_bytes * per_chip,
        "free_hbm_bytes_per_chip": machines.chip.free_hbm_per_device * per_chip,
        "found": None
        if plan.found.candidate is None
        else {"changes": chosen.changes, "hbm_bytes_per_chip": plan.chosen_compiled.hbm_bytes * per_chip},
        "settings": {
            "batch_size": config.batch_size,
            "micro_batch": config.batch_size // chosen.learner.micro_batches,
            "model.remat": config.model.remat,
            "model.attention": chosen.attention.name,
            **{f"mesh.{axis}": size for axis, size in shape.items()},
        },
        "tried": [
            {
                "changes": changes,
                "fits": c.fits,
                "hbm_bytes_per_chip": c.hbm_bytes * per_chip,
                "seconds": c.seconds,
                "cycles": c.cycles,
            }
            for changes, c in plan.found.tried
        ],
        "machines": machines.name,
        "chips": machines.chips,
        "hosts": machines.hosts,
        "model": config.model.name,
        "parameters": parameter_counts(chosen.state.params),
        "flops_per_pair": flops_per_pair,
        "flops_per_step": flops_per_pair * config.batch_size,
        "flops_per_chip": {"model": work.model_flops * per_chip, "all": work.flops * per_chip},
        "memory_estimate": {name: value * per_chip for name, value in memory._asdict().items()}
        | {"total": memory.total * per_chip},
        "transfers": [
            {"what": t.what, "ici_bytes": t.ici_bytes * per_chip, "dcn_bytes": t.dcn_bytes * per_chip}
            for t in transfers
        ],
        "seconds": plan.roofline._asdict(),
        "bound": plan.roofline.bound,
        "compiler": None
        if plan.compiler_seconds is None
        else {
            "cycles": plan.chosen_compiled.cycles,
            "seconds": plan.cycle_seconds,
            "step_seconds": plan.compiler_seconds,
        },
        "at_most": {
            "step_seconds": plan.roofline.overlapped,
            "pairs_per_second": config.batch_size / plan.roofline.overlapped,
            "mfu": work.model_flops / (machines.chip.flops / per_chip) / plan.roofline.overlapped,
        },
        "step_seconds": plan.step_seconds,
        "pairs_per_second": plan.pairs_per_second,
        "pairs_per_second_without_overlap": config.batch_size / plan.serial_seconds,
        "mfu": plan.mfu,
        "steps": plan.steps,
        "hours": plan.hours,
        "chip_hours": plan.chip_hours,
        "cost": plan.cost,
        "warnings": plan.warnings,
        "evaluation": evaluation_json(plan),
        "text_buckets": {n: size * per_chip for n, size in (plan.chosen_compiled.text_buckets or {}).items()},
        "versions": versions(plan),
    }


def evaluation_json(plan: Plan) -> dict[str, Any] | None:
    """The memory of the evaluations' encoders, where they were compiled."""
    compiled, per_chip = plan.chosen_compiled, plan.request.machines.chip.devices_per_chip
    if compiled.evaluation_hbm_bytes is None:
        return None
    fits = compiled.evaluation_hbm_bytes <= compiled.free_hbm_bytes
    return {"fits": fits, "hbm_bytes_per_chip": compiled.evaluation_hbm_bytes * per_chip}


def versions(plan: Plan) -> dict[str, str]:
    found = {"jax": jax.__version__, "clip_jax": __version__}
    return found | ({"libtpu": compiling.version()} if plan.is_compiled else {})
