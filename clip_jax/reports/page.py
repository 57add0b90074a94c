"""Writes ``report.html``, a self-contained page about a run, from the run folder and a gallery of held-out pairs."""

import json
from collections.abc import Mapping, Sequence
from html import escape
from pathlib import Path
from typing import Any

import numpy as np

from clip_jax.reports import document, formats, summary
from clip_jax.reports.gallery import Gallery, image_styles, matrix, retrieval
from clip_jax.reports.history import Curve, curves, read_metrics
from clip_jax.reports.plots import HELD_OUT_COLORS, SMALL, TRAIN_COLOR, Line, figure
from clip_jax.storage import atomic

# metric -> color and label, drawn in one large figure with the in-batch accuracy.
ACCURACIES = {
    "zero_shot_top1": ("orange", "zero-shot"),
    "i2t_R@1": ("teal", "i2t R@1"),
    "t2i_R@1": ("purple", "t2i R@1"),
}
# title -> color and metrics with their labels: one small figure each per evaluation.
EVALUATION_FIGURES = {
    "zero-shot": ("orange", {"zero_shot_top1": "top-1", "zero_shot_top5": "top-5"}),
    "image → text": ("teal", {"i2t_R@1": "R@1", "i2t_R@5": "R@5", "i2t_R@10": "R@10"}),
    "text → image": ("purple", {"t2i_R@1": "R@1", "t2i_R@5": "R@5", "t2i_R@10": "R@10"}),
}
SMALL_FIGURES = {
    "train/logit_scale": "logit scale",
    "train/learning_rate": "learning rate",
    "train/grad_norm": "gradient norm",
    "train/update_norm": "update norm",
    "train/param_norm": "parameter norm",
    "train/pairs_per_second": "pairs per second",
    "train/data_wait_share": "time waiting for data",
    "train/mfu": "model FLOPs utilization",
    "eval/time_seconds": "seconds per round of evaluations",
}
SHARES = {"train/data_wait_share", "train/mfu"}
LARGE_FIGURES = {"train/loss", "train/accuracy"}
# Unusable examples that the page names.
BAD_SAMPLES = 20
# Sums over the run are straight lines; the header states them in words.
CUMULATIVE = {"train/pairs", "train/flops"}


def write(workdir: Path, gallery: Gallery | None = None) -> Path:
    """Writes ``workdir/report.html`` and returns its path. Sections whose data are missing are left out."""
    history = curves(read_metrics(workdir / "metrics.jsonl"))
    html = render(workdir.name, _read_run(workdir / "run.json"), history, gallery, _bad_samples(workdir))
    path = workdir / "report.html"
    atomic.write_text(path, html)  # a browser may load the page during a run
    return path


def render(
    name: str,
    run: Mapping[str, Any],
    history: Mapping[str, Curve],
    gallery: Gallery | None,
    bad: Sequence[str] = (),
) -> str:
    """The HTML of the report of the run ``name``; ``bad`` are the lines of its ``bad_samples.txt``."""
    config = summary.mapping(run.get("config"))
    evaluations = summary.by_evaluation(history, first=gallery.evaluation if gallery is not None else "")
    body = _header(name, run, config, history)
    body += _unusable(bad)
    body += document.cards(summary.headline(history, evaluations))
    body += learning(history, evaluations, config)
    body += _optimization(history)
    body += _evaluation(evaluations)
    styles = ""
    if gallery is not None and gallery.captions:
        styles = image_styles(gallery)
        body += document.section(f"Similarity of held-out pairs: {gallery.evaluation}", matrix(gallery))
        body += document.section(f"Images retrieved by caption: {gallery.evaluation}", retrieval(gallery))
    body += _other(history, evaluations)
    if config:
        body += document.tree("Config", config)
    environment = {key: value for key, value in run.items() if key not in ("config", "model")}
    if environment:
        body += document.tree("Environment", environment)
    return document.page(f"{name}: clip_jax", body, styles)


def _header(name: str, run: Mapping[str, Any], config: Mapping[str, Any], history: Mapping[str, Curve]) -> str:
    model = summary.mapping(run.get("model"))
    described = [str(model["name"])] if "name" in model else []
    parameters = {key: n for key, n in summary.mapping(model.get("parameters")).items() if isinstance(n, int)}
    if "total" in parameters:
        towers = ", ".join(f"{key} {formats.count(n)}" for key, n in parameters.items() if key != "total")
        described.append(f"{formats.count(parameters['total'])} parameters" + (f" ({towers})" if towers else ""))

    facts = []
    if history:
        last, planned = max(curve.steps[-1] for curve in history.values()), config.get("steps")
        of = f" of {planned:,}" if isinstance(planned, int) and planned > last else ""
        facts.append(f"{last:,.0f}{of} steps")
    if isinstance(config.get("batch_size"), int):
        facts.append(f"batches of {config['batch_size']:,} pairs")
    if "train/pairs" in history:
        facts.append(f"{formats.count(history['train/pairs'].last)} pairs seen")
    if "train/flops" in history:
        facts.append(formats.flops(history["train/flops"].last))
    shares = {name: share for name, share in summary.mapping(run.get("flops_shares")).items() if share >= 0.005}
    if len(shares) > 1:
        parts = ", ".join(f"{name} {share:.0%}" for name, share in sorted(shares.items(), key=lambda item: -item[1]))
        facts.append(f"FLOPs of a step: {parts}")
    if run.get("commit"):
        facts.append(f"commit {run['commit']}")

    html = f"<h1>{escape(name)}</h1>\n"
    html += f'<p class="model">{escape(" · ".join(described))}</p>\n' if described else ""
    html += f'<p class="facts">{escape(" · ".join(facts))}</p>\n' if facts else ""
    warnings = [] if history else ["No metrics have been logged yet."]
    for metric, curve in history.items():
        broken = ~np.isfinite(curve.values)
        if broken.any():
            extent = f"{broken.sum():,} of {broken.size:,} logged steps, first at step {curve.steps[broken][0]:,.0f}"
            warnings.append(f"{metric} is not finite at {extent}.")
    return html + "".join(f'<p class="warning">{escape(warning)}</p>\n' for warning in warnings)


