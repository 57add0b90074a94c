"""The plan of a run: does it fit, how fast can it be, how long and how much; as data, for people and for programs."""

import math
from typing import Any, NamedTuple

import jax
from ml_collections import ConfigDict

from clip_jax import __version__
from clip_jax import config as configs
from clip_jax.errors import UserError
from clip_jax.hardware import Machines
from clip_jax.models import flops
from clip_jax.models.clip import parameter_counts
from clip_jax.planning import compiling
from clip_jax.planning.compiling import Compiled
from clip_jax.planning.memory import undivided
from clip_jax.planning.roofline import Roofline, roofline
from clip_jax.planning.search import Candidate, Found, reckon, search
from clip_jax.training.setup import check_attention

COMPILATIONS = 4
"""Each takes one to two minutes for a large model."""
WORTH_A_WARNING = 0.02
"""Of a device's memory."""


class Request(NamedTuple):
    """What a user asks."""

    config: ConfigDict
    machines: Machines
    samples: int | None = None
    """Of the dataset, for a run that lasts epochs; None: what the config says."""
    price: float | None = None
    """Of one chip for one hour."""
    mfu: float | None = None
    """To reckon times with, instead of the bound that nothing can be faster than."""
    compile: bool = True
    compilations: int = COMPILATIONS


class Plan(NamedTuple):
    """The answer. What ``found`` has fits; all that is reckoned is of it, or of the config where nothing fits."""

    request: Request
    given: Candidate
    found: Found
    is_compiled: bool

    @property
    def fits(self) -> bool:
        """As the config is."""
        return self.found.tried[0][1].fits

    @property
    def chosen(self) -> Candidate:
        return self.found.candidate or self.given

    @property
    def chosen_compiled(self) -> Compiled:
        return self.found.compiled or self.found.tried[0][1]

    @property
    def roofline(self) -> Roofline:
        """With the traffic of the compiled program, where there is one."""
        work, transfers = self.chosen.work, self.chosen_compiled.transfers
        return roofline(work._replace(transfers=transfers) if transfers else work, self.request.machines)

    @property
    def step_seconds(self) -> float:
        """The least a step can take, or what it takes at the MFU that the user reckons with."""
        peak = self.request.machines.chip.flops / self.request.machines.chip.devices_per_chip
        at_mfu = self.chosen.work.model_flops / peak / self.request.mfu if self.request.mfu else 0.0
        return max(self.roofline.overlapped, at_mfu)

    @property
    def pairs_per_second(self) -> float:
        return self.request.config.batch_size / self.step_seconds

    @property
    def mfu(self) -> float:
        peak = self.request.machines.chip.flops / self.request.machines.chip.devices_per_chip
        return self.chosen.work.model_flops / peak / self.step_seconds

    @property
    def steps(self) -> int | None:
        """None where the run lasts epochs and nobody said how many samples there are."""
        config = self.request.config
        samples = config.data.samples if self.request.samples is None else self.request.samples
        if config.epochs != configs.AUTO and samples == configs.AUTO:
            return None
        return configs.duration(config, "", samples)

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
        """Of the config as it is."""
        parts, free = self.given.parts, self.request.machines.chip.free_hbm_per_device
        whole = undivided(parts.state, parts.mesh)
        if whole < WORTH_A_WARNING * free:
            return []
        widths = sorted({parts.model.architecture.image.width, parts.model.architecture.text.width})
        best = math.gcd(*widths, parts.mesh.shape["fsdp"])
        return [
            f"mesh.fsdp={parts.mesh.shape['fsdp']} does not divide the widths {' and '.join(map(str, widths))}: "
            f"{whole / 1e9:.1f} GB of parameters stay whole on every chip; mesh.fsdp={best} divides them"
        ]


def make_plan(request: Request) -> Plan:
    """Reckons, compiles where it can, and searches where the run does not fit. Raises UserError."""
    config, machines = request.config, request.machines
    if config.model.init_from and config.model.name == "":
        raise UserError("config.model.name is empty: a plan needs the model's name")
    check_attention(config, "tpu" if machines.chip.is_tpu else "gpu")
    given = reckon(config, machines)
    is_compiled = request.compile and machines.chip.is_tpu and compiling.is_installed()
    if is_compiled:
        found = search(
            given,
            machines,
            lambda candidate: compiling.compile_step(candidate.parts.config, machines),
            compilations=request.compilations,
        )
    else:
        found = search(given, machines, lambda candidate: estimated(candidate, machines), compilations=2)
    return Plan(request, given, found, is_compiled)


def estimated(candidate: Candidate, machines: Machines) -> Compiled:
    """In the place of the compiler's answer, the estimate."""
    free = machines.chip.free_hbm_per_device
    return Compiled(candidate.memory.total <= free, candidate.memory.total, free, 0.0)


def to_json(plan: Plan) -> dict[str, Any]:
    """What ``clip-jax plan --json`` prints. Bytes and FLOPs are of one chip and one step where nothing else is said."""
    chosen, machines = plan.chosen, plan.request.machines
    config, per_chip = chosen.parts.config, machines.chip.devices_per_chip
    work, memory = chosen.work, chosen.memory
    transfers = plan.chosen_compiled.transfers or work.transfers
    architecture = chosen.parts.model.architecture
    shape = chosen.parts.mesh.shape
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
            "micro_batch": config.batch_size // chosen.parts.micro_batches,
            "model.remat": config.model.remat,
            **{f"mesh.{axis}": size for axis, size in shape.items()},
        },
        "tried": [
            {"changes": changes, "fits": c.fits, "hbm_bytes_per_chip": c.hbm_bytes * per_chip, "seconds": c.seconds}
            for changes, c in plan.found.tried
        ],
        "machines": machines.name,
        "chips": machines.chips,
        "hosts": machines.hosts,
        "model": config.model.name,
        "parameters": parameter_counts(chosen.parts.state.params),
        "flops_per_pair": flops.training(architecture),
        "flops_per_step": flops.training(architecture) * config.batch_size,
        "flops_per_chip": {"model": work.model_flops * per_chip, "all": work.flops * per_chip},
        "memory_estimate": {name: value * per_chip for name, value in memory._asdict().items()}
        | {"total": memory.total * per_chip},
        "transfers": [
            {"what": t.what, "ici_bytes": t.ici_bytes * per_chip, "dcn_bytes": t.dcn_bytes * per_chip}
            for t in transfers
        ],
        "seconds": plan.roofline._asdict(),
        "bound": plan.roofline.bound,
        "step_seconds": plan.step_seconds,
        "pairs_per_second": plan.pairs_per_second,
        "pairs_per_second_without_overlap": config.batch_size / plan.roofline.serial,
        "mfu": plan.mfu,
        "steps": plan.steps,
        "hours": plan.hours,
        "chip_hours": plan.chip_hours,
        "cost": plan.cost,
        "warnings": plan.warnings,
        "versions": versions(plan),
    }


def versions(plan: Plan) -> dict[str, str]:
    found = {"jax": jax.__version__, "clip_jax": __version__}
    return found | ({"libtpu": compiling.version()} if plan.is_compiled else {})
