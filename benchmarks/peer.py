"""A peer library in a process of its own, which takes turns with us: both are slowed alike by a busy machine.

Its environment is made by tests/peers/make_env.sh and found in CLIP_JAX_PEERS, or at .venv-peers.
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
    # Of this program alone: getrusage's figure is handed down by the process that started it.
    for line in open("/proc/self/status"):
        if line.startswith("VmHWM"):
            return int(line.split()[1]) * 1024
"""
"""For a script: ``peak()`` are the bytes that it has had in memory at most."""


def peak() -> int:
    """Bytes that this process has had in memory at most (Linux)."""
    status = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in status if line.startswith("VmHWM")) * 1024


def is_there() -> bool:
    return (PEERS / ".complete").exists()


@contextlib.contextmanager
def started(script: str, *arguments: object) -> Iterator[Callable[[str], Any]]:
    """``ask(line) -> answer``: the script prints "ready", and then a line of JSON for each line that it reads."""
    if not is_there():
        sys.exit(f"no peers at {PEERS}: run tests/peers/make_env.sh DIR and set CLIP_JAX_PEERS=DIR")
    command = [PEERS / "bin" / "python", "-c", script, *map(str, arguments)]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as peer:
        if peer.stdout.readline().strip() != "ready":
            sys.exit(f"{PEERS}: the peer did not start")

        def ask(line: str) -> Any:
            print(line, file=peer.stdin, flush=True)
            return json.loads(peer.stdout.readline())

        yield ask
        peer.stdin.close()


def ratio(ours: Sequence[float], theirs: Sequence[float]) -> str:
    """How many times faster we are, of seconds taken in turns: the median, and the lowest and highest."""
    ratios = [t / o for o, t in zip(ours, theirs, strict=True)]
    return f"{statistics.median(ratios):.2f} ({min(ratios):.2f} to {max(ratios):.2f})"
