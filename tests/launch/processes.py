"""Waits for the processes of a test, finds them, and ends them."""

import contextlib
import os
import signal
import time
from collections.abc import Callable, Iterator
from pathlib import Path


def wait_until(condition: Callable[[], bool], seconds: float = 120) -> None:
    """Returns when the condition holds; the deadline only ends a broken test."""
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, f"not within {seconds:g} s"
        time.sleep(0.02)


def commands(folder: Path) -> Iterator[tuple[int, list[str]]]:
    """(process id, command line) of every other process whose stand-in for the cloud is this folder."""
    wanted = f"CLIP_JAX_CLOUD={folder}".encode()
    for process in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(OSError):
            if int(process.name) != os.getpid() and wanted in (process / "environ").read_bytes().split(b"\0"):
                yield int(process.name), (process / "cmdline").read_text().split("\0")


def kill_all(folder: Path) -> None:
    """Sends SIGKILL to every process whose stand-in for the cloud is this folder."""
    for number, _ in commands(folder):
        with contextlib.suppress(OSError):
            os.kill(number, signal.SIGKILL)
