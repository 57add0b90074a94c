"""Shards by path, folder and pattern. A path that exists is a path, whatever brackets and commas are in it."""

import glob
import os
import re
from pathlib import Path

from clip_jax.errors import UserError


def expand(where: str) -> list[Path]:
    """The shards of a glob pattern, a folder of .tar files, or several of these separated by commas; UserError."""
    parts, shards = where.split(","), []
    while parts:
        # The longest run of parts that is there: a comma may belong to a name.
        for count in range(len(parts), 0, -1):
            found = _find(",".join(parts[:count]))
            if found or count == 1:
                break
        shards += found or _refuse(parts[0])
        parts = parts[count:]
    return shards


def _find(pattern: str) -> list[Path]:
    path = Path(os.path.expanduser(pattern))
    if path.is_dir():
        return sorted(path.glob("*.tar"))
    if path.exists():
        return [path]
    literal, rest = _existing_folder(path)
    found = {pattern: sorted(map(Path, glob.glob(os.path.join(literal, pattern)))) for pattern in _braces(rest)}
    missing = [pattern for pattern, shards in found.items() if not shards]
    if missing and len(missing) < len(found):
        raise UserError(f"{path}: {len(missing)} shards of this range are not there, the first is {missing[0]}")
    return [shard for shards in found.values() for shard in shards]


def _existing_folder(path: Path) -> tuple[str, str]:
    """The leading folders that exist under these very names, escaped for glob, and the rest."""
    for folder in path.parents:
        if folder.exists():
            return glob.escape(str(folder)), str(path.relative_to(folder))
    return "", str(path)


def _braces(pattern: str) -> list[str]:
    """``train-{000..012}.tar``, as webdataset and OpenCLIP write a range; without one, the pattern alone."""
    match = re.search(r"\{(\d+)\.\.(\d+)\}", pattern)
    if match is None:
        return [pattern]
    first, last = match.groups()
    numbers = [f"{number:0{len(first)}}" for number in range(int(first), int(last) + 1)]
    return [full for n in numbers for full in _braces(pattern[: match.start()] + n + pattern[match.end() :])]


def _refuse(pattern: str) -> list[Path]:
    if Path(os.path.expanduser(pattern)).is_dir():
        raise UserError(f"{pattern}: no .tar shards in this folder")
    raise UserError(f"{pattern}: no such shard; give a .tar file, a folder of them or a pattern like train-*.tar")
