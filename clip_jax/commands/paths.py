"""The image files that a user means by paths, folders and patterns."""

import glob
from collections.abc import Iterable, Iterator
from pathlib import Path

from clip_jax.data.images import ENDINGS
from clip_jax.errors import UserError


def find_images(given: Iterable[str]) -> list[Path]:
    """Files in the order given; those of a folder, at any depth, and of a pattern (``*``, ``?``, ``**``) by name.

    A path that exists is a path, whatever characters it has. Raises UserError if one names no image.
    """
    return [path for text in given for path in _found(text)]


def _found(text: str) -> Iterator[Path]:
    path = Path(text).expanduser()
    if path.is_dir():
        found = sorted(p for p in path.rglob("*") if p.suffix.lower().lstrip(".") in ENDINGS and p.is_file())
        what = f"no image in this folder ({', '.join(ENDINGS)})"
    elif path.exists() or not glob.has_magic(text):
        found, what = [path], ""  # a missing file is reported when it is opened
    else:
        found = sorted(p for p in map(Path, glob.glob(str(path), recursive=True)) if p.is_file())
        what = "no file matches this pattern"
    if not found:
        raise UserError(f"{text}: {what}")
    yield from found
