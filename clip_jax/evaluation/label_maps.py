"""Labels that are not the data's own: ReaL's sets of right classes, ObjectNet's map to ImageNet, restricted classes.

A map is a JSON file:

- a list, for each example in the order of the source the classes that are right, as ReaL's ``real.json``; examples
  without any are left out (Beyer et al. 2020);
- an object, for each class of the data the classes that are right, as ObjectNet's ``objectnet_to_imagenet_1k.json``;
  other classes of the data are left out, and only classes that occur in the map are predicted (Barbu et al. 2019).

A class is an index from 0, or a name; several names in one text are separated by ``;``. A restriction is a text file
with one class per line: no other is predicted, as ImageNet-A and -R are defined. It changes accuracy by tens of points.
"""

import hashlib
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from jaxtyping import Int

from clip_jax.errors import UserError, nearest
from clip_jax.evaluation import prompts, zero_shot
from clip_jax.evaluation.subject import Ensemble, Result, Task, class_probabilities, judge_probabilities


class LabelMap(NamedTuple):
    """The right classes of every example."""

    fingerprint: str
    by_example: tuple[tuple[int, ...], ...] | None
    by_class: tuple[tuple[int, ...], ...] | None
    only: tuple[int, ...] | None
    """The classes among which the nearest is chosen; None: all."""

    def right(self, indices: Int[np.ndarray, " n"], labels: Int[np.ndarray, " n"]) -> Int[np.ndarray, "n k"]:
        """The right classes, padded with -1, of examples with these indices and labels of the data."""
        if self.by_example is not None:
            found = [self.by_example[i] for i in indices.tolist()]
        elif self.by_class is not None:
            found = [self.by_class[label] for label in labels.tolist()]
        else:
            found = [(label,) for label in labels.tolist()]
        if self.only is not None:
            allowed = set(self.only)
            found = [tuple(c for c in each if c in allowed) for each in found]
        width = max(1, *map(len, found))
        return np.array([[*each, *[-1] * (width - len(each))] for each in found], np.int64)


def read(
    path: str | None, only: str | None, source_classes: Sequence[str], classes: Sequence[str], examples: int
) -> LabelMap:
    """The map of a file, the restriction of another; ``classes`` are those that are predicted. Raises UserError."""
    by_example = by_class = restriction = None
    digest = hashlib.sha256(json.dumps(list(classes)).encode())
    if path is not None:
        content = _json(path)
        digest.update(json.dumps(content).encode())
        if isinstance(content, list):
            if len(content) != examples:
                raise UserError(f"{path}: {len(content)} lists of classes for {examples} examples of the data")
            by_example = tuple(_classes(each, classes, f"{path}, entry {i}") for i, each in enumerate(content))
        else:
            known = {name: _classes(each, classes, f"{path}, {name}") for name, each in content.items()}
            by_class = tuple(known.get(name, ()) for name in source_classes)
            if not any(by_class):
                raise UserError(f"{path}: none of its classes is one of the data, such as {source_classes[0]!r}")
            restriction = tuple(sorted({c for each in by_class for c in each}))
    if only is not None:
        lines = [line.strip() for line in _text(only).splitlines() if line.strip()]
        digest.update("\n".join(lines).encode())
        restriction = tuple(sorted({c for line in lines for c in _classes(line, classes, only)}))
        if not restriction:
            raise UserError(f"{only}: empty; it needs one class per line")
    return LabelMap(digest.hexdigest()[:16], by_example, by_class, restriction)


def protocol(task: Task, models: Ensemble) -> Result:
    """Top-1 and top-5 under a map; ``left_out`` examples have no right class. Raises UserError if that is all."""
    found = models[0][0].embed(task.source, texts=False)
    right = task.labels.right(found.indices, found.labels)
    used = (right >= 0).any(axis=1)
    if not used.any():
        raise UserError(f"{task.name}: no example has a right class under these labels")
    probabilities = class_probabilities(task, models)
    judged = judge_probabilities(probabilities[used], right[used], models, only=task.labels.only)
    scores = zero_shot.scores(judged, None, judged.classes)
    metrics = {name: value for name, value in scores.items() if name != "mean_per_class"}
    metrics |= {"classes": judged.classes, "left_out": int(np.sum(~used))}
    wanted = prompts.for_model(task.prompts, models[0][0].tokenizer).fingerprint
    hits, details = {"top1": judged.hits()}, {"all_equal": judged.all_equal}
    return Result(metrics, "top1", int(used.sum()), found.skipped.total(), wanted, hits, {}, details)


def _classes(given: Any, classes: Sequence[str], where: str) -> tuple[int, ...]:
    found: list[int] = []
    for each in given if isinstance(given, list) else [given]:
        for name in each.split(";") if isinstance(each, str) else [each]:
            found.append(_class(name.strip() if isinstance(name, str) else name, classes, where))
    return tuple(dict.fromkeys(found))


def _class(given: Any, classes: Sequence[str], where: str) -> int:
    if isinstance(given, str) and given in classes:
        return list(classes).index(given)
    number = int(given) if isinstance(given, int) or (isinstance(given, str) and given.isdigit()) else -1
    if not 0 <= number < len(classes):
        raise UserError(
            f"{where}: {given!r} is none of the {len(classes)} classes{nearest(str(given), classes)}; --class-names "
            "names them, and indices count from 0"
        )
    return number


def _json(path: str) -> list | dict:
    try:
        found = json.loads(_text(path))
    except ValueError as error:
        raise UserError(f"{path}: not JSON ({error})") from error
    if not isinstance(found, list | dict):
        raise UserError(f"{path}: neither a list with an entry per example nor an object with one per class")
    return found


def _text(path: str) -> str:
    try:
        return Path(path).expanduser().read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        reason = getattr(error, "strerror", None) or "not UTF-8"
        raise UserError(f"{path}: cannot be read ({reason})") from error