def learning(history: Mapping[str, Curve], evaluations: summary.Evaluations, config: Mapping[str, Any]) -> str:
    """The section on loss and accuracy, in training and on held-out data."""
    pairs = history.get("train/pairs")
    accuracies = [Line(history["train/accuracy"], TRAIN_COLOR, "in batch")] if "train/accuracy" in history else []
    for metric, (color, label) in ACCURACIES.items():
        evaluation = summary.leading(evaluations, metric)
        if evaluation is not None:
            accuracies.append(Line(evaluations[evaluation][metric], color, label))

    figures = []
    if "train/loss" in history:
        batch = config.get("batch_size")
        title = f"training loss, in batches of {batch:,}" if isinstance(batch, int) else "training loss"
        lines, reference = [Line(history["train/loss"], TRAIN_COLOR, "train")], _chance(summary.chance_loss(config))
        figures.append((title, figure(lines, description=title, pairs=pairs, reference=reference)))
    # In a figure of its own: the loss grows with the number of texts to choose from, so the two have different scales.
    held_out = {name: metrics for name, metrics in evaluations.items() if "loss" in metrics}
    for i, (name, metrics) in enumerate(held_out.items()):
        lines = [Line(metrics["loss"], HELD_OUT_COLORS[i % len(HELD_OUT_COLORS)], "held out")]
        count = f" {metrics['images'].last:,.0f}" if "images" in metrics else ""
        title = f"held-out loss, among all{count} pairs" + (f" of {name}" if len(held_out) > 1 else "")
        reference = _chance(summary.held_out_chance(config, metrics))
        figures.append((title, figure(lines, description=title, pairs=pairs, reference=reference)))
    if accuracies:
        figures.append(("accuracy", figure(accuracies, description="accuracy", percent=True, pairs=pairs)))
    return document.section("Learning", document.panels(figures, "large")) if figures else ""


def _chance(level: tuple[float, str] | None) -> tuple[float, str] | None:
    """The loss of guessing with its label, to mark in a figure."""
    return None if level is None else (level[0], f"chance: {level[1]} = {formats.fixed(level[0])}")


def _optimization(history: Mapping[str, Curve]) -> str:
    figures = []
    for metric, title in SMALL_FIGURES.items():
        if metric in history:
            scale = {"percent": metric in SHARES, "from_zero": metric.endswith("_per_second")}
            figures.append(
                (title, figure([Line(history[metric], TRAIN_COLOR)], description=title, size=SMALL, **scale))
            )
    return document.section("Optimization and throughput", document.panels(figures, "small")) if figures else ""


def _evaluation(evaluations: summary.Evaluations) -> str:
    columns, rows = summary.results_table(evaluations)
    figures = []
    for name, metrics in evaluations.items():
        for title, (color, labels) in EVALUATION_FIGURES.items():
            lines = [Line(metrics[metric], color, label) for metric, label in labels.items() if metric in metrics]
            drawn = [m for m in labels if m in ACCURACIES and summary.leading(evaluations, m) == name]
            if len(lines) > len(drawn):  # Otherwise the figure of accuracies has all of them.
                title = f"{title}, {name}"
                figures.append((title, figure(lines, description=title, size=SMALL, percent=True)))
    content = document.results("evaluation", columns, rows) + document.panels(figures, "small")
    return document.section("Evaluation", content) if rows else ""


def _other(history: Mapping[str, Curve], evaluations: summary.Evaluations) -> str:
    """A plain curve for every metric that no other section shows."""
    shown = {*LARGE_FIGURES, *SMALL_FIGURES, *CUMULATIVE}
    known = {*summary.EVALUATION_NAMES, *summary.EVALUATION_COUNTS}
    shown.update(f"eval/{name}/{metric}" for name in evaluations for metric in known)
    figures = [
        (name, figure([Line(curve, TRAIN_COLOR)], description=name, size=SMALL))
        for name, curve in history.items()
        if name not in shown
    ]
    return document.section("Other metrics", document.panels(figures, "small")) if figures else ""


def _bad_samples(workdir: Path) -> list[str]:
    """The lines of every process's list of unusable examples."""
    files = sorted(workdir.glob("bad_samples*.txt"))
    texts = [file.read_text(encoding="utf-8", errors="replace") for file in files]
    return [line for text in texts for line in text.splitlines() if line.strip()]


def _unusable(bad: Sequence[str]) -> str:
    """A warning that names the first unusable examples; empty if there is none."""
    if not bad:
        return ""
    listed = "".join(f"<li>{escape(line)}</li>" for line in bad[:BAD_SAMPLES])
    more = f"<p>and {len(bad) - BAD_SAMPLES:,} more in bad_samples.txt</p>" if len(bad) > BAD_SAMPLES else ""
    summary_line = f"Bad samples: {len(bad):,} listed; others took their places in training."
    return f'<details class="warning"><summary>{escape(summary_line)}</summary><ul>{listed}</ul>{more}</details>\n'


def _read_run(path: Path) -> Mapping[str, Any]:
    """``run.json``; empty if it is missing or damaged, because the curves are worth a page without it."""
    try:
        return summary.mapping(json.loads(path.read_text(encoding="utf-8")))
    except (OSError, ValueError):
        return {}
