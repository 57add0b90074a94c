"""The figures of the page: curves over steps, drawn by matplotlib as SVG that follows the page's light or dark theme.

A figure is drawn in the light colors of ``PALETTE``. In the SVG each color is then replaced by a CSS variable of the
same name, which the page defines for both themes. Text remains text, in the font of the page.
"""

import io
import math
import re
from collections.abc import Callable, Sequence
from html import escape
from typing import NamedTuple

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.textpath import TextPath
from matplotlib.ticker import FixedLocator, FuncFormatter, LogLocator, MaxNLocator, NullLocator

from clip_jax.reports import formats
from clip_jax.reports.history import Curve, thin

# name: (light, dark). Hues that color-blind readers can distinguish (after Okabe and Ito 2008), dark enough for thin
# lines on white. Blue is always training; the other hues are held-out data.
PALETTE = {
    "ink": ("#1f2933", "#e3e8ee"),
    "muted": ("#66727f", "#98a4b1"),
    "hairline": ("#e2e6ea", "#2f363e"),
    "blue": ("#2563c9", "#74a9ff"),
    "orange": ("#c95c0a", "#f5a04f"),
    "teal": ("#0b8573", "#3ecdb3"),
    "purple": ("#7c4dbe", "#bb9bf5"),
    "pink": ("#c23b77", "#f58ab5"),
}
TRAIN_COLOR = "blue"
HELD_OUT_COLORS = ("orange", "teal", "purple", "pink")

# Above this ratio of the largest to the smallest value, a linear axis would show only the largest.
LOG_RATIO = 50
# Points per line, about as many as the eye can distinguish at these sizes, however long the run.
LARGE, SMALL = (404, 250), (268, 150)
POINTS = {LARGE: 260, SMALL: 130}
# Curves with at most this many points, such as those of evaluations, have a marker at each point.
MARKED_POINTS = 40

FONT_PIXELS = 12
LABEL_LINE_PIXELS = 15


class Line(NamedTuple):
    """A curve in a figure; ``label`` is written at its right end, followed by the last value."""

    curve: Curve
    color: str
    label: str = ""


def figure(
    lines: Sequence[Line],
    *,
    description: str,
    size: tuple[int, int] = LARGE,
    percent: bool = False,
    from_zero: bool = False,
    pairs: Curve | None = None,
    reference: tuple[float, str] | None = None,
) -> str:
    """Draws ``lines`` over steps and returns an ``<svg>`` element.

    ``percent``: the values are fractions, shown as percentages. ``from_zero``: the value axis starts at zero.
    ``pairs``: pairs seen by step, shown as a second row of numbers below the steps.
    ``reference``: a value to mark by a dotted line, with its label, such as the loss of a random model.
    """
    last_step = max(line.curve.steps[-1] for line in lines)
    format_value: Callable[[float], str] = formats.percent if percent else formats.number
    labels = [f"{line.label} {format_value(_last_finite(line.curve.values))}".strip() for line in lines]

    width, height = size
    with matplotlib.rc_context({"svg.fonttype": "none", "font.size": FONT_PIXELS, "svg.hashsalt": description}):
        # At 72 dots per inch, sizes in points are pixels of the page.
        drawing = Figure(figsize=(width / 72, height / 72), dpi=72)
        drawing.patch.set_visible(False)
        margin_right = 10 + max(map(_text_width, labels))
        margin_bottom = 40 if pairs is not None else 24
        axes = drawing.add_axes(
            (46 / width, margin_bottom / height, 1 - (46 + margin_right) / width, 1 - (margin_bottom + 10) / height)
        )
        ends = [_draw(axes, line, POINTS[size]) for line in lines]
        if reference is not None:
            _draw_reference(axes, *reference)
        _scale_values(axes, lines, percent=percent, from_zero=from_zero, ticks=5 if size == LARGE else 3)
        _scale_steps(axes, last_step, pairs, ticks=4 if size == LARGE else 3)
        _write_labels(axes, lines, labels, ends)
        _strip(axes)
        buffer = io.StringIO()
        drawing.savefig(buffer, format="svg", metadata=dict.fromkeys(("Date", "Creator", "Format", "Type")))
    return _for_page(buffer.getvalue(), description)


def _draw(axes: Axes, line: Line, points: int) -> float:
    """Draws the line and returns its last value."""
    color = PALETTE[line.color][0]
    thinned = thin(line.curve, points)
    if (thinned.high > thinned.low).any():  # The extremes within each bucket keep spikes visible.
        axes.fill_between(thinned.steps, thinned.low, thinned.high, color=color, alpha=0.16, linewidth=0)
    few = len(line.curve.steps) <= MARKED_POINTS
    markers = {"marker": "o", "markersize": 3.2, "clip_on": False} if few else {}  # The last marker is on the edge.
    axes.plot(thinned.steps, thinned.mean, color=color, linewidth=1.4, **markers)
    return _last_finite(thinned.mean)


def _draw_reference(axes: Axes, level: float, name: str) -> None:
    muted = PALETTE["muted"][0]
    axes.axhline(level, color=muted, linewidth=1, linestyle=(0, (2, 3)))
    position = {"xytext": (-4, 4), "textcoords": "offset points", "ha": "right", "va": "bottom"}
    axes.annotate(name, (1, level), xycoords=("axes fraction", "data"), color=muted, **position)


