"""The results of a run in a few numbers: the headline of the page and its table of evaluations.

Evaluations are inferred from the names of the metrics, ``eval/<evaluation>/<metric>``.
"""

import math
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from clip_jax.reports import formats
from clip_jax.reports.history import Curve

# metric -> its displayed name, in the order of the table's columns.
EVALUATION_NAMES = {
    "loss": "loss",
    "zero_shot_top1": "zero-shot top-1",
    "zero_shot_top5": "top-5",
    "i2t_R@1": "image → text R@1",
    "i2t_R@5": "R@5",
    "i2t_R@10": "R@10",
    "i2t_median_rank": "median rank",
    "i2t_mean_rank": "mean rank",
    "i2t_mAP": "mAP",
    "t2i_R@1": "text → image R@1",
    "t2i_R@5": "R@5",
    "t2i_R@10": "R@10",
    "t2i_median_rank": "median rank",
    "t2i_mean_rank": "mean rank",
    "t2i_mAP": "mAP",
}
# What is not a share of 1.
NUMBERS = {"loss", *(f"{way}_{rank}_rank" for way in ("i2t", "t2i") for rank in ("median", "mean"))}
# Counts of an evaluation appear only in the table: their curves are flat.
EVALUATION_COUNTS = {"images": "images", "skipped": "skipped", "time_seconds": "seconds"}
# Accuracies and recalls of the headline, each with a more lenient metric for its note.
HEADLINE_SHARES = {"zero_shot_top1": "zero_shot_top5", "i2t_R@1": "i2t_R@5", "t2i_R@1": "t2i_R@5"}


Evaluations = Mapping[str, Mapping[str, Curve]]
"""evaluation -> metric -> curve."""


class Result(NamedTuple):
    """A formatted number with its label; ``note`` adds context."""

    label: str
    value: str
    note: str = ""


def by_evaluation(history: Mapping[str, Curve], first: str = "") -> dict[str, dict[str, Curve]]:
    """The metrics of every evaluation, in order of appearance; the evaluation ``first``, if any, comes first."""
    evaluations: dict[str, dict[str, Curve]] = {first: {}}
    for name, curve in history.items():
        evaluation, _, metric = name.removeprefix("eval/").rpartition("/")
        if name.startswith("eval/") and evaluation:
            evaluations.setdefault(evaluation, {})[metric] = curve
    return {evaluation: metrics for evaluation, metrics in evaluations.items() if metrics}


def leading(evaluations: Evaluations, metric: str) -> str | None:
    """The evaluation whose ``metric`` represents the run: the first that has it."""
    return next((evaluation for evaluation, metrics in evaluations.items() if metric in metrics), None)


def chance_loss(config: Mapping[str, Any]) -> tuple[float, str] | None:
    """The training loss of a random model, with its formula: ln(batch size) for the softmax loss alone.

    None for other losses and for sums of several objectives. ``config`` is that of ``run.json``, with either a
    ``loss`` section or one section per objective, ``objectives.<name>``; whatever it lacks gives None, too.
    """
    objectives = {name: mapping(section) for name, section in mapping(config.get("objectives")).items()}
    objectives = {name: section for name, section in objectives.items() if section.get("weight", 1.0)}
    if objectives:
        contrastive = objectives.get("contrastive", {})
        name, weight = contrastive.get("loss") if len(objectives) == 1 else None, contrastive.get("weight", 1.0)
    else:
        name, weight = mapping(config.get("loss")).get("name"), 1.0
    batch_size = config.get("batch_size")
    if name != "softmax" or not isinstance(weight, int | float) or not isinstance(batch_size, int) or batch_size < 2:
        return None
    return weight * math.log(batch_size), f"ln {batch_size:,}" if weight == 1 else f"{weight:g} ln {batch_size:,}"


def held_out_chance(config: Mapping[str, Any], metrics: Mapping[str, Curve]) -> tuple[float, str] | None:
    """The held-out loss of a random model, with its formula: ln(pairs), for all pairs are one batch, and no weight.

    None for the sigmoid loss, or where the number of pairs was not logged or changed during the run.
    """
    section = mapping(mapping(config.get("objectives")).get("contrastive")) or mapping(config.get("loss"))
    counts = {int(count) for count in metrics["images"].values} if "images" in metrics else set()
    if section.get("loss", section.get("name")) != "softmax" or len(counts) != 1 or min(counts) < 2:
        return None
    (pairs,) = counts
    return math.log(pairs), f"ln {pairs:,}"


def mapping(value: Any) -> Mapping[str, Any]:
    """``value``, or an empty mapping where a damaged or foreign ``run.json`` has something else."""
    return value if isinstance(value, Mapping) else {}


def headline(history: Mapping[str, Curve], evaluations: Evaluations) -> list[Result]:
    """The last value of each main metric that was logged."""
    results = []
    if "train/loss" in history:
        accuracy = history.get("train/accuracy")
        note = f"in-batch accuracy {formats.percent(accuracy.last)}" if accuracy else ""
        results.append(Result("train loss", formats.fixed(history["train/loss"].last), note))
    results += _held_out(evaluations)
    if "train/pairs_per_second" in history:
        wait = history.get("train/data_wait_share")
        note = f"median; {formats.percent(_median(wait))} waiting for data" if wait else "median"
        results.append(Result("pairs/s", formats.count(_median(history["train/pairs_per_second"])), note))
    seconds = training_seconds(history)
    if seconds is not None:
        results.append(Result("training time", formats.duration(seconds), "without evaluation"))
    return results


def _held_out(evaluations: Evaluations) -> list[Result]:
    results = []
    for metric in ("loss", *HEADLINE_SHARES):
        evaluation = leading(evaluations, metric)
        if evaluation is None:
            continue
        curve = evaluations[evaluation][metric]
        notes = [evaluation] if metric == "loss" or len(evaluations) > 1 else []
        if metric == "loss":
            best = int(np.argmin(np.where(np.isfinite(curve.values), curve.values, np.inf)))
            if best < len(curve.values) - 1:
                notes.append(f"lowest {formats.fixed(curve.values[best])} at step {curve.steps[best]:,.0f}")
            results.append(Result("held-out loss", formats.fixed(curve.last), ", ".join(notes)))
            continue
        lenient = HEADLINE_SHARES[metric]
        if lenient in evaluations[evaluation]:
            notes.append(f"{EVALUATION_NAMES[lenient]} {formats.percent(evaluations[evaluation][lenient].last)}")
        results.append(Result(EVALUATION_NAMES[metric], formats.percent(curve.last), ", ".join(notes)))
    return results


def results_table(evaluations: Evaluations) -> tuple[Sequence[str], dict[str, list[str]]]:
    """The last value of every known metric: the names of the columns, and one row per evaluation."""
    names = EVALUATION_NAMES | EVALUATION_COUNTS
    known = [metric for metric in names if any(metric in metrics for metrics in evaluations.values())]
    rows = {
        evaluation: [_cell(metric, metrics[metric].last) if metric in metrics else "" for metric in known]
        for evaluation, metrics in evaluations.items()
    }
    return [names[metric] for metric in known], {name: row for name, row in rows.items() if any(row)}


def training_seconds(history: Mapping[str, Curve]) -> float | None:
    """The time spent in training steps: pairs divided by pairs per second, summed over the log lines.

    It excludes evaluations, checkpoints and the time between a kill and a restart. None if not logged.
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
    return formats.fixed(value) if metric in NUMBERS else formats.percent(value)
