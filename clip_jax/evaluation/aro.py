"""ARO (Yuksekgonul et al. 2023, arXiv 2210.01936): who does what to whom, whose color is it, in which order?

    DIR/visual_genome_relation.json, DIR/visual_genome_attribution.json, DIR/images/     one of the two or both
    DIR/coco_karpathy_test.json, DIR/val2014/      or flickr30k_test.json, flickr30k-images/; also _val

The layouts are those that the authors' loaders read (github.com/mertyg/vision-language-models-are-bows,
``dataset_zoo/aro_datasets.py``). A row of Visual Genome has an image, the box of both objects in pixels, to which the
image is cropped, and a true and a false caption. The metric is the mean over relations, and over pairs of attributes
with at least 25 examples, as theirs; the paper then leaves out symmetric relations ("next to"), which this does not.

Trap: the files of captions have no false ones: ARO shuffles their words when it is run, with two taggers and unseeded
generators, so that no two results are about the same captions. Here are the two of its four shuffles that need no
tagger, seeded by the caption; each is compared with the true one by itself, where ARO ranks five. A shuffle that
changes nothing is left out.
"""

import itertools
import json
import re
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

from clip_jax.errors import UserError
from clip_jax.evaluation import layouts
from clip_jax.evaluation.composition import all_equal, true_caption_wins
from clip_jax.evaluation.subject import Ensemble, Result, Task, mean_cosines

PAIRS = {"visual_genome_relation.json": "relation", "visual_genome_attribution.json": "attribution"}
LEAST = {"relation": 1, "attribution": 25}
"""Examples with which a relation, or a pair of attributes, is part of the mean."""
CAPTIONS = tuple(f"{name}_{split}.json" for name in ("coco_karpathy", "flickr30k") for split in ("test", "val"))
MAX_WORDS = 30
SHUFFLES = ("within_trigrams", "trigrams")


def is_aro(folder: Path) -> bool:
    return any((folder / name).is_file() for name in PAIRS)


def open_aro(folder: Path) -> layouts.Captioned:
    """Every image, cropped, with its true and its false caption; groups are ``relation: on``. Raises UserError."""
    files, texts, groups, crops = [], [], [], []
    for name, kind in PAIRS.items():
        for where, row in _rows(folder / name) if (folder / name).is_file() else ():
            files.append(layouts.image_file(folder, layouts.text(row, "image_path", where)))
            texts.append(tuple(layouts.text(row, f"{truth}_caption", where) for truth in ("true", "false")))
            crops.append(_crop(row, where))
            name = row.get("relation_name") if kind == "relation" else row.get("attributes")
            groups.append(f"{kind}: {' '.join(name) if isinstance(name, list) else name}")
    return layouts.captioned("aro", folder, files, texts, groups, crops)


def is_captions(folder: Path) -> bool:
    return any((folder / name).is_file() for name in CAPTIONS)


def open_captions(folder: Path) -> layouts.Captioned:
    """Every image with its captions in turn, each followed by its shuffles; groups name them. Raises UserError."""
    file = next(folder / name for name in CAPTIONS if (folder / name).is_file())
    files, texts, groups = [], [], []
    for where, row in _rows(file):
        given = row.get("caption")
        given = [given] if isinstance(given, str) else given
        if not isinstance(given, list) or not all(isinstance(caption, str) for caption in given):
            raise UserError(f"{where}: no captions in the field caption")
        made = [(kind, text) for caption in given for kind, text in shuffles(plain(caption))]
        if len(made) > 1:
            files.append(layouts.image_file(folder, layouts.text(row, "image", where)))
            texts.append(tuple(text for _, text in made))
            groups.append(" ".join(kind for kind, _ in made))
    return layouts.captioned("caption_order", folder, files, texts, groups)


def plain(caption: str) -> str:
    """Lower case without punctuation, at most ``MAX_WORDS`` words: BLIP's ``pre_caption``, as ARO applies it."""
    return " ".join(re.sub(r"[.!\"()*#:;~]", " ", caption.lower()).split()[:MAX_WORDS])


