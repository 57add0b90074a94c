"""The profile of a planned step: rows for the terminal, records for ``--json``, and an HTML page with a picture."""

from collections.abc import Sequence
from html import escape
from typing import NamedTuple

from clip_jax.planning.plan import Plan
from clip_jax.planning.profile import COLLECTIVES, COPIES, KERNEL, NORMS, OPTIMIZER, PRODUCTS, SCORES
from clip_jax.reports import document, formats

COLORS = {
    PRODUCTS: "blue", KERNEL: "teal", SCORES: "teal", NORMS: "purple", COPIES: "orange", OPTIMIZER: "pink",
    COLLECTIVES: "ink",
}  # fmt: skip
WORTH_A_ROW = 0.001
"""Kinds of work that take a smaller share of the step are summed up in one row."""
NOTE = (
    "Estimated by the TPU compiler, not measured. A fusion counts as the kind of its main operation. The bound is the "
    "time at the chip's peak FLOP/s or memory bandwidth, whichever is longer. Collectives overlap with the rest as far "
    "as they can, and are not part of the sum."
)


class Row(NamedTuple):
    """Milliseconds of one part of the model and kind of work."""

    part: str
    kind: str
    milliseconds: float
    bound_milliseconds: float
    share: float
    """The share of the sum of all rows that are not collectives."""


def rows(plan: Plan) -> list[Row]:
    """The longest first; empty if the compiler made no estimate."""
    machines, seconds = plan.request.machines, plan.cycle_seconds
    chip = machines.chip
    profile, cycles = plan.chosen_compiled.profile, plan.chosen_compiled.cycles
    if seconds is None or not profile:
        return []
    flops, bandwidth = chip.flops / chip.devices_per_chip, chip.hbm_bandwidth / chip.devices_per_chip
    found = [
        Row(s.part, s.kind, 1e3 * seconds * s.cycles / cycles, 1e3 * s.bound(flops, bandwidth), s.cycles / cycles)
        for s in profile
    ]
    found.sort(key=lambda row: -row.milliseconds)
    small = [row for row in found if row.share < WORTH_A_ROW]
    if small:
        found = [row for row in found if row.share >= WORTH_A_ROW]
        sums = (sum(getattr(row, name) for row in small) for name in Row._fields[2:])
        found.append(Row("all parts", "less than 0.1% each", *sums))
    links = {"between chips": plan.roofline.ici, "between slices": plan.roofline.dcn}
    return found + [Row(where, COLLECTIVES, 1e3 * s, 1e3 * s, s / seconds) for where, s in links.items() if s]


def lines(plan: Plan) -> list[tuple[str, str]]:
    """Names and values for the terminal."""
    found = rows(plan)
    width = max((len(row.kind) for row in found), default=0)
    return [
        (
            row.part,
            f"{row.kind:<{width}}  {row.milliseconds:8.1f} ms  {formats.percent(row.share):>6}"
            f"   at least {row.bound_milliseconds:7.1f} ms",
        )
        for row in found
    ]


def to_json(plan: Plan) -> list[dict[str, str | float]]:
    return [row._asdict() for row in rows(plan)]


def page(plans: Sequence[Plan]) -> str:
    """A complete HTML document; one section for each phase of the run."""
    body = f'<h1>Where the time goes</h1><p class="facts">{escape(NOTE)}</p>'
    for plan in plans:
        config, machines, found = plan.request.config, plan.request.machines, rows(plan)
        title = f"{config.model.name}, {config.batch_size:,} pairs per step, on {machines.name}"
        if not found:
            body += document.section(title, "", "The compiler made no estimate of this step.")
            continue
        table = {
            f"{row.part}: {row.kind}": (
                f"{row.milliseconds:,.1f} ms",
                formats.percent(row.share),
                f"{row.bound_milliseconds:,.1f} ms",
            )
            for row in found
        }
        speed = f"{plan.pairs_per_second / machines.chips:,.1f} pairs/s per chip, MFU {formats.percent(plan.mfu)}"
        note = f"About {plan.cycle_seconds * 1e3:,.1f} ms without transfers between chips; {speed}."
        content = document.panels([("Milliseconds; the line marks the bound", picture(found))], "large")
        body += document.section(title, content + document.results("", ("time", "share", "at least"), table), note)
    return document.page("Where the time goes", body, ".panels.large{grid-template-columns:1fr}")


def picture(found: Sequence[Row]) -> str:
    """A bar for each row, colored by kind, with a line at its bound."""
    left, right, step = 300, 60, 24
    width, height = 1000, step * len(found) + 8
    longest = max(max(row.milliseconds, row.bound_milliseconds) for row in found)
    scale = (width - left - right) / longest
    parts = []
    for number, row in enumerate(found):
        y, length = step * number + 6, max(1.0, row.milliseconds * scale)
        bound = left + row.bound_milliseconds * scale
        color = COLORS.get(row.kind, "muted")
        parts.append(
            f'<text x="{left - 8}" y="{y + 13}" text-anchor="end" font-size="13" fill="var(--ink)">'
            f"{escape(f'{row.part}: {row.kind}')}</text>"
            f'<rect x="{left}" y="{y}" width="{length:.1f}" height="16" fill="var(--{color})" opacity="0.8"/>'
            f'<path d="M{bound:.1f} {y - 2}v20" stroke="var(--ink)" stroke-width="2"/>'
            f'<text x="{max(left + length, bound) + 6:.1f}" y="{y + 13}" font-size="13" fill="var(--muted)">'
            f"{row.milliseconds:,.1f}</text>"
        )
    label = "Time of each part of the step and its bound"
    return f'<svg role="img" aria-label="{label}" viewBox="0 0 {width} {height}">{"".join(parts)}</svg>'
