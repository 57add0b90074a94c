"""Labels of tar shards: every ``.cls`` is a line of ``classnames.txt``, counted from 0, or the source is refused."""

import os
from collections.abc import Sequence
from typing import NamedTuple, Self

from clip_jax.errors import UserError
from clip_jax.storage import ranges
from clip_jax.storage.remote import RefusedError

FILE = "classnames.txt"
"""One line per class, beside the shards, as CLIP_benchmark and OpenCLIP have it."""


class Labels(NamedTuple):
    """Statistics of the labels in shards, collected before the classes are known; can be stored as JSON."""

    count: int = 0
    bad: int = 0
    """Labels that are no number from 0."""
    first_bad: str = ""
    lowest: int = 2**31
    lowest_name: str = ""
    highest: int = -1
    highest_name: str = ""

    def with_label(self, data: bytes, name: str) -> Self:
        """One more label, the content of a ``.cls``."""
        number = parse(data)
        if number < 0:
            return self.with_labels(Labels(count=1, bad=1, first_bad=name))
        return self.with_labels(Labels(1, 0, "", number, name, number, name))

    def with_labels(self, more: Self) -> Self:
        """The combined statistics of these labels and another shard's."""
        low, high = min(self, more, key=lambda s: s.lowest), max(self, more, key=lambda s: s.highest)
        return Labels(
            self.count + more.count,
            self.bad + more.bad,
            self.first_bad or more.first_bad,
            low.lowest,
            low.lowest_name,
            high.highest,
            high.highest_name,
        )


def parse(data: bytes) -> int:
    """The number in a ``.cls``; -1 for what is no number from 0."""
    text = data.strip()
    return int(text) if text.isdigit() and len(text) < 10 else -1


def class_names(
    where: str, folders: Sequence[str], labels: Labels, samples: int, given: Sequence[str] | None = None
) -> tuple[tuple[str, ...], tuple[str, ...]]:
    """The names of the classes, empty if labels are not used; and notes for the header. Raises UserError.

    They are read from a file in one of ``folders`` (paths or URLs), unless they are ``given``: then all need a label.
    """
    if given is not None:
        file, names, way_out = "", tuple(given), "name the classes of these labels"
        if labels.count < samples:
            raise UserError(f"{where}: only {labels.count} of {samples} samples have a label, a .cls")
    else:
        tables = _find(folders) if labels.count else {}
        if not tables:
            return (), ()
        file, names = next(iter(tables.items()))
        way_out = "correct them, or rename that file to ignore labels"
        for other, others in tables.items():
            if others != names:
                raise UserError(
                    f"{where}: {file} and {other} have other classes; a label can only be a line of one of them"
                )
    problem = ""
    if labels.bad:
        problem = f"{labels.bad} of {labels.count} labels are no numbers from 0 (first: {labels.first_bad})"
    elif labels.highest >= len(names):
        problem = f"the label of {labels.highest_name} is {labels.highest}"
        if (labels.lowest, labels.highest) == (1, len(names)):
            problem += " and none is 0: they count from 1, subtract 1"
    if problem:
        known = f", the lines of {file}" if file else ""
        raise UserError(f"{where}: {problem}; labels are 0..{len(names) - 1}{known}: {way_out}")
    if labels.count < samples:
        return (), (f"labels are not used: only {labels.count} of {samples} samples have a .cls",)
    return names, ()


def _find(folders: Sequence[str]) -> dict[str, tuple[str, ...]]:
    found = {}
    for file in (os.path.join(folder, FILE) for folder in folders):
        try:
            known = ranges.stat(file)
        except (FileNotFoundError, RefusedError):
            # A bucket that may not be listed forbids what is not there. An outage must not pass for no classes.
            continue
        found[file] = _names(file, ranges.reader(file, known)(0, known.size))
    return found


def _names(file: str, content: bytes) -> tuple[str, ...]:
    try:
        lines = [line.strip() for line in content.decode("utf-8-sig").rstrip().split("\n")]
    except UnicodeDecodeError as error:
        raise UserError(f"{file}: not UTF-8 text (byte {error.start}); save it as UTF-8") from error
    if not all(lines):
        raise UserError(f"{file}, line {lines.index('') + 1}: empty; every line is the name of a class")
    return tuple(lines)
