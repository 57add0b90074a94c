"""The files that a source names: a file, a folder, a glob, a range in braces, or several of these.

    /data/{00000..41455}.tar      numbers, with their zeros; {a,b} are alternatives
    a/*.tar,b/*.tar               several, separated by commas or, as OpenCLIP writes them, by ::

A path that exists is a path, whatever characters are in it, and so are the folders of a pattern that exist.
"""

import glob
import itertools
import os
import re
from collections.abc import Iterator, Sequence

from clip_jax.errors import UserError
from clip_jax.storage import remote

RANGE = re.compile(r"(\d+)\.\.(\d+)")
BRACES = re.compile(r"\{([^{}]*,[^{}]*|\d+\.\.\d+)\}")
COMMA = re.compile(r",(?![^{}]*\})")
"""A comma outside of braces."""
NUMBERED = re.compile(r"-\d{5}-of-\d{5}$")
MAX_FILES = 10_000_000
MAX_RUN = 8
"""Parts between commas that are tried as one file name."""


def files(where: str, suffixes: Sequence[str]) -> list[str]:
    """The files in order; a folder stands for its files that end in one of ``suffixes``. Raises UserError."""
    parts = [where] if os.path.exists(os.path.expanduser(where)) else where.split("::")
    found = [file for part in parts for file in _of_list(part, suffixes)]
    if len(found) > MAX_FILES:
        raise UserError(f"{where}: {len(found)} files; name fewer")
    return found


def _of_list(where: str, suffixes: Sequence[str]) -> Iterator[str]:
    """The files of patterns that are separated by commas."""
    parts = COMMA.split(where)
    while parts:
        # The longest sequence of parts that names existing files: a comma may belong to a name.
        for count in range(min(len(parts), MAX_RUN), 0, -1):
            found = _find(",".join(parts[:count]), suffixes)
            if found or count == 1:
                break
        yield from found or _refuse(parts[0], suffixes)
        parts = parts[count:]


def _find(pattern: str, suffixes: Sequence[str]) -> list[str]:
    """The files of one pattern, empty if there are none. Raises UserError if some of a range are missing."""
    if remote.is_remote(pattern):  # missing ones are reported when they are opened, several at a time
        if COMMA.search(pattern):  # in a URL a comma is %2C
            return []
        return [file for path in braces(pattern) for file in _remote(path, suffixes)]
    pattern = os.path.expanduser(pattern)
    if os.path.isdir(pattern):
        return [os.path.join(pattern, name) for name in sorted(os.listdir(pattern)) if _is_shard(name, suffixes)]
    if os.path.exists(pattern):
        return [pattern]
    folder, rest = _existing_folder(pattern)
    found = {path: _matching(folder, path) for path in braces(rest)}
    missing = [path for path, matching in found.items() if not matching]
    if missing and len(missing) < len(found):
        raise UserError(
            f"{pattern}: {len(missing)} of {len(found)} are not there, the first is {missing[0]}; download them again"
        )
    return [file for matching in found.values() for file in matching]


def _matching(folder: str, pattern: str) -> list[str]:
    path = os.path.join(folder, pattern)
    return [path] if os.path.exists(path) else sorted(glob.glob(os.path.join(glob.escape(folder), pattern)))


def _existing_folder(pattern: str) -> tuple[str, str]:
    """The leading folders that exist under these very names, and the rest."""
    folder = os.path.dirname(pattern)
    while folder and not os.path.isdir(folder):
        folder = os.path.dirname(folder)
    return folder, os.path.relpath(pattern, folder) if folder else pattern


def _refuse(pattern: str, suffixes: Sequence[str]) -> list[str]:
    kind = suffixes[0]
    if remote.is_remote(pattern):
        raise UserError(f"{pattern}: no {kind} files there")
    if os.path.isdir(os.path.expanduser(pattern)):
        raise UserError(f"{pattern}: no {kind} shards in this folder")
    raise UserError(
        f"{pattern}: no such shard; give a {kind} file, a folder of them or a pattern like train-*{kind} or "
        f"{{00000..00099}}{kind}"
    )


def _remote(path: str, suffixes: Sequence[str]) -> list[str]:
    if path.startswith("http"):  # a ? begins a signature there
        return remote.glob(path) if "*" in path else [path]
    if glob.has_magic(path):
        return remote.glob(path)
    if _is_shard(path, suffixes):
        return [path]
    folder = path.rstrip("/")
    return [f"{folder}/{name}" for name in remote.children(folder)[1] if _is_shard(name, suffixes)]


def _is_shard(name: str, suffixes: Sequence[str]) -> bool:
    """Whether a visible file ends in a suffix, perhaps with the number of its shard after it, as TFDS writes them."""
    return not name.startswith(".") and NUMBERED.sub("", name).endswith(tuple(suffixes))


def braces(pattern: str) -> list[str]:
    """Every ``{0..9}`` and ``{a,b}`` written out, the last one fastest, as in a shell."""
    pieces = BRACES.split(pattern)  # text, what is in braces, text, ...
    choices = [_choices(piece) if number % 2 else [piece] for number, piece in enumerate(pieces)]
    return ["".join(parts) for parts in itertools.product(*choices)]


def _choices(inside: str) -> list[str]:
    numbers = RANGE.fullmatch(inside)
    if numbers is None:
        return inside.split(",")
    first, last = numbers.groups()
    if abs(int(last) - int(first)) >= MAX_FILES:
        raise UserError(f"{{{inside}}}: more than {MAX_FILES} files")
    width = max(len(first), len(last)) if "0" in (first[0], last[0]) and len(first) + len(last) > 2 else 0
    step = 1 if int(first) <= int(last) else -1
    return [str(number).zfill(width) for number in range(int(first), int(last) + step, step)]
