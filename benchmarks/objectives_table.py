"""The table of benchmarks/objectives.py, from its lines."""

import statistics
from collections.abc import Mapping, Sequence

import numpy as np
from objectives_recipe import OBJECTIVES, SETS

START, END = "<!-- benchmarks/objectives.py: begin -->", "<!-- benchmarks/objectives.py: end -->"
HEADER = (
    *("", "seeds", "loss", "R@1", "R@10", "median rank", "probe"),
    *("time of a step", "R@1 at equal cost", "R@10 at equal cost"),
)


def mean_of(metrics: Mapping[str, float], name: str) -> float:
    """The mean of both directions of a metric of the held-out set."""
    return round(statistics.mean(metrics[f"eval/held_out/{way}_{name}"] for way in ("i2t", "t2i")), 4)


def table(lines: Sequence[dict], missing: Sequence[str]) -> str:
    """Markdown: a table per set, then the rows that were not reached."""
    parts = []
    for of in SETS:
        rows = [line for line in lines if line["set"] == of]
        times = next((line["seconds"] for line in rows if "seconds" in line), {})
        runs = {name: [r for r in rows if r["objective"] == name and "loss" in r] for name in OBJECTIVES}
        if not any(runs.values()):
            continue
        one = next(found for found in runs.values() if found)[0]
        parts += [
            f"**{of}**: {one['steps']} steps of 128 pairs; {one['held_out']:,} held-out pairs",
            "\n".join(
                [
                    _line(HEADER),
                    "|" + "---|" * len(HEADER),
                    *(_line(_cells(name, found, times)) for name, found in runs.items() if found),
                ]
            ),
        ]
    if missing:
        parts.append(f"Not reached ({len(missing)} rows, with their seeds): {_grouped(missing)}.")
    return "\n\n".join(parts)


def _grouped(missing: Sequence[str]) -> str:
    """``set/objective/seed`` of all rows -> one entry per set and objective."""
    sets: dict[str, dict[str, list[str]]] = {}
    for row in missing:
        of, objective, seed = row.split("/")
        sets.setdefault(of, {}).setdefault(objective, []).append(seed)
    return "; ".join(
        f"{of}: " + ", ".join(f"{objective} {' '.join(seeds)}" for objective, seeds in found.items())
        for of, found in sets.items()
    )


def _line(cells: Sequence[str]) -> str:
    return "| " + " | ".join(cells) + " |"


def _cells(name: str, runs: Sequence[dict], times: Mapping[str, Sequence[float]]) -> list[str]:
    cost = _relative(name, times)
    probes = [run["probe"] for run in runs if "probe" in run]
    return [
        name,
        str(len(runs)),
        *(_value([run[key] for run in runs], digits) for key, digits in (("loss", 2), ("R@1", 3), ("R@10", 3))),
        _value([run["median_rank"] for run in runs], 1),
        f"{statistics.mean(probes):.3f}" if probes else "",
        "" if cost is None else f"{cost:.2f}",
        *(_equal_cost(name, runs, runs[0]["steps"], cost, column) for column in (1, 2)),
    ]


def _value(found: Sequence[Sequence[float]], digits: int) -> str:
    """Mean ± error over the held-out set, and in brackets the lowest and highest seed."""
    values, errors = zip(*found, strict=True)
    text = f"{statistics.mean(values):.{digits}f} ± {statistics.mean(errors):.{digits}f}"
    return text if len(values) == 1 else f"{text} ({min(values):.{digits}f} to {max(values):.{digits}f})"


def _relative(name: str, times: Mapping[str, Sequence[float]]) -> float | None:
    """The median, over the turns, of an objective's seconds per step relative to those of softmax."""
    if name not in times or "softmax" not in times:
        return None
    return statistics.median(seconds / plain for seconds, plain in zip(times[name], times["softmax"], strict=True))


def _equal_cost(name: str, runs: Sequence[dict], steps: int, cost: float | None, column: int) -> str:
    """A reading of the run where it has cost as much as softmax, linear between two evaluations.

    Up to 80 % of the run stage B is plain softmax. An objective that costs less than softmax is read at its end.
    """
    if cost is None:
        return ""
    at_step = min(steps, steps / cost)
    if name == "stage B":
        at_step = min(steps, 0.8 * steps + 0.2 * steps / cost)
    found = []
    for run in runs:
        curve = np.array(run["curve"])
        found.append(float(np.interp(at_step, curve[:, 0], curve[:, column])))
    return f"{statistics.mean(found):.3f}"
