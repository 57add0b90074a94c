"""``report.html`` of an evaluation: one self-contained page from the stored records and a few pictures."""

from collections.abc import Callable, Mapping, Sequence
from html import escape
from typing import Any

import numpy as np
from jaxtyping import UInt8

from clip_jax.reports import document, formats
from clip_jax.reports.gallery import picture_styles
from clip_jax.reports.history import Curve
from clip_jax.reports.plots import HELD_OUT_COLORS, SMALL, Line, figure

Record = Mapping[str, Any]
Pictures = Callable[[str, int], UInt8[np.ndarray, "side side 3"]]
"""(dataset, index in its source) -> a picture; all of one size."""
PLAIN = {"C", "captions_per_image", "classes", "classes_left_out", "fitted_scale", "left_out", "shots_equal_zero_shot"}
"""Metrics that are not fractions of 1."""
ALIASES = ("acc1", "acc5", "mean_per_class_recall", "image_retrieval_", "text_retrieval_")
"""CLIP_benchmark's names of metrics that have ours, too."""


def render(title: str, records: Sequence[Record], pictures: Pictures, notes: Sequence[str] = ()) -> str:
    """The page. Models are compared task by task, in the order of the records; the notes are below the first table."""
    models = list(dict.fromkeys(r["model"] for r in records))
    tasks: dict[str, list[Record]] = {}
    for record in records:
        tasks.setdefault(record["dataset"], []).append(record)
    shown = _Shown(pictures)
    rows = {}
    for dataset, found in tasks.items():
        values = {r["model"]: r["metrics"].get(r["main_metric"]) for r in found}
        rows[f"{dataset} ({found[0]['main_metric']})"] = [_value("", values.get(m)) for m in models]
    main = document.results("dataset", models, rows) + "".join(f"<p>{escape(note)}</p>\n" for note in notes)
    body = f"<h1>{escape(title)}</h1>\n" + document.section("Main metrics", main)
    body += "".join(_task(dataset, found, shown) for dataset, found in tasks.items())
    return document.page(title, body, shown.styles())


class _Shown:
    """The pictures of the page, each embedded once."""

    def __init__(self, pictures: Pictures):
        self._pictures, self._numbers, self._images = pictures, {}, []

    def picture(self, dataset: str, index: int, *, right: bool = False) -> str:
        if (dataset, index) not in self._numbers:
            self._numbers[dataset, index] = len(self._images)
            self._images.append(self._pictures(dataset, index))
        i, label = self._numbers[dataset, index], f"{dataset} {index}"
        picture = f'<span class="picture i{i}" role="img" aria-label="{escape(label)}" title="{escape(label)}"></span>'
        return f'<span class="found{" right" if right else ""}">{picture}</span>'

    def styles(self) -> str:
        return picture_styles(np.stack(self._images), range(len(self._images))) if self._images else ""


def _task(dataset: str, records: Sequence[Record], shown: _Shown) -> str:
    names = list(dict.fromkeys(n for r in records for n in r["metrics"] if not n.startswith(ALIASES)))
    rows = {name: [_value(name, r["metrics"].get(name)) for r in records] for name in names}
    skipped = f", {records[0]['skipped']} skipped" if records[0]["skipped"] else ""
    note = f"{records[0]['source']}: {records[0]['examples']:,} images{skipped}"
    note += f"; prompts {records[0]['prompts']}" if records[0].get("prompts") else ""
    content = document.results("metric", [r["model"] for r in records], rows)
    content += document.panels([f for r in records for f in _figures(r, len(records) > 1)], "small")
    for record in records:
        shown_of = _confusion(record) + _iou(record["details"]) + _examples(dataset, record["details"], shown)
        if record["details"].get("all_equal"):
            shown_of = '<p class="warning">All its scores are equal.</p>' + shown_of
        if shown_of:
            content += (f"<h3>{escape(record['model'])}</h3>" if len(records) > 1 else "") + shown_of
    return document.section(dataset, content, note)


def _examples(dataset: str, details: Mapping[str, Any], shown: _Shown) -> str:
    """The worst classes with some of their images, and captions with the images that they retrieve."""
    strips = ""
    for worst in details.get("worst_classes", ())[:4]:
        if worst["examples"]:
            strip = "".join(shown.picture(dataset, index) for index in worst["examples"])
            text = f"{worst['class']}: {formats.percent(worst['top1'])} of {worst['images']} images"
            strips += _strip(text, f"mostly taken for {worst['taken_for']}", strip)
    for entry in details.get("gallery", ()):
        strip = "".join(shown.picture(dataset, i, right=i == entry["image"]) for i in entry["nearest"])
        if entry["image"] not in entry["nearest"]:
            strip += f'<span class="gap">…</span>{shown.picture(dataset, entry["image"], right=True)}'
        strips += _strip(entry["caption"], f"its image ranks {entry['rank']}", strip)
    return f'<div class="captions">{strips}</div>' if strips else ""


def _figures(record: Record, several: bool) -> list[tuple[str, str]]:
    figures = []
    for i, (title, points) in enumerate(record["curves"].items()):
        if not points:
            continue
        x, y = np.array(points, float).T
        name = f"{title}, {record['model']}" if several else title
        line = Line(Curve(x, y), HELD_OUT_COLORS[i % len(HELD_OUT_COLORS)])
        description = f"{record['dataset']} {name}"
        figures.append((name, figure([line], description=description, size=SMALL, percent=True)))
    return figures


def _confusion(record: Record) -> str:
    if "confusion" not in record["details"]:
        return ""
    counts = np.array(record["details"]["confusion"]["counts"])
    names = record["details"]["confusion"]["classes"]
    share = counts / np.maximum(counts.sum(axis=1, keepdims=True), 1)
    head = "".join(f'<th scope="col" title="{escape(name)}">{i + 1}</th>' for i, name in enumerate(names))
    body = ""
    for i, name in enumerate(names):
        cells = "".join(
            f'<td class="{"right " if i == j else ""}{"dark" if share[i, j] > 0.8 else ""}"'
            f' style="--v:{share[i, j]:.2f}">{counts[i, j] or ""}</td>'
            for j in range(len(names))
        )
        body += f'<tr><th scope="row">{escape(name)} {i + 1}</th>{cells}</tr>'
    table = (
        f'<table class="matrix" style="--n:{len(names)}"><thead><tr><td></td>{head}</tr></thead><tbody>{body}</tbody>'
    )
    return (
        "<details><summary>Confusion matrix (rows: the right class)</summary>"
        f'<div class="scroll">{table}</table></div></details>'
    )


def _iou(details: Mapping[str, Any]) -> str:
    """Intersection over union by class, the lowest first."""
    if "iou" not in details:
        return ""
    rows = {name: [formats.percent(value)] for name, value in details["iou"]}
    table = document.results("class", ["intersection over union"], rows)
    return f"<details><summary>Classes</summary>{table}</details>"


def _strip(caption: str, verdict: str, pictures: str) -> str:
    return (
        f'<figure class="retrieved"><figcaption><span class="caption">{escape(caption)}</span>'
        f'<small>{escape(verdict)}</small></figcaption><div class="strip">{pictures}</div></figure>'
    )


def _value(name: str, value: float | None) -> str:
    if value is None:
        return "none"
    plain = name in PLAIN or name.endswith("_rank")
    return formats.number(value) if plain else formats.percent(value)
