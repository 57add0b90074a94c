"""A plan as a person reads it: a few titled groups of names and values."""

from clip_jax.hardware import GIB
from clip_jax.models import flops
from clip_jax.models.clip import parameter_counts
from clip_jax.planning import compiling
from clip_jax.planning.plan import Plan
from clip_jax.planning.search import Settings
from clip_jax.planning.work import Transfer
from clip_jax.reports import formats

Rows = list[tuple[str, str]]
NAMES = {"compute": "compute", "hbm": "HBM", "ici": "ICI", "dcn": "DCN"}
GPU_NAMES = NAMES | {"ici": "NVLink", "dcn": "network"}


def sections(plan: Plan) -> list[tuple[str, Rows]]:
    """(title, rows), in the order in which a reader needs them."""
    machines, config = plan.request.machines, plan.request.config
    chips = f"{machines.chips} chip{'s' * (machines.chips > 1)}, {machines.hosts} host{'s' * (machines.hosts > 1)}"
    title = f"{config.model.name}, {config.batch_size:,} pairs a step, on {machines.name} ({chips})"
    return [(title, _memory(plan)), ("A step on one chip", _step(plan)), ("The run", _run(plan))]


def _memory(plan: Plan) -> Rows:
    per_chip = plan.request.machines.chip.devices_per_chip
    free = plan.chosen_compiled.free_hbm_bytes * per_chip
    given, source = plan.found.tried[0][1], "the TPU compiler's figure" if plan.is_compiled else "an estimate"
    verdict = "yes" if plan.fits else "no"
    rows = [("fits", f"{verdict}: {given.hbm_bytes * per_chip / GIB:.2f} of {_gib(free)} a chip, {source}")]
    if not plan.fits:
        rows.append(("what fits", _what_fits(plan, per_chip)))
    rows += [("warning", warning) for warning in plan.warnings]
    chosen, counts = plan.chosen, parameter_counts(plan.chosen.parts.state.params)
    shape, config = chosen.parts.mesh.shape, chosen.parts.config
    micro = config.batch_size // chosen.parts.micro_batches
    memory = chosen.memory._asdict()
    memory = {"state": memory.pop("parameters") + memory.pop("optimizer")} | memory
    estimate = ", ".join(f"{name} {value * per_chip / GIB:.2f}" for name, value in memory.items())
    rows += [
        ("computed as", f"remat {config.model.remat}, micro-batch {micro:,}, " + _mesh(shape)),
        ("parameters", ", ".join(f"{name} {formats.count(value)}" for name, value in counts.items())),
        ("memory", f"{estimate} GiB (estimate: {_gib(chosen.memory.total * per_chip)})"),
    ]
    if not plan.is_compiled and plan.request.machines.chip.is_tpu and plan.request.compile:
        rows.append(("to be sure", f"{compiling.INSTALL}; then the TPU compiler itself is asked"))
    return rows


def _what_fits(plan: Plan, per_chip: int) -> str:
    if plan.found.candidate is None:
        tried = len(plan.found.tried)
        return f"nothing of the {tried} that were tried; take more chips, or allow more with --compilations"
    flags = " ".join(f"--config.{key}={value}" for key, value in plan.chosen.changes.items())
    return f"{flags} ({_gib(plan.chosen_compiled.hbm_bytes * per_chip)})"


def _step(plan: Plan) -> Rows:
    machines, work = plan.request.machines, plan.chosen.work
    per_chip, names = machines.chip.devices_per_chip, NAMES if machines.chip.is_tpu else GPU_NAMES
    seconds, transfers = plan.roofline, plan.chosen_compiled.transfers or work.transfers
    extra = work.flops / work.model_flops - 1
    told = {
        "compute": f"{formats.flops(work.flops * per_chip)}, {formats.percent(extra)} of it on top of the model's own",
        "hbm": f"{_gb(work.hbm_bytes * per_chip)}: state, gradients, weights, kept activations",
        "ici": _moved(transfers, "ici_bytes", per_chip, machines.links),
        "dcn": _moved(transfers, "dcn_bytes", per_chip, 1),
    }
    return [
        (names[name], f"at least {_milliseconds(getattr(seconds, name)):>9}   {told[name]}")
        for name in seconds._fields
        if getattr(seconds, name) > 0
    ]


def _moved(transfers: tuple[Transfer, ...], field: str, per_chip: int, links: int) -> str:
    moved = {t.what: getattr(t, field) * per_chip for t in transfers if getattr(t, field)}
    total = sum(moved.values())
    each = f", {_gb(total // links)} over each of {links} links" if links > 1 else ""
    largest = max(moved, key=moved.__getitem__, default="")
    return f"{_gb(total)}{each}; most: {largest}" if moved else ""


def _run(plan: Plan) -> Rows:
    request, machines = plan.request, plan.request.machines
    per_pair = flops.training(plan.chosen.parts.model.architecture)
    least = "" if request.mfu else "at least "
    speed = (
        f"{'' if request.mfu else 'at most '}{plan.pairs_per_second:,.0f} pairs/s "
        f"({plan.pairs_per_second / machines.chips:,.1f} a chip), MFU {formats.percent(plan.mfu)}"
    )
    if not request.mfu:
        slow = request.config.batch_size / plan.roofline.serial
        speed += f"; {slow:,.0f} pairs/s if nothing overlaps"
    bound = (NAMES if machines.chip.is_tpu else GPU_NAMES)[plan.roofline.bound]
    rows = [
        ("speed", speed),
        ("bound by", bound),
        ("model FLOPs", f"{formats.flops(per_pair)} a pair, {_step_flops(plan)}"),
    ]
    if plan.steps is None:
        return [*rows, ("time", f"unknown: it lasts {request.config.epochs:g} epochs; give --samples=N of the dataset")]
    pairs = formats.count(plan.steps * request.config.batch_size)
    rows.append(("length", f"{plan.steps:,} steps, {pairs} pairs"))
    rows.append(("time", f"{least}{formats.duration(plan.hours * 3600)}, {least}{plan.chip_hours:,.0f} chip-hours"))
    if plan.cost is not None:
        rows.append(("cost", f"{least}{plan.cost:,.0f} at {request.price:g} a chip-hour"))
    return rows


def _step_flops(plan: Plan) -> str:
    return (
        f"{formats.flops(flops.training(plan.chosen.parts.model.architecture) * plan.request.config.batch_size)} a step"
    )


def _mesh(shape: Settings) -> str:
    return "mesh " + " x ".join(f"{axis} {size}" for axis, size in shape.items())


def _gib(size: float) -> str:
    return f"{size / GIB:.2f} GiB"


def _gb(size: float) -> str:
    return f"{size / 1e9:.2f} GB"


def _milliseconds(seconds: float) -> str:
    return f"{seconds * 1e3:,.1f} ms"
