"""Labels of tar shards: every ``.cls`` is a line of ``classnames.txt``, counted from 0, or the source is refused."""

from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple, Self

from clip_jax.errors import UserError

FILE = "classnames.txt"
"""One line per class, beside the shards, as CLIP_benchmark and OpenCLIP have it."""


class Labels(NamedTuple):
    """What there is to know of the labels of shards before their classes are known; can be stored as JSON."""

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
        """These and those of another shard."""
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
    where: str, folders: Sequence[Path], labels: Labels, samples: int
) -> tuple[tuple[str, ...], tuple[str, ...]]:
    """The names of the classes, empty where labels are not used; and notes for the header. Raises UserError."""
    tables = {folder / FILE: _read(folder / FILE) for folder in folders if (folder / FILE).is_file()}
    if not tables or not labels.count:
        return (), ()
    file, names = next(iter(tables.items()))
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
        raise UserError(
            f"{where}: {problem}; labels are 0..{len(names) - 1}, the lines of {file}: correct them, or rename that "
            "file to ignore labels"
        )
    if labels.count < samples:
        return (), (f"labels are not used: only {labels.count} of {samples} samples have a .cls",)
    return names, ()


def _read(file: Path) -> tuple[str, ...]:
    try:
        lines = [line.strip() for line in file.read_text(encoding="utf-8-sig").rstrip().split("\n")]
    except UnicodeDecodeError as error:
        raise UserError(f"{file}: not UTF-8 text (byte {error.start}); save it as UTF-8") from error
    if not all(lines):
        raise UserError(f"{file}, line {lines.index('') + 1}: empty; every line is the name of a class")
    return tuple(lines)
