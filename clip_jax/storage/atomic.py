"""Files that appear complete or not at all: written under a temporary name beside the target, then renamed.

A reader, or a process that is killed, sees the old file or the new one, never half of one.
"""

import contextlib
import os
from collections.abc import Iterator
from pathlib import Path


@contextlib.contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """A temporary path with the suffix of ``path``, which it replaces at the end; removed on failure.

    It has the process's number in its name, so that two processes do not write the same temporary file.
    """
    temporary = path.with_name(f".{path.stem}.{os.getpid()}{path.suffix}")
    try:
        yield temporary
        temporary.replace(path)
    finally:
        with contextlib.suppress(OSError):  # it must not hide the error that is being raised
            temporary.unlink(missing_ok=True)


def write_bytes(path: Path, content: bytes) -> None:
    """Replaces the file with ``content``."""
    with replacing(path) as temporary:
        temporary.write_bytes(content)


def write_text(path: Path, content: str) -> None:
    """Replaces the file with ``content``, in UTF-8."""
    write_bytes(path, content.encode("utf-8"))