def _scale_values(axes: Axes, lines: Sequence[Line], *, percent: bool, from_zero: bool, ticks: int) -> None:
    values = np.concatenate([line.curve.values for line in lines])
    values = values[np.isfinite(values)]
    low, high = (values.min(), values.max()) if values.size else (0.0, 1.0)
    axes.yaxis.set_major_locator(MaxNLocator(ticks, steps=[1, 2, 2.5, 5, 10]))
    axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{100 * value:g}%" if percent else _tick(value)))
    axes.margins(y=0.08)
    if percent or from_zero:
        if percent and 0.7 < high <= 1:  # Close to the best possible value, show how close.
            high = 1.0
        low, high = min(low, 0), high if high > 0 else 1.0
        axes.set_ylim(low - 0.02 * high, 1.04 * high)
    elif low > 0 and high / low > LOG_RATIO:
        axes.set_yscale("log")
        axes.yaxis.set_major_locator(LogLocator(numticks=ticks + 1))
        axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: _tick(value)))
        axes.yaxis.set_minor_locator(NullLocator())


def _scale_steps(axes: Axes, last_step: float, pairs: Curve | None, *, ticks: int) -> None:
    axes.set_xlim(0, max(last_step, 1))
    ticks_at = MaxNLocator(ticks, integer=True, steps=[1, 2, 2.5, 5, 10]).tick_values(0, max(last_step, 1))
    shown = [step for step in ticks_at if 0 <= step <= max(last_step, 1)]
    axes.xaxis.set_major_locator(FixedLocator(shown))
    axes.xaxis.set_major_formatter(FuncFormatter(lambda step, _: _tick(step)))
    if pairs is None:
        return
    # One text per number: in a tick label of two lines, only the first would be centered in the font of the page.
    style = {"textcoords": "offset points", "va": "top", "color": PALETTE["muted"][0]}
    below = {"xycoords": ("data", "axes fraction"), "ha": "center", **style}
    for step in shown[1:]:
        seen = np.interp(step, np.append(0, pairs.steps), np.append(0, pairs.values))
        axes.annotate(formats.count(seen), (step, 0), xytext=(0, -21), **below)
    # The names of the rows. That of the pairs takes the position of the number at step 0.
    axes.annotate("step", (0, 0), xycoords="axes fraction", xytext=(-12, -5.5), ha="right", **style)
    axes.annotate("pairs", (0, 0), xycoords="axes fraction", xytext=(-12, -21), ha="right", **style)


def _write_labels(axes: Axes, lines: Sequence[Line], labels: Sequence[str], ends: Sequence[float]) -> None:
    """Writes the label of each line at the height of its end; labels that would overlap are moved apart."""
    box = axes.get_window_extent()
    heights = [axes.transData.transform((0, end))[1] for end in ends]
    heights = _spread(np.nan_to_num(heights, nan=box.y0), LABEL_LINE_PIXELS, box.y0, box.y1)
    for line, label, height in zip(lines, labels, heights, strict=True):
        fraction = (height - box.y0) / box.height
        style = {"xytext": (7, 0), "textcoords": "offset points", "va": "center", "parse_math": False}
        axes.annotate(label, (1, fraction), xycoords="axes fraction", color=PALETTE[line.color][0], **style)


def _spread(heights: np.ndarray, gap: float, low: float, high: float) -> np.ndarray:
    """Moves ``heights`` at least ``gap`` apart within ``[low, high]``, by one upward and one downward pass."""
    order = np.argsort(heights, kind="stable")
    moved = np.clip(heights[order], low, high)
    # Upward, each height makes room for those below it; downward, the top ones are pushed back under ``high``.
    moved = np.maximum.accumulate(moved - gap * np.arange(len(moved))) + gap * np.arange(len(moved))
    ceiling = high - gap * np.arange(len(moved))[::-1]
    spread = np.empty_like(moved)
    spread[order] = np.minimum(moved, ceiling)
    return spread


def _strip(axes: Axes) -> None:
    hairline, muted = PALETTE["hairline"][0], PALETTE["muted"][0]
    axes.patch.set_visible(False)
    axes.spines[["left", "right", "top"]].set_visible(False)
    axes.spines["bottom"].set_color(hairline)
    axes.grid(axis="y", color=hairline, linewidth=1)
    axes.set_axisbelow(True)
    axes.tick_params(length=0, pad=6, colors=muted)


def _text_width(text: str) -> float:
    text = text.replace("$", "S")  # TextPath would parse math between dollar signs.
    return TextPath((0, 0), text, size=FONT_PIXELS).get_extents().width


def _last_finite(values: np.ndarray) -> float:
    finite = values[np.isfinite(values)]
    return float(finite[-1]) if finite.size else math.nan


def _tick(value: float) -> str:
    return formats.count(value) if abs(value) >= 10_000 else formats.number(value, 4)


def _for_page(svg: str, description: str) -> str:
    """The ``<svg>`` element alone, sized by the page and colored by its CSS variables."""
    svg = svg[svg.index("<svg") :]
    # Only the ids of clip paths are needed; the others would collide on a page with many figures.
    svg = re.sub(r' id="(?:figure|axes|patch|line2d|text|matplotlib\.axis|xtick|ytick|FillBetween)[^"]*"', "", svg)
    svg = re.sub(r"\s+(width|height)=\"[\d.]+pt\"", "", svg, count=2)
    for name, (light, _) in PALETTE.items():
        svg = svg.replace(light, f"var(--{name})")
    svg = re.sub(r"<style.*?</style>", "", svg, flags=re.DOTALL)
    svg = re.sub(r" font-family: [^;\"]*;", "", svg)  # The font of the page, not the one that matplotlib measured.
    return svg.replace("<svg", f'<svg role="img" aria-label="{escape(description)}"', 1)
