"""The workers of a slice, over ssh: their status, and the log of the run. ``worker.sh`` is the other end."""

import os
import re
import shlex
import signal
import subprocess
import sys
import threading
from typing import NamedTuple

from gcloud import TIMEOUT_SECONDS, Slice, Unreachable, call


class WorkerStatus(NamedTuple):
    """The status line of ``worker.sh``."""

    worker: str
    state: str
    """none, running or exited"""
    code: int | None
    step: int | None
    """The step of the newest complete checkpoint."""
    message: str
    """The last log line in which main.py addressed the user."""


def command(slice_: Slice, worker: int | str, *words: str) -> list[str]:
    """Runs ``worker.sh`` on one worker, or on all of them with ``worker="all"``."""
    internal = ["--internal-ip"] if slice_.internal_ips else []
    line = shlex.join(["bash", "clip_jax/code/launch/worker.sh", *words])
    ssh = ["gcloud", "compute", "tpus", "tpu-vm", "ssh", slice_.name, *slice_.location(), "--quiet", *internal]
    return [*ssh, f"--worker={worker}", f"--command={line}"]


_STATUS = re.compile(r"::clip-jax worker=(\S+) state=(\w+) code=(\S+) step=(\S+) message=(.*)")


def parse_status(line: str) -> WorkerStatus | None:
    found = _STATUS.match(line)
    if found is None:
        return None
    worker, name, code, step, message = found.groups()
    return WorkerStatus(worker, name, _number(code), _number(step), message.strip())


def _number(text: str) -> int | None:
    return int(text) if text.isdigit() else None


def statuses(slice_: Slice, worker: int | str = "all", workdir: str = "") -> list[WorkerStatus]:
    """The status of one or all workers. Raises Unreachable if any does not answer."""
    words = command(slice_, worker, "status", *([workdir] if workdir else []))
    done = call(words, TIMEOUT_SECONDS, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    found = [status for line in done.stdout.splitlines() if (status := parse_status(line))]
    expected = slice_.accelerator.hosts if worker == "all" else 1
    if len(found) < expected:
        raise Unreachable((done.stderr.strip().splitlines() or ["the workers do not answer"])[-1])
    return found


def follow(slice_: Slice, offset: int, seconds: int) -> tuple[int, WorkerStatus | None]:
    """Shows worker 0's log from byte ``offset`` to its end, for at most ``seconds``.

    Returns the offset reached and the worker's status; no status means that the connection dropped. The next call
    resumes at the returned offset, so no line is lost or repeated.
    """
    words = command(slice_, 0, "follow", str(offset), str(seconds))
    pending = b""  # the line break before the status is not part of the log, so each line waits for the next one
    sys.stdout.flush()
    silent = {"stdin": subprocess.DEVNULL, "stderr": subprocess.DEVNULL, "start_new_session": True}
    with subprocess.Popen(words, stdout=subprocess.PIPE, **silent) as process:
        # A connection to a machine that has vanished stays silent forever.
        limit = threading.Timer(seconds + TIMEOUT_SECONDS, os.killpg, (process.pid, signal.SIGKILL))
        limit.start()
        try:
            for line in process.stdout:
                if status := parse_status(line.decode(errors="replace")):
                    _show(pending[:-1])
                    return offset + max(0, len(pending) - 1), status
                _show(pending)
                offset += len(pending)
                pending = line
        except BaseException:
            os.killpg(process.pid, signal.SIGKILL)
            raise
        finally:
            limit.cancel()
    _show(pending)
    return offset + len(pending), None


def _show(text: bytes) -> None:
    sys.stdout.write(text.decode(errors="replace"))
    sys.stdout.flush()
