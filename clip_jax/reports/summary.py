"""What a run came to, in a few numbers: the page's headline row, and the table at the end on the terminal."""

from collections.abc import Mapping, Sequence
from typing import NamedTuple

import numpy as np

from clip_jax.reports import formats
from clip_jax.reports.history import Curve

# metric of ``eval/<dataset>/``: its name for readers, in the order of tables.
EVALUATION_NAMES = {
    "loss": "loss",
    "zero_shot_top1": "zero-shot top-1",
    "zero_shot_top5": "top-5",
    "i2t_R@1": "image → text R@1",
    "i2t_R@5": "R@5",
    "i2t_R@10": "R@10",
    "t2i_R@1": "text → image R@1",
    "t2i_R@5": "R@5",
    "t2i_R@10": "R@10",
}
# What an evaluation counts besides: told once, in the table, for the curves are flat.
EVALUATION_COUNTS = {"images": "images", "skipped": "skipped", "time_seconds": "seconds"}
# The evaluations of the headline, each with the looser measure that stands below it.
HEADLINE_SHARES = {"zero_shot_top1": "zero_shot_top5", "i2t_R@1": "i2t_R@5", "t2i_R@1": "t2i_R@5"}


class Result(NamedTuple):
    """A number, ready to read; ``note`` is what one would ask next."""

    label: str
    value: str
    note: str = ""


def evaluations(history: Mapping[str, Curve], first: str = "") -> dict[str, dict[str, Curve]]:
    """The curves of every dataset by metric, in order of appearance, but the dataset ``first`` before the others."""
    datasets: dict[str, dict[str, Curve]] = {first: {}}
    for name, curve in history.items():
        dataset, _, metric = name.removeprefix("eval/").rpartition("/")
        if name.startswith("eval/") and dataset:
            datasets.setdefault(dataset, {})[metric] = curve
    return {dataset: metrics for dataset, metrics in datasets.items() if metrics}


def leading(datasets: Mapping[str, Mapping[str, Curve]], metric: str) -> str | None:
    """The dataset whose ``metric`` stands for the run: the first that has it."""
    return next((dataset for dataset, metrics in datasets.items() if metric in metrics), None)


def headline(history: Mapping[str, Curve], datasets: Mapping[str, Mapping[str, Curve]]) -> list[Result]:
    """The last value of what matters, as far as it was logged."""
    results = []
    if "train/loss" in history:
        accuracy = history.get("train/accuracy")
        note = f"in-batch accuracy {formats.percent(accuracy.last)}" if accuracy else ""
        results.append(Result("train loss", formats.fixed(history["train/loss"].last), note))
    results += _held_out(datasets)
    if "train/pairs_per_second" in history:
        wait = history.get("train/data_wait_share")
        note = f"median; {formats.percent(_median(wait))} waiting for data" if wait else "median"
        results.append(Result("pairs/s", formats.count(_median(history["train/pairs_per_second"])), note))
    seconds = training_seconds(history)
    if seconds is not None:
        results.append(Result("training time", formats.duration(seconds), "without evaluation"))
    return results


def _held_out(datasets: Mapping[str, Mapping[str, Curve]]) -> list[Result]:
    results = []
    for metric in ("loss", *HEADLINE_SHARES):
        dataset = leading(datasets, metric)
        if dataset is None:
            continue
        curve, of = datasets[dataset][metric], [dataset] if metric == "loss" or len(datasets) > 1 else []
        if metric == "loss":
            best = int(np.argmin(np.where(np.isfinite(curve.values), curve.values, np.inf)))
            if best < len(curve.values) - 1:
                of.append(f"lowest {formats.fixed(curve.values[best])} at step {curve.steps[best]:,.0f}")
            results.append(Result("held-out loss", formats.fixed(curve.last), ", ".join(of)))
            continue
        looser = HEADLINE_SHARES[metric]
        if looser in datasets[dataset]:
            of.append(f"{EVALUATION_NAMES[looser]} {formats.percent(datasets[dataset][looser].last)}")
        results.append(Result(EVALUATION_NAMES[metric], formats.percent(curve.last), ", ".join(of)))
    return results


def results_table(datasets: Mapping[str, Mapping[str, Curve]]) -> tuple[Sequence[str], dict[str, list[str]]]:
    """The last value of every known evaluation: column names, and a row for each dataset."""
    names = EVALUATION_NAMES | EVALUATION_COUNTS
    known = [metric for metric in names if any(metric in metrics for metrics in datasets.values())]
    rows = {
        dataset: [_cell(metric, metrics[metric].last) if metric in metrics else "" for metric in known]
        for dataset, metrics in datasets.items()
    }
    return [names[metric] for metric in known], {name: row for name, row in rows.items() if any(row)}


def training_seconds(history: Mapping[str, Curve]) -> float | None:
    """The time spent in training steps: pairs over pairs per second, summed over the logged stretches.

    Evaluation, checkpoints and the hours between a kill and its restart are not in it; None where not logged.
    """
    if "train/pairs" not in history or "train/pairs_per_second" not in history:
        return None
    pairs, rate = history["train/pairs"], history["train/pairs_per_second"]
    rates = np.interp(pairs.steps, rate.steps, rate.values)
    seconds = np.divide(np.diff(pairs.values, prepend=0), rates, out=np.zeros_like(rates), where=rates > 0)
    return float(np.sum(seconds[np.isfinite(seconds)]))


def _median(curve: Curve) -> float:
    finite = curve.values[np.isfinite(curve.values)]
    return float(np.median(finite)) if finite.size else float("nan")


def _cell(metric: str, value: float) -> str:
    if metric in EVALUATION_COUNTS:
        return formats.number(value)
    return formats.fixed(value) if metric == "loss" else formats.percent(value)
