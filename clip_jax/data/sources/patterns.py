"""The files that a source names: a file, a folder, a glob, a range in braces, or several of these.

    /data/{00000..41455}.tar      numbers, with their zeros; {a,b} are alternatives
    a/*.tar,b/*.tar               several, separated by commas or, as OpenCLIP writes them, by ::

A path that exists is a path, whatever characters are in it.
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
MAX_FILES = 10_000_000


def files(where: str, suffixes: Sequence[str]) -> list[str]:
    """The files in order; a folder stands for those in it that end in one of ``suffixes``. Raises UserError."""
    found = [file for part in _parts(where) for file in _expand(part, suffixes)]
    if len(found) > MAX_FILES:
        raise UserError(f"{where}: {len(found)} files; name fewer")
    return found


def _parts(where: str) -> Iterator[str]:
    for part in where.split("::"):
        if os.path.exists(os.path.expanduser(part)):
            yield part
        else:  # at commas outside of braces
            yield from re.findall(r"(?:\{[^{}]*\}|[^,{}]|[{}])+", part)


def _expand(pattern: str, suffixes: Sequence[str]) -> list[str]:
    if remote.is_remote(pattern):  # whether they are there shows when they are opened, several at a time
        found = [file for path in braces(pattern) for file in _remote(path, suffixes)]
        if not found:
            raise UserError(f"{pattern}: no {suffixes[0]} files there")
        return found
    pattern = os.path.expanduser(pattern)
    if os.path.isdir(pattern):
        found = sorted(os.path.join(pattern, name) for name in os.listdir(pattern) if name.endswith(tuple(suffixes)))
        found = [file for file in found if not os.path.basename(file).startswith(".")]
        if not found:
            raise UserError(f"{pattern}: no {suffixes[0]} shards in this folder")
        return found
    if os.path.exists(pattern):
        return [pattern]
    named, missing = [], []
    for path in braces(pattern):
        found = [path] if os.path.exists(path) else sorted(glob.glob(path))
        named += found
        missing += [] if found else [path]
    if missing and missing != [pattern]:
        raise UserError(f"{missing[0]}: no such shard ({len(missing)} of {pattern} are missing); download them again")
    if missing or not named:
        raise UserError(
            f"{pattern}: no such shard; give a {suffixes[0]} file, a folder of them or a pattern like "
            f"train-*{suffixes[0]} or {{00000..00099}}{suffixes[0]}"
        )
    return named


def _remote(path: str, suffixes: Sequence[str]) -> list[str]:
    if path.startswith("http"):  # a ? begins a signature there
        return remote.glob(path) if "*" in path else [path]
    path = path if path.endswith(tuple(suffixes)) else f"{path.rstrip('/')}/*{suffixes[0]}"
    return remote.glob(path) if glob.has_magic(path) else [path]


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
