"""The interface to Google Cloud: the state of a slice, and the scripts that create, set up, start and delete it.

Slices come from one of two providers: queued resources (``queued``) or plain TPU VMs (``tpu-vm``). They differ in how
the state of a slice is queried; the shell scripts handle the other differences through ``--provider``.
"""

import enum
import os
import re
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

from accelerators import Accelerator, LaunchError

SCRIPTS = Path(__file__).resolve().parent
TIMEOUT_SECONDS = 180
"""Time limit of a gcloud command that only queries something."""


class State(enum.Enum):
    ABSENT = "absent"
    WAITING = "waiting"
    ACTIVE = "active"
    LOST = "lost"
    """Preempted or failed: the slice never comes back, and its name is free only after it is deleted."""


class Unreachable(Exception):
    """The cloud or a worker gave no usable answer; another attempt may succeed."""


class NoCapacity(Exception):
    """The cloud has no capacity for such a slice at the moment."""


class Slice(NamedTuple):
    """A slice to create or use, and where."""

    name: str
    zone: str
    project: str
    provider: str
    accelerator: Accelerator
    capacity: str = "spot"
    service_account: str = ""
    internal_ips: bool = False

    def location(self) -> list[str]:
        """The flags of every gcloud command."""
        return [f"--zone={self.zone}", *([f"--project={self.project}"] if self.project else [])]

    def flags(self) -> list[str]:
        """The flags of every launch script."""
        internal = ["--internal-ips"] if self.internal_ips else []
        return [f"--name={self.name}", *self.location(), f"--provider={self.provider}", *internal]


class Setup(NamedTuple):
    """What is installed on a worker before a run."""

    revision: str
    env_file: str = ""
    """NAME=VALUE lines for the run's environment."""
    prepare: str = ""
    """A script that each worker runs at the end of its setup."""


# --- commands, as lists of words --------------------------------------------------------------------------------------


def create_command(slice_: Slice) -> list[str]:
    account = [f"--service-account={slice_.service_account}"] if slice_.service_account else []
    wanted = [f"--accelerator={slice_.accelerator.name}", f"--capacity={slice_.capacity}"]
    return [str(SCRIPTS / "create_tpu_vm.sh"), *slice_.flags(), *wanted, *account]


def delete_command(slice_: Slice) -> list[str]:
    return [str(SCRIPTS / "delete_tpu_vm.sh"), *slice_.flags()]


def setup_command(slice_: Slice, setup: Setup) -> list[str]:
    files = {"env-file": setup.env_file, "prepare": setup.prepare}
    given = [f"--{name}={file}" for name, file in files.items() if file]
    return [str(SCRIPTS / "setup_worker.sh"), *slice_.flags(), f"--revision={setup.revision}", *given]


def train_command(slice_: Slice, main_flags: list[str]) -> list[str]:
    return [str(SCRIPTS / "train.sh"), *slice_.flags(), f"--hosts={slice_.accelerator.hosts}", "--", *main_flags]


def describe_commands(slice_: Slice) -> list[list[str]]:
    """The queries that make up the state of a slice: its request, where there is a queue, then its node."""
    queries = {"queued-resources": "state.state", "tpu-vm": "state,acceleratorType"}
    if slice_.provider == "tpu-vm":
        del queries["queued-resources"]
    return [_describe_command(slice_, kind, fields) for kind, fields in queries.items()]


def _describe_command(slice_: Slice, kind: str, fields: str) -> list[str]:
    return ["gcloud", "compute", "tpus", kind, "describe", slice_.name, *slice_.location(), f"--format=value({fields})"]


# --- state ------------------------------------------------------------------------------------------------------------

# A state that is not listed is a new name for something in progress (as WAITING_FOR_RESOURCES once was for ACCEPTED).
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
    words = _query(describe_commands(slice_)[-1])
    if not words:
        return State.ABSENT, ""
    return NODE_STATES.get(words[0], State.WAITING), words[-1].rpartition("/")[2]


def queued_state(slice_: Slice) -> tuple[State, str]:
    """The state of a request; once it is active, that of its node, because the queue notices a lost node late."""
    words = _query(describe_commands(slice_)[0])
    if not words:
        return State.ABSENT, ""
    state = REQUEST_STATES.get(words[0], State.WAITING)
    if state is not State.ACTIVE:
        return state, ""
    state, accelerator_type = node_state(slice_)
    return (State.LOST if state is State.ABSENT else state), accelerator_type


PROVIDERS: dict[str, Callable[[Slice], tuple[State, str]]] = {"queued": queued_state, "tpu-vm": node_state}


def state(slice_: Slice) -> tuple[State, str]:
    """(state, accelerator type) of a slice; the type is empty until its node exists."""
    return PROVIDERS[slice_.provider](slice_)


def _query(command: list[str]) -> list[str]:
    """The words of the answer; none where the resource does not exist."""
    done = call(command, TIMEOUT_SECONDS, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    if done.returncode == 0:
        return done.stdout.split()
    if "NOT_FOUND" in done.stderr:
        return []
    raise _error(done.stderr)


def call(command: list[str], seconds: float, **pipes: int) -> subprocess.CompletedProcess:
    """Runs a command; at the time limit kills it with its children, because gcloud's ssh outlives gcloud."""
    sys.stdout.flush()
    try:
        process = subprocess.Popen(command, text=True, stdin=subprocess.DEVNULL, start_new_session=True, **pipes)
    except FileNotFoundError:
        raise LaunchError(f"{command[0]} is not installed; see https://cloud.google.com/sdk/docs/install") from None
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
    """The exception for a failed gcloud command."""
    line = next((text for text in reversed(stderr.strip().splitlines()) if text.strip()), "gcloud failed")
    if re.search(
        r"PERMISSION_DENIED|UNAUTHENTICATED|[Rr]eauthentication|gcloud auth login|not have permission", stderr
    ):
        return LaunchError(f"permission denied ({line}); log in (gcloud auth login), or request the role TPU Admin")
    if re.search(r"[Qq]uota", stderr):
        return LaunchError(f"the project's quota is too small ({line}); request more, or use a smaller slice")
    if re.search(r"INVALID_ARGUMENT|unrecognized arguments", stderr):
        return LaunchError(f"gcloud rejected the command ({line})")
    if re.search(r"RESOURCE_EXHAUSTED|[Cc]apacity|[Ss]tockout|not enough resources", stderr):
        return NoCapacity(line)
    return Unreachable(line)


# --- operations on a slice --------------------------------------------------------------------------------------------


def create(slice_: Slice) -> None:
    """Requests a slice. Raises NoCapacity, Unreachable or LaunchError."""
    done = call(create_command(slice_), TIMEOUT_SECONDS * 5, stderr=subprocess.PIPE)
    if done.returncode and "ALREADY_EXISTS" not in done.stderr:
        raise _error(done.stderr)


def delete(slice_: Slice) -> None:
    """Deletes a slice and returns when it is gone, which takes minutes."""
    done = call(delete_command(slice_), TIMEOUT_SECONDS * 10, stderr=subprocess.PIPE)
    if done.returncode and "NOT_FOUND" not in done.stderr:
        raise _error(done.stderr)


def succeeds(command: list[str], seconds: float) -> bool:
    """Runs a script that works on the workers, with its output shown; returns whether it succeeded in time."""
    try:
        return call(command, seconds).returncode == 0
    except Unreachable:
        return False
