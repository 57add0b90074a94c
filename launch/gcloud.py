"""The seam to the cloud: a slice's state, its workers, and the shell scripts that create, set up, start and delete.

Two providers have slices: the queue (``queued-resources``) and plain TPU VMs (``tpu-vm``). They differ in how a slice's
state is asked for; the scripts know the rest by ``--provider``.
"""

import enum
import os
import re
import shlex
import signal
import subprocess
import sys
import threading
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

from accelerators import Accelerator, LaunchError

SCRIPTS = Path(__file__).resolve().parent
ANSWER_SECONDS = 180
"""The longest that gcloud may take to say something short."""


class State(enum.Enum):
    ABSENT = "absent"
    WAITING = "waiting"
    ACTIVE = "active"
    LOST = "lost"
    """Taken away or failed: it never comes back, and its name is free only when it is deleted."""


class Unreachable(Exception):
    """The cloud or a worker gave no usable answer: worth another try."""


class NoCapacity(Exception):
    """There is no room for such a slice now."""


class Slice(NamedTuple):
    """What is asked for, and where."""

    name: str
    zone: str
    project: str
    provider: str
    accelerator: Accelerator
    capacity: str = "spot"
    service_account: str = ""
    internal_ips: bool = False

    def place(self) -> list[str]:
        return [f"--zone={self.zone}", *([f"--project={self.project}"] if self.project else [])]

    def flags(self) -> list[str]:
        """As the scripts take them."""
        internal = ["--internal-ips"] if self.internal_ips else []
        return [f"--name={self.name}", *self.place(), f"--provider={self.provider}", *internal]


class Setup(NamedTuple):
    """What a worker gets before a run."""

    revision: str
    env_file: str = ""
    """NAME=VALUE lines for the run's environment."""
    prepare: str = ""
    """A script that the worker runs last."""


class Worker(NamedTuple):
    """What ``worker.sh status`` says."""

    worker: str
    state: str
    """none, running or exited"""
    code: int | None
    step: int | None
    """Of the newest complete checkpoint."""
    message: str
    """The last line of the log that main.py addressed to a person."""


# --- commands, as lists of words --------------------------------------------------------------------------------------


def create_command(slice_: Slice) -> list[str]:
    account = [f"--service-account={slice_.service_account}"] if slice_.service_account else []
    wanted = [f"--accelerator={slice_.accelerator.name}", f"--capacity={slice_.capacity}"]
    return [str(SCRIPTS / "create_tpu_vm.sh"), *slice_.flags(), *wanted, *account]


def delete_command(slice_: Slice) -> list[str]:
    return [str(SCRIPTS / "delete_tpu_vm.sh"), *slice_.flags()]


def setup_command(slice_: Slice, what: Setup) -> list[str]:
    files = {"env-file": what.env_file, "prepare": what.prepare}
    given = [f"--{name}={file}" for name, file in files.items() if file]
    return [str(SCRIPTS / "setup_worker.sh"), *slice_.flags(), f"--revision={what.revision}", *given]


def train_command(slice_: Slice, main_flags: list[str]) -> list[str]:
    return [str(SCRIPTS / "train.sh"), *slice_.flags(), f"--hosts={slice_.accelerator.hosts}", "--", *main_flags]


def describe_command(slice_: Slice, kind: str, fields: str) -> list[str]:
    return ["gcloud", "compute", "tpus", kind, "describe", slice_.name, *slice_.place(), f"--format=value({fields})"]


def worker_command(slice_: Slice, worker: int | str, *words: str) -> list[str]:
    internal = ["--internal-ip"] if slice_.internal_ips else []
    command = shlex.join(["bash", "clip_jax/code/launch/worker.sh", *words])
    ssh = ["gcloud", "compute", "tpus", "tpu-vm", "ssh", slice_.name, *slice_.place(), "--quiet", *internal]
    return [*ssh, f"--worker={worker}", f"--command={command}"]


# --- state ------------------------------------------------------------------------------------------------------------

# A word that is not here is a new one for something under way (as WAITING_FOR_RESOURCES once was for ACCEPTED).
# Sources: cloud.google.com/tpu/docs/reference/rest/v2, QueuedResourceState and Node.
REQUEST_STATES = {
    "ACTIVE": State.ACTIVE,
    "FAILED": State.LOST,
    "SUSPENDING": State.LOST,
    "SUSPENDED": State.LOST,
    "DELETING": State.LOST,
}
NODE_STATES = {
    "READY": State.ACTIVE,
    "PREEMPTED": State.LOST,
    "TERMINATED": State.LOST,
    "STOPPED": State.LOST,
    "STOPPING": State.LOST,
    "DELETING": State.LOST,
    "HIDING": State.LOST,
    "HIDDEN": State.LOST,
}


def node_state(slice_: Slice) -> tuple[State, str]:
    """(state, accelerator type) of a node."""
    words = _ask(describe_command(slice_, "tpu-vm", "state,acceleratorType"))
    if not words:
        return State.ABSENT, ""
    return NODE_STATES.get(words[0], State.WAITING), words[-1].rpartition("/")[2]


def queued_state(slice_: Slice) -> tuple[State, str]:
    """The request's state; an active one is as good as its node, whose loss the queue notices later."""
    words = _ask(describe_command(slice_, "queued-resources", "state.state"))
    if not words:
        return State.ABSENT, ""
    state = REQUEST_STATES.get(words[0], State.WAITING)
    if state is not State.ACTIVE:
        return state, ""
    state, kind = node_state(slice_)
    return (State.LOST if state is State.ABSENT else state), kind


PROVIDERS: dict[str, Callable[[Slice], tuple[State, str]]] = {"queued": queued_state, "tpu-vm": node_state}


