"""The plan for a terminal: a few titled groups of names and values."""

from clip_jax.devices.hardware import GIB
from clip_jax.models import flops
from clip_jax.models.clip import parameter_counts
from clip_jax.objectives.cost import Transfer
from clip_jax.planning import compiling
from clip_jax.planning.plan import Plan
from clip_jax.planning.search import Settings
from clip_jax.reports import formats

Rows = list[tuple[str, str]]
NAMES = {"compute": "compute", "hbm": "HBM", "ici": "ICI", "dcn": "DCN"}
GPU_NAMES = NAMES | {"ici": "NVLink", "dcn": "network"}


def sections(plan: Plan) -> list[tuple[str, Rows]]:
    """The groups as (title, rows), most important first."""
    machines, config = plan.request.machines, plan.request.config
    chips = f"{machines.chips} chip{'s' * (machines.chips > 1)}, {machines.hosts} host{'s' * (machines.hosts > 1)}"
    start, stop = plan.request.phase
    steps = "" if (start, stop) == (0, None) else f", steps {start + 1:,} to {stop or 'the last'}"
    title = f"{config.model.name}, {config.batch_size:,} pairs per step{steps}, on {machines.name} ({chips})"
    return [(title, _memory(plan)), ("A step on one chip", _step(plan)), ("The run", _run(plan))]


def _memory(plan: Plan) -> Rows:
    per_chip = plan.request.machines.chip.devices_per_chip
    free = plan.chosen_compiled.free_hbm_bytes * per_chip
    given, source = plan.found.tried[0][1], "the TPU compiler's figure" if plan.is_compiled else "an estimate"
    verdict = "yes" if plan.fits else "no"
    rows = [("fits", f"{verdict}: {given.hbm_bytes * per_chip / GIB:.2f} of {_gib(free)} per chip, {source}")]
    if not plan.fits or len(plan.found.tried) > 1:
        rows.append(("fastest" if plan.fits else "what fits", _what_fits(plan, per_chip)))
    if plan.chosen_compiled.evaluation_hbm_bytes is not None:
        rows.append(("evaluation", _evaluation(plan, per_chip)))
    if buckets := plan.chosen_compiled.text_buckets:
        listed = ", ".join(f"{length} tokens {_gib(peak * per_chip)}" for length, peak in buckets.items())
        rows.append(("text buckets", f"{listed}; compiled as well, times and FLOPs are of the full length"))
    rows += [("warning", warning) for warning in plan.warnings]
    chosen, counts = plan.chosen, parameter_counts(plan.chosen.state.params)
    shape, config = chosen.learner.mesh.shape, chosen.config
    micro = config.batch_size // chosen.learner.micro_batches
    memory = chosen.memory._asdict()
    memory = {"state": memory.pop("parameters") + memory.pop("optimizer")} | memory
    estimate = ", ".join(f"{name} {value * per_chip / GIB:.2f}" for name, value in memory.items())
    rows += [
        ("attention", str(chosen.attention)),
        ("computed as", f"remat {config.model.remat}, micro-batch {micro:,}, " + _mesh(shape)),
        ("parameters", ", ".join(f"{name} {formats.count(value)}" for name, value in counts.items())),
        ("memory", f"{estimate} GiB (estimate: {_gib(chosen.memory.total * per_chip)})"),
    ]
    if not plan.is_compiled and plan.request.machines.chip.is_tpu and plan.request.compile:
        rows.append(("exact figure", f"install the TPU compiler with: {compiling.INSTALL}"))
    return rows


def _evaluation(plan: Plan, per_chip: int) -> str:
    compiled = plan.chosen_compiled
    used = f"{_gib(compiled.evaluation_hbm_bytes * per_chip)} per chip, including the training state"
    if compiled.evaluation_hbm_bytes <= compiled.free_hbm_bytes:
        return f"fits: {used}"
    return f"does not fit: {used}; lower the batch_size of config.eval.*"


def _what_fits(plan: Plan, per_chip: int) -> str:
    if plan.found.candidate is None:
        tried = len(plan.found.tried)
        return f"none of {tried} variants tried; use more chips, or try more with --compilations"
    flags = " ".join(f"--config.{key}={value}" for key, value in plan.chosen.changes.items()) or "the config as it is"
    found = f"{flags} ({_gib(plan.chosen_compiled.hbm_bytes * per_chip)})"
    if not plan.is_compiled:
        return found
    tried = [compiled for _, compiled in plan.found.tried]
    more = "more: --compare, --compilations"
    return f"{found}; the fastest of {sum(c.fits for c in tried)} that fit, {len(tried)} compiled ({more})"


