"""``metrics.jsonl`` as curves: reading, and thinning to what a figure can show."""

import json
import math
from array import array
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from jaxtyping import Float


class Curve(NamedTuple):
    """One metric over a run, in order of steps; a value may be NaN or infinite where the run logged that."""

    steps: Float[np.ndarray, " points"]
    values: Float[np.ndarray, " points"]

    @property
    def last(self) -> float:
        return float(self.values[-1])


class Thinned(NamedTuple):
    """A curve of few points, each the mean of a stretch of the run, with the stretch's extremes."""

    steps: Float[np.ndarray, " buckets"]
    mean: Float[np.ndarray, " buckets"]
    low: Float[np.ndarray, " buckets"]
    high: Float[np.ndarray, " buckets"]


def read_metrics(path: Path) -> list[dict[str, Any]]:
    """The lines of ``metrics.jsonl`` that are whole; ``[]`` where there is no file yet."""
    return list(iterate_metrics(path))


def iterate_metrics(path: Path) -> Iterator[dict[str, Any]]:
    """As ``read_metrics``, a line at a time: a million lines of dicts would take a gigabyte."""
    if not path.exists():
        return
    with path.open("rb") as lines:
        for line in lines:
            # A killed run leaves half a line at the end, and its successor may append to that very line:
            # neither is a reason to lose the report of everything else.
            try:
                row = json.loads(line)
            except ValueError:
                continue
            if isinstance(row, dict) and _is_number(row.get("step")) and math.isfinite(row["step"]):
                yield row


def curves(rows: Iterable[dict[str, Any]]) -> dict[str, Curve]:
    """Every numeric metric of ``rows`` by name, in order of appearance."""
    columns: dict[str, tuple[array, array]] = {}
    for row in rows:
        for name, value in row.items():
            if name != "step" and _is_number(value):
                steps, values = columns.setdefault(name, (array("d"), array("d")))
                steps.append(row["step"])
                values.append(value)
    return {name: _in_order(np.array(steps), np.array(values)) for name, (steps, values) in columns.items()}


def thin(curve: Curve, points: int) -> Thinned:
    """``curve`` in at most ``points`` stretches of equally many values.

    A value that is not finite counts for nothing in its stretch; a stretch of nothing else is NaN, a gap in the line.
    """
    size = len(curve.steps)
    starts = np.linspace(0, size, min(points, size), endpoint=False).astype(int)
    values = np.where(np.isfinite(curve.values), curve.values, np.nan)
    finite = np.add.reduceat(np.isfinite(values).astype(float), starts)
    total = np.add.reduceat(np.nan_to_num(values), starts)
    steps = np.add.reduceat(curve.steps, starts) / np.diff(starts, append=size)
    mean = np.divide(total, finite, out=np.full_like(total, np.nan), where=finite > 0)
    thinned = Thinned(steps, mean, np.fmin.reduceat(values, starts), np.fmax.reduceat(values, starts))
    # The ends of a line are read as the run's first and last step.
    thinned.steps[0], thinned.steps[-1] = curve.steps[0], curve.steps[-1]
    return thinned


def _in_order(steps: np.ndarray, values: np.ndarray) -> Curve:
    """Sorted by step; of a step logged twice, as after a restart, the later line counts."""
    order = np.argsort(steps, kind="stable")
    steps, values = steps[order], values[order]
    last_of_step = np.append(steps[1:] != steps[:-1], True)
    return Curve(steps[last_of_step], values[last_of_step])


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)