def state(slice_: Slice) -> tuple[State, str]:
    return PROVIDERS[slice_.provider](slice_)


def _ask(command: list[str]) -> list[str]:
    """The words of the answer, none where there is no such thing."""
    done = call(command, ANSWER_SECONDS, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    if done.returncode == 0:
        return done.stdout.split()
    if "NOT_FOUND" in done.stderr:
        return []
    raise _error(done.stderr)


def call(command: list[str], seconds: float, **pipes: int) -> subprocess.CompletedProcess:
    """Runs a command; it and all that it started (gcloud's ssh outlives gcloud) end when the time is over."""
    sys.stdout.flush()
    try:
        process = subprocess.Popen(command, text=True, stdin=subprocess.DEVNULL, start_new_session=True, **pipes)
    except FileNotFoundError:
        raise LaunchError(f"{command[0]} is not installed here; https://cloud.google.com/sdk/docs/install") from None
    with process:
        try:
            stdout, stderr = process.communicate(timeout=seconds)
        except BaseException as error:
            os.killpg(process.pid, signal.SIGKILL)
            if isinstance(error, subprocess.TimeoutExpired):
                raise Unreachable(f"no answer in {seconds:g} s") from None
            raise
    return subprocess.CompletedProcess(command, process.returncode, stdout, stderr)


def _error(stderr: str) -> Exception:
    """What a failed gcloud command means."""
    line = next((text for text in reversed(stderr.strip().splitlines()) if text.strip()), "gcloud failed")
    if re.search(
        r"PERMISSION_DENIED|UNAUTHENTICATED|[Rr]eauthentication|gcloud auth login|not have permission", stderr
    ):
        return LaunchError(
            f"gcloud may not do this ({line}); log in (gcloud auth login), or ask for the role TPU Admin"
        )
    if re.search(r"[Qq]uota", stderr):
        return LaunchError(f"the project's quota does not reach ({line}); ask for more of it, or a smaller slice")
    if re.search(r"INVALID_ARGUMENT|unrecognized arguments", stderr):
        return LaunchError(f"gcloud refuses this ({line})")
    if re.search(r"RESOURCE_EXHAUSTED|[Cc]apacity|[Ss]tockout|not enough resources", stderr):
        return NoCapacity(line)
    return Unreachable(line)


# --- what is done to a slice ------------------------------------------------------------------------------------------


def create(slice_: Slice) -> None:
    """Raises NoCapacity, Unreachable or LaunchError."""
    done = call(create_command(slice_), ANSWER_SECONDS * 5, stderr=subprocess.PIPE)
    if done.returncode and "ALREADY_EXISTS" not in done.stderr:
        raise _error(done.stderr)


def delete(slice_: Slice) -> None:
    """Returns when it is gone, which takes minutes."""
    done = call(delete_command(slice_), ANSWER_SECONDS * 10, stderr=subprocess.PIPE)
    if done.returncode and "NOT_FOUND" not in done.stderr:
        raise _error(done.stderr)


def succeeds(command: list[str], seconds: float) -> bool:
    """Whether a script that works on the workers ended well, in time; what it says is seen."""
    try:
        return call(command, seconds).returncode == 0
    except Unreachable:
        return False


# --- workers ----------------------------------------------------------------------------------------------------------

_STATUS = re.compile(r"::clip-jax worker=(\S+) state=(\w+) code=(\S+) step=(\S+) message=(.*)")


def parse_status(line: str) -> Worker | None:
    found = _STATUS.match(line)
    if found is None:
        return None
    worker, name, code, step, message = found.groups()
    return Worker(worker, name, _number(code), _number(step), message.strip())


def _number(text: str) -> int | None:
    return int(text) if text.isdigit() else None


def statuses(slice_: Slice, worker: int | str = "all", workdir: str = "") -> list[Worker]:
    """What the workers say; raises Unreachable where one cannot be asked."""
    command = worker_command(slice_, worker, "status", *([workdir] if workdir else []))
    done = call(command, ANSWER_SECONDS, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    found = [status for line in done.stdout.splitlines() if (status := parse_status(line))]
    expected = slice_.accelerator.hosts if worker == "all" else 1
    if len(found) < expected:
        raise Unreachable((done.stderr.strip().splitlines() or ["the workers do not answer"])[-1])
    return found


def follow(slice_: Slice, offset: int, seconds: int) -> tuple[int, Worker | None]:
    """Shows worker 0's log from byte ``offset`` for so long or to its end: (bytes seen so far, its status).

    No status: the connection dropped; what was shown is not shown again.
    """
    command = worker_command(slice_, 0, "follow", str(offset), str(seconds))
    held = b""  # the status is on a line of its own, by a line break that is not the log's
    sys.stdout.flush()
    silent = {"stdin": subprocess.DEVNULL, "stderr": subprocess.DEVNULL, "start_new_session": True}
    with subprocess.Popen(command, stdout=subprocess.PIPE, **silent) as process:
        # A connection to a machine that vanished says nothing, for ever.
        limit = threading.Timer(seconds + ANSWER_SECONDS, os.killpg, (process.pid, signal.SIGKILL))
        limit.start()
        try:
            for line in process.stdout:
                if status := parse_status(line.decode(errors="replace")):
                    _show(held[:-1])
                    return offset + max(0, len(held) - 1), status
                _show(held)
                offset += len(held)
                held = line
        except BaseException:
            os.killpg(process.pid, signal.SIGKILL)
            raise
        finally:
            limit.cancel()
    _show(held)
    return offset + len(held), None


def _show(text: bytes) -> None:
    sys.stdout.write(text.decode(errors="replace"))
    sys.stdout.flush()
