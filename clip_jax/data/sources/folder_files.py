"""The files below a folder by kind (images, texts, JSON, others); links are followed within a bound."""

import os
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

from clip_jax.data import images
from clip_jax.data.sources import tables
from clip_jax.data.valid_text import shown
from clip_jax.errors import UserError


class Files(NamedTuple):
    """Names relative to the folder, with forward slashes, sorted: the same order anywhere."""

    images: dict[str, int]
    """Name -> size in bytes."""
    texts: dict[str, str]
    """Name without its ending -> name of the .txt."""
    jsons: dict[str, str]
    tables: list[str]
    """At the top of the folder."""
    others: list[str]


def find_files(root: Path, links_to: str) -> Files:
    """All files but those whose name, or folder's name, starts with a dot.

    Raises UserError for links that are broken, or that lead neither into the folder nor below ``links_to``: a copy of
    the folder would be other data, and a downloaded one could name any file of this machine.
    """
    bounds = [root.resolve(), *([Path(links_to).expanduser().resolve()] if links_to else [])]
    bad: list[tuple[str, str]] = []
    found = Files({}, {}, {}, [], [])
    for entry in sorted(
        _walk(str(root), frozenset([os.path.realpath(root)]), bounds, bad), key=lambda e: _name(e, root)
    ):
        name = _name(entry, root)
        key, _, ending = name.rpartition(".")
        kind = ending.lower()
        if kind in images.ENDINGS:
            found.images[name] = entry.stat().st_size
        elif kind == "txt":
            found.texts[key] = name
        elif kind == "json":
            found.jsons[key] = name
        elif "/" not in name and f".{kind}" in tables.ENDINGS:
            found.tables.append(name)
        else:
            found.others.append(name)
    if bad:
        _refuse(root, sorted(bad))
    return found


def _name(entry: os.DirEntry[str], root: Path) -> str:
    return Path(entry.path).relative_to(root).as_posix()


def _walk(
    folder: str, above: frozenset[str], bounds: list[Path], bad: list[tuple[str, str]]
) -> Iterator[os.DirEntry[str]]:
    """``above``: the real folders around this one, so that a link to one of them ends; ``bad`` collects bad links."""
    try:
        entries = list(os.scandir(folder))
    except OSError as error:
        raise UserError(f"{shown(folder)}: cannot be read ({error.strerror}); check its permissions") from error
    for entry in entries:
        if entry.name.startswith("."):
            continue
        if entry.is_symlink():
            target = os.path.realpath(entry.path)
            if not os.path.exists(target):
                bad.append((entry.path, ""))
                continue
            if not any(Path(target).is_relative_to(bound) for bound in bounds):
                bad.append((entry.path, target))
                continue
        if entry.is_dir():
            real = os.path.realpath(entry.path)
            if real not in above:
                yield from _walk(entry.path, above | {real}, bounds, bad)
        elif entry.is_file():
            yield entry


def _refuse(root: Path, bad: list[tuple[str, str]]) -> None:
    path, _ = bad[0]
    outside = [os.path.dirname(target) for _, target in bad if target]
    allow = f"set config.data.links_to={shown(os.path.commonpath(outside))} or " if outside else ""
    raise UserError(
        f"{shown(path)}: a link that is broken or leads out of {root} ({len(bad)} in all); {allow}copy the files there"
    )
