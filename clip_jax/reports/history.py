"""Reads ``metrics.jsonl`` into curves, and downsamples them to what a figure can show."""

import json
import math
from array import array
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from jaxtyping import Float


class Curve(NamedTuple):
    """One metric over a run, sorted by step; values may be NaN or infinite."""

    steps: Float[np.ndarray, " points"]
    values: Float[np.ndarray, " points"]

    @property
    def last(self) -> float:
        return float(self.values[-1])


class Thinned(NamedTuple):
    """A downsampled curve: the mean, minimum and maximum of each bucket of consecutive points."""

    steps: Float[np.ndarray, " buckets"]
    mean: Float[np.ndarray, " buckets"]
    low: Float[np.ndarray, " buckets"]
    high: Float[np.ndarray, " buckets"]


def read_metrics(path: Path) -> Iterator[dict[str, Any]]:
    """The complete lines of ``metrics.jsonl``, none if the file does not exist yet.

    One at a time: a million lines as dicts would take a gigabyte.
    """
    if not path.exists():
        return
    with path.open("rb") as lines:
        for line in lines:
            # A killed run leaves an incomplete last line, and the resumed run may append to it. The other lines are
            # still worth a report.
            try:
                row = json.loads(line)
            except ValueError:
                continue
            if isinstance(row, dict) and _is_number(row.get("step")) and math.isfinite(row["step"]):
                yield row


def curves(rows: Iterable[dict[str, Any]]) -> dict[str, Curve]:
    """The curve of every numeric metric in ``rows``, by name, in order of first appearance."""
    columns: dict[str, tuple[array, array]] = {}
    for row in rows:
        for name, value in row.items():
            if name != "step" and _is_number(value):
                steps, values = columns.setdefault(name, (array("d"), array("d")))
                steps.append(row["step"])
                values.append(value)
    return {name: _in_order(np.array(steps), np.array(values)) for name, (steps, values) in columns.items()}


def thin(curve: Curve, points: int) -> Thinned:
    """Downsamples ``curve`` to at most ``points`` buckets with equal numbers of values.

    Values that are not finite are ignored; a bucket without a finite value is NaN, which leaves a gap in the line.
    """
    size = len(curve.steps)
    starts = np.linspace(0, size, min(points, size), endpoint=False).astype(int)
    values = np.where(np.isfinite(curve.values), curve.values, np.nan)
    finite = np.add.reduceat(np.isfinite(values).astype(float), starts)
    total = np.add.reduceat(np.nan_to_num(values), starts)
    steps = np.add.reduceat(curve.steps, starts) / np.diff(starts, append=size)
    mean = np.divide(total, finite, out=np.full_like(total, np.nan), where=finite > 0)
    thinned = Thinned(steps, mean, np.fmin.reduceat(values, starts), np.fmax.reduceat(values, starts))
    # A reader takes the ends of a line for the first and last step of the run.
    thinned.steps[0], thinned.steps[-1] = curve.steps[0], curve.steps[-1]
    return thinned


def _in_order(steps: np.ndarray, values: np.ndarray) -> Curve:
    """Sorts by step; where a step was logged twice, as after a restart, the later line wins."""
    order = np.argsort(steps, kind="stable")
    steps, values = steps[order], values[order]
    last_of_step = np.append(steps[1:] != steps[:-1], True)
    return Curve(steps[last_of_step], values[last_of_step])


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)
