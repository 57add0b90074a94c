"""Runs a peer library in a separate process, interleaved with ours, so that a busy machine slows both equally.

tests/peers/make_env.sh creates its environment, in CLIP_JAX_PEERS or in .venv-peers.
"""

import contextlib
import json
import os
import statistics
import subprocess
import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
PEERS = Path(os.environ.get("CLIP_JAX_PEERS") or ROOT / ".venv-peers")

PEAK = """
def peak():
    # Not getrusage: its figure is inherited from the parent process.
    for line in open("/proc/self/status"):
        if line.startswith("VmHWM"):
            return int(line.split()[1]) * 1024
"""
"""Source of ``peak()`` for a script: the peak memory of its process in bytes."""


def start_peak() -> int:
    """The memory of this process in bytes, from which ``peak`` measures anew (Linux)."""
    Path("/proc/self/clear_refs").write_text("5")
    return peak()


def peak() -> int:
    """The peak memory of this process in bytes (Linux)."""
    status = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in status if line.startswith("VmHWM")) * 1024


def is_installed() -> bool:
    return (PEERS / ".complete").exists()


@contextlib.contextmanager
def started(script: str, *arguments: object, python: str | None = None) -> Iterator[Callable[[str], Any]]:
    """Starts a script and yields ``ask(line) -> answer``.

    The script prints "ready", and then one line of JSON for each line that it reads. ``python`` is the interpreter of
    another peer environment.
    """
    if python is None and not is_installed():
        sys.exit(f"{PEERS}: no peer environment; run tests/peers/make_env.sh DIR and set CLIP_JAX_PEERS=DIR")
    command = [python or PEERS / "bin" / "python", "-c", script, *map(str, arguments)]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as peer:
        if peer.stdout.readline().strip() != "ready":
            sys.exit(f"{command[0]}: the peer did not start")

        def ask(line: str) -> Any:
            print(line, file=peer.stdin, flush=True)
            return json.loads(peer.stdout.readline())

        yield ask
        peer.stdin.close()


def ratio(ours: Sequence[float], theirs: Sequence[float]) -> str:
    """Our speedup from interleaved timings in seconds: the median, minimum and maximum."""
    ratios = [t / o for o, t in zip(ours, theirs, strict=True)]
    return f"{statistics.median(ratios):.2f} ({min(ratios):.2f} to {max(ratios):.2f})"
