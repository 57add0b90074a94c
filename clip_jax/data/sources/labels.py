"""Labels of tar shards: every ``.cls`` is a line of ``classnames.txt``, counted from 0, or the source is refused."""

from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np

from clip_jax.data.sources.members import BAD_LABEL, NO_LABEL
from clip_jax.errors import UserError

FILE = "classnames.txt"
"""One line per class, beside the shards, as CLIP_benchmark and OpenCLIP have it."""


def class_names(
    where: str, folders: Sequence[Path], labels: np.ndarray, key: Callable[[int], str]
) -> tuple[tuple[str, ...], tuple[str, ...]]:
    """The names of the classes, empty without labels; and notes for the header. Raises UserError.

    ``labels`` has NO_LABEL for samples without ``.cls``; where these are mixed with others, no label is used.
    """
    tables = {folder / FILE: _read(folder / FILE) for folder in folders if (folder / FILE).is_file()}
    labeled = int((labels != NO_LABEL).sum())
    if not tables or not labeled:
        return (), ()
    file, names = next(iter(tables.items()))
    for other, others in tables.items():
        if others != names:
            raise UserError(
                f"{where}: {file} and {other} have other classes; a label can only be a line of one of them"
            )
    used = labels[labels != NO_LABEL]
    wrong = np.flatnonzero(((labels < 0) | (labels >= len(names))) & (labels != NO_LABEL))
    if len(wrong):
        value = int(labels[wrong[0]])
        said = "is no number" if value == BAD_LABEL else f"is {value}"
        one_based = BAD_LABEL not in used and used.min() == 1 and used.max() == len(names)
        hint = "; these labels count from 1: subtract 1" if one_based else ""
        raise UserError(
            f"{where}: {len(wrong)} of {labeled} labels are not in 0..{len(names) - 1}, the lines of {file}; the "
            f"first, the .cls of {key(int(wrong[0]))}, {said}{hint}; correct them, or rename that file to ignore labels"
        )
    if labeled < len(labels):
        missing = key(int(np.flatnonzero(labels == NO_LABEL)[0]))
        note = f"labels are not used: only {labeled} of {len(labels)} samples have a .cls ({missing} has none)"
        return (), (note,)
    return names, ()


def _read(file: Path) -> tuple[str, ...]:
    try:
        lines = [line.strip() for line in file.read_text(encoding="utf-8-sig").rstrip().split("\n")]
    except UnicodeDecodeError as error:
        raise UserError(f"{file}: not UTF-8 text (byte {error.start}); save it as UTF-8") from error
    if not all(lines):
        raise UserError(f"{file}, line {lines.index('') + 1}: empty; every line is the name of a class")
    return tuple(lines)