def shuffles(caption: str) -> Iterator[tuple[str, str]]:
    """("true", the caption), then each shuffle of it that differs from it; nothing where none does."""
    words = caption.split()
    trigrams = [words[i : i + 3] for i in range(0, len(words), 3)]
    rng = np.random.default_rng(zlib.crc32(caption.encode()))
    inner = [[part[i] for i in rng.permutation(len(part))] for part in trigrams]
    outer = [trigrams[i] for i in rng.permutation(len(trigrams))]
    made = {kind: " ".join(itertools.chain(*parts)) for kind, parts in zip(SHUFFLES, (inner, outer), strict=True)}
    changed = [(kind, text) for kind, text in made.items() if text != caption]
    if changed:
        yield from (("true", caption), *changed)


def protocol(task: Task, models: Ensemble) -> Result:
    """``relation`` and ``attribution``: means over their groups; with ``_pairs``: over all pairs."""
    embedded = models[0][0].embed(task.source, texts=True)
    rows = np.arange(len(embedded.images))  # every image has two captions
    true, false = (mean_cosines(task, models, rows, 2 * rows + k) for k in (0, 1))
    wins, parts = true_caption_wins(true, false), np.array([task.source.groups[i] for i in embedded.indices.tolist()])
    metrics: dict[str, float | None] = {}
    by_group = []
    for kind, least in LEAST.items():
        names = sorted({part for part in parts.tolist() if part.startswith(f"{kind}: ")})
        found = [(name, float(wins[parts == name].mean()), int((parts == name).sum())) for name in names]
        means = [mean for _, mean, count in found if count >= least]
        if found:
            metrics[kind] = float(np.mean(means)) if means else None
            metrics[f"{kind}_pairs"] = sum(mean * count for _, mean, count in found) / sum(c for *_, c in found)
        by_group += found
    both = [metrics[kind] for kind in LEAST if metrics.get(kind) is not None]
    metrics["mean"] = float(np.mean(both)) if both else None
    details = {"all_equal": all_equal(true, false), "by_group": by_group}
    return Result(metrics, "mean", len(rows), embedded.skipped.total(), None, {"pairs": wins}, {}, details)


def order_protocol(task: Task, models: Ensemble) -> Result:
    """For each shuffle, the share of captions that are strictly more similar to the image than it."""
    embedded = models[0][0].embed(task.source, texts=True)
    kinds = np.array(" ".join(task.source.groups[i] for i in embedded.indices.tolist()).split())
    texts = np.arange(len(kinds))
    of_true = np.maximum.accumulate(np.where(kinds == "true", texts, 0))  # the caption that a shuffle is made of
    similarity = mean_cosines(task, models, embedded.owner, texts)
    wins = true_caption_wins(similarity[of_true], similarity)
    metrics = {kind: float(wins[kinds == kind].mean()) for kind in SHUFFLES if (kinds == kind).any()}
    metrics["mean"] = float(np.mean(list(metrics.values())))
    false = kinds != "true"
    details = {"all_equal": all_equal(similarity[of_true][false], similarity[false]), "pairs": int(false.sum())}
    skipped = embedded.skipped.total()
    return Result(metrics, "mean", len(embedded.images), skipped, None, {"pairs": wins[false]}, {}, details)


def _rows(file: Path) -> Iterator[tuple[str, dict[str, Any]]]:
    try:
        rows = json.loads(file.read_text(encoding="utf-8"))
    except ValueError as error:
        raise UserError(f"{file}: not JSON ({error})") from error
    if not isinstance(rows, list) or not rows or not all(isinstance(row, dict) for row in rows):
        raise UserError(f"{file}: not a list of objects with fields")
    return ((f"{file}, row {number}", row) for number, row in enumerate(rows))


def _crop(row: dict[str, Any], where: str) -> tuple[int, int, int, int]:
    """Left, top, right and bottom in pixels."""
    sides = [row.get(f"bbox_{side}") for side in "xywh"]
    if not all(isinstance(side, int | float) for side in sides) or min(sides[2:]) < 1:
        raise UserError(f"{where}: no box in bbox_x, bbox_y, bbox_w and bbox_h")
    x, y, width, height = map(round, sides)
    return x, y, x + width, y + height
