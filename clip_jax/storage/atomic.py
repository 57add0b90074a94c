"""Files and folders that appear complete or not at all: written under a temporary name beside the target, then renamed.

A reader, or a process that is killed, sees the old file or the new one, never half of one.
"""

import contextlib
import os
import shutil
import tempfile
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


@contextlib.contextmanager
def first_folder(path: Path) -> Iterator[Path]:
    """A temporary folder that becomes ``path`` at the end, unless another process was first: then the first one stays.

    A file that a process on another machine has mapped must not be replaced on a network file system.
    """
    temporary = Path(tempfile.mkdtemp(dir=path.parent))
    try:
        yield temporary
        temporary.chmod(0o755)  # readable by other users
        temporary.rename(path)
    except OSError:
        if not path.is_dir():
            raise
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def write_bytes(path: Path, content: bytes) -> None:
    """Replaces the file with ``content``."""
    with replacing(path) as temporary:
        temporary.write_bytes(content)


def write_text(path: Path, content: str) -> None:
    """Replaces the file with ``content``, in UTF-8."""
    write_bytes(path, content.encode("utf-8"))