def _step(plan: Plan) -> Rows:
    machines, work = plan.request.machines, plan.chosen.work
    per_chip, names = machines.chip.devices_per_chip, NAMES if machines.chip.is_tpu else GPU_NAMES
    seconds, transfers = plan.roofline, plan.chosen_compiled.transfers or work.transfers
    extra = work.flops / work.model_flops - 1
    details = {
        "compute": f"{formats.flops(work.flops * per_chip)}, {formats.percent(extra)} more than the model FLOPs",
        "hbm": f"{_gb(work.hbm_bytes * per_chip)}: state, gradients, weights, saved activations",
        "ici": _moved(transfers, "ici_bytes", per_chip, machines.links),
        "dcn": _moved(transfers, "dcn_bytes", per_chip, 1),
    }
    rows = [
        (names[name], f"at least {_milliseconds(getattr(seconds, name)):>9}   {details[name]}")
        for name in seconds._fields
        if getattr(seconds, name) > 0
    ]
    if plan.cycle_seconds is not None:
        cycles = f"{plan.chosen_compiled.cycles / 1e6:,.1f} million cycles, transfers between chips not included"
        rows.append(("compiler", f"about    {_milliseconds(plan.cycle_seconds):>9}   {cycles}"))
    return rows


def _moved(transfers: tuple[Transfer, ...], field: str, per_chip: int, links: int) -> str:
    moved = {t.what: getattr(t, field) * per_chip for t in transfers if getattr(t, field)}
    total = sum(moved.values())
    each = f", {_gb(total // links)} over each of {links} links" if links > 1 else ""
    largest = max(moved, key=moved.__getitem__, default="")
    return f"{_gb(total)}{each}; most: {largest}" if moved else ""


def _run(plan: Plan) -> Rows:
    request, machines = plan.request, plan.request.machines
    per_pair = flops.training(plan.chosen.learner.trained_architecture, plan.chosen.learner.frozen_towers)
    least, most = ("at least ", "at most ") if plan.is_bound else ("", "") if request.mfu else ("about ", "about ")
    speed = (
        f"{most}{plan.pairs_per_second:,.0f} pairs/s "
        f"({plan.pairs_per_second / machines.chips:,.1f} per chip), MFU {formats.percent(plan.mfu)}"
    )
    if not request.mfu:
        slow = request.config.batch_size / plan.serial_seconds
        speed += f"; {slow:,.0f} pairs/s if nothing overlaps"
    bound = (NAMES if machines.chip.is_tpu else GPU_NAMES)[plan.roofline.bound]
    rows = [("speed", speed)]
    if not request.mfu and not plan.is_bound:
        fastest = request.config.batch_size / plan.roofline.overlapped
        rows.append(("source", "the TPU compiler's estimate of its own program; not measured"))
        rows.append(("bound", f"no step is faster than {fastest:,.0f} pairs/s"))
    rows += [
        ("bound by", bound),
        (
            "model FLOPs",
            f"{formats.flops(per_pair)} per pair, {formats.flops(per_pair * request.config.batch_size)} per step",
        ),
    ]
    if plan.steps is None:
        return [
            *rows,
            ("time", f"unknown: {request.config.epochs:g} epochs of a dataset of unknown size; give --samples=N"),
        ]
    pairs = formats.count(plan.steps * request.config.batch_size)
    rows.append(("length", f"{plan.steps:,} steps, {pairs} pairs"))
    rows.append(("time", f"{least}{formats.duration(plan.hours * 3600)}, {least}{plan.chip_hours:,.0f} chip-hours"))
    if plan.cost is not None:
        rows.append(("cost", f"{least}{plan.cost:,.0f} at {request.price:g} per chip-hour"))
    return rows


def _mesh(shape: Settings) -> str:
    return "mesh " + " x ".join(f"{axis} {size}" for axis, size in shape.items())


def _gib(size: float) -> str:
    return f"{size / GIB:.2f} GiB"


def _gb(size: float) -> str:
    return f"{size / 1e9:.2f} GB"


def _milliseconds(seconds: float) -> str:
    return f"{seconds * 1e3:,.1f} ms"
