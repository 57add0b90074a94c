"""Digests of the bytes of files, which identify data; computed once for each version of a file.

A start compares sizes and times and reads again only what differs; a copy of a file has the same digest.
"""

import contextlib
import hashlib
import json
import os
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from clip_jax.storage import atomic, ranges, remote
from clip_jax.storage.ranges import Read

PIECE = 512
"""Bytes; what is longer than all its pieces together is sampled."""
PIECES = 16
THREADS = 16


def sampled(read: Read, size: int, pieces: int, offset: int = 0) -> str:
    """A digest of ``size`` bytes from ``offset``: of evenly spaced pieces, the first and the last bytes among them."""
    if size <= pieces * PIECE:
        data = read(offset, size)
    else:
        data = b"".join(read(offset + part * (size - PIECE) // (pieces - 1), PIECE) for part in range(pieces))
    return hashlib.blake2b(data, digest_size=8, key=str(size).encode()).hexdigest()


def of_files(files: Sequence[str | Path]) -> list[str]:
    """The digest of each file, remembered in the user's cache folder. Raises OSError; UserError for a remote file."""
    files = [str(file) if remote.is_remote(str(file)) else os.path.abspath(file) for file in files]
    # The folder of all files has one memory. A URL has a path's separators, and is relative.
    common = os.fsencode(os.path.commonpath([file.lstrip("/") for file in files]))
    memory = cache_folder() / "file_digests" / hashlib.sha256(common).hexdigest()[:24]
    try:
        known = {name: tuple(entry) for name, *entry in json.loads(memory.read_text())}
    except (OSError, ValueError):
        known = {}

    def digest(file: str) -> tuple[int, str, str]:
        found = ranges.stat(file)
        if known.get(file, ())[:2] == found:
            return known[file]
        return (*found, sampled(ranges.reader(file, found), found.size, PIECES))

    with ThreadPoolExecutor(THREADS) as pool:
        new = dict(zip(files, pool.map(digest, files), strict=True))
    if not new.items() <= known.items():
        with contextlib.suppress(OSError):  # where nothing can be kept, the next start reads again
            memory.parent.mkdir(parents=True, exist_ok=True)
            atomic.write_text(memory, json.dumps([[name, *entry] for name, entry in (known | new).items()]))
    return [new[file][2] for file in files]


def cache_folder() -> Path:
    """``CLIP_JAX_CACHE``, else ``clip_jax`` in the user's cache folder."""
    configured = os.environ.get("CLIP_JAX_CACHE")
    return (
        Path(configured).expanduser()
        if configured
        else Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "clip_jax"
    )
