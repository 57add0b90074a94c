"""A stand-in for Google Cloud: the ``gcloud`` of ``bin/``, over a folder that holds the whole state of the cloud.

Machines are folders; ssh runs the command here, with the machine's folder as its home and the environment of a TPU
worker; a preemption sends SIGTERM, and SIGKILL after a grace period, to every process of the machine.

A test writes the events to ``schedule.json`` beforehand: ``lives``, one for each slice that is created, with

waiting, provisioning   how often ``describe`` reports these states before the slice is active (default 0)
refused                 ``create`` fails with this message
failed                  the request ends in FAILED instead of becoming active
slow_boot               the number of ssh connections that are refused at first
drops                   the ssh connections (counted from 1) that break after 60 bytes of the log, or at its end
preempt                 {"file", "lines", "grace_seconds"}: preempted when the file has this many lines, with SIGTERM
                        and a grace period, or with SIGKILL at once for None

and ``environment``, the environment variables of the machines. Buckets are folders in ``buckets/``; calls that concern
other resources are only logged.
"""

import contextlib
import fcntl
import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent))
from gcloud_flags import command_of, unknown_flags

HOME = Path(os.environ["CLIP_JAX_CLOUD"])
MARK = "CLIP_JAX_CLOUD_MACHINE"
STATUS = b"\n::clip-jax"
"""Where the output of ``worker.sh follow`` is no longer the log."""
DROP_BYTES = 60
HOSTS = {"v4-8": 1, "v4-16": 2, "v6e-8": 1, "v5litepod-8": 1, "v5litepod-16": 4}


class Refused(Exception):
    """An error in the format of gcloud."""


@contextlib.contextmanager
def world():
    """The cloud's state, read and written by one gcloud at a time."""
    with (HOME / "lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        file = HOME / "state.json"
        state = json.loads(file.read_text()) if file.exists() else {"slices": {}, "lives": 0}
        try:
            yield state
        finally:  # refused requests count too
            temporary = HOME / "state.tmp"
            temporary.write_text(json.dumps(state, indent=1))
            temporary.replace(file)


def schedule() -> dict:
    return json.loads((HOME / "schedule.json").read_text())


def create(state: dict, name: str, flags: dict, queued: bool) -> None:
    if name in state["slices"]:
        raise Refused(f"ALREADY_EXISTS: Resource '{name}' already exists")
    lives, number = schedule()["lives"], state["lives"]
    life = lives[number] if number < len(lives) else {}
    state["lives"] += 1
    if "refused" in life:
        raise Refused(life["refused"])
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    kind = flags["accelerator-type"]
    folder = HOME / "machines" / f"{name}-{number}"
    for worker in range(HOSTS[kind]):
        (folder / str(worker) / "home").mkdir(parents=True)
        (folder / str(worker) / "tmp").mkdir()
    state["slices"][name] = life | {
        "queued": queued,
        "kind": kind,
        "polls": 0,
        "connections": 0,
        "state": "WAITING",
        "folder": str(folder),
        "port": port,
    }


def advance(name: str, slice_: dict) -> None:
    """Counts a query of a slice, which becomes active after the scheduled number of them."""
    if slice_["state"] != "WAITING":
        return
    slice_["polls"] += 1
    if slice_["polls"] > slice_.get("waiting", 0) + slice_.get("provisioning", 0):
        slice_["state"] = "FAILED" if slice_.get("failed") else "ACTIVE"
        if slice_["state"] == "ACTIVE" and "preempt" in slice_:
            here = [sys.executable, __file__, "--preempt", name, slice_["folder"]]
            silent = dict.fromkeys(("stdin", "stdout", "stderr"), subprocess.DEVNULL)
            subprocess.Popen(here, start_new_session=True, **silent)


def describe(name: str, slice_: dict, flags: dict, queued: bool) -> str:
    advance(name, slice_)
    state, waiting = slice_["state"], slice_["polls"] <= slice_.get("waiting", 0)
    if queued:
        assert flags["format"] == "value(state.state)"
        return {"WAITING": "WAITING_FOR_RESOURCES" if waiting else "PROVISIONING", "LOST": "SUSPENDED"}.get(
            state, state
        )
    if state == "FAILED" or (slice_["queued"] and state == "WAITING"):
        raise Refused(f"NOT_FOUND: Resource '{name}' was not found")
    assert flags["format"] == "value(state,acceleratorType)"
    return f"{ {'WAITING': 'CREATING', 'LOST': 'PREEMPTED', 'ACTIVE': 'READY'}[state] }\t{slice_['kind']}"


def delete(state: dict, name: str, flags: dict, queued: bool) -> None:
    slice_ = state["slices"][name]
    if queued and slice_["state"] == "ACTIVE" and "force" not in flags:
        raise Refused("FAILED_PRECONDITION: the queued resource has nodes")
    kill(Path(slice_["folder"]), signal.SIGKILL)
    del state["slices"][name]


def machines(slice_: dict, flags: dict) -> list[int]:
    if slice_["state"] != "ACTIVE":
        raise Refused("failed to connect: the TPU is not READY")
    slice_["connections"] += 1
    if slice_["connections"] <= slice_.get("slow_boot", 0):
        raise Refused("ssh: connect to host port 22: Connection refused")
    worker = flags.get("worker", "0")
    return list(range(HOSTS[slice_["kind"]])) if worker == "all" else [int(worker)]


def environment(slice_: dict, worker: int) -> dict[str, str]:
    machine = Path(slice_["folder"]) / str(worker)
    joined = {
        "CLIP_JAX_COORDINATOR": f"127.0.0.1:{slice_['port']}",
        "CLIP_JAX_NUM_PROCESSES": str(HOSTS[slice_["kind"]]),
        "CLIP_JAX_PROCESS_ID": str(worker),
    }
    return {
        "PATH": f"{Path(__file__).resolve().parent / 'bin'}:/usr/local/bin:/usr/bin:/bin",
        "HOME": str(machine / "home"),
        "TMPDIR": str(machine / "tmp"),
        "LANG": "C.UTF-8",
        MARK: slice_["folder"],
        "CLIP_JAX_CLOUD": str(HOME),
        "CLIP_JAX_CLOUD_WORKER": str(worker),
        "CLIP_JAX_CLOUD_PYTHON": sys.executable,
        **(joined if HOSTS[slice_["kind"]] > 1 else {}),
        **schedule().get("environment", {}),
    }


def ssh(slice_: dict, workers: list[int], command: str) -> int:
    drops = slice_["connections"] in slice_.get("drops", [])
    processes = [
        subprocess.Popen(
            ["bash", "-c", command],
            env=environment(slice_, worker),
            cwd=Path(slice_["folder"]) / str(worker) / "home",
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE if drops else None,
            start_new_session=True,
        )
        for worker in workers
    ]
    if drops:
        output = processes[0].stdout.read(DROP_BYTES + len(STATUS)).partition(STATUS)[0]
        os.write(sys.stdout.fileno(), output[:DROP_BYTES])
        for process in processes:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
        return 255
    return max(abs(process.wait()) for process in processes)


def scp(slice_: dict, workers: list[int], source: str, destination: str) -> None:
    for worker in workers:
        shutil.copy2(source, Path(slice_["folder"]) / str(worker) / "home" / destination)


def kill(folder: Path, number: int) -> int:
    """Sends a signal to every process of the machines in a folder; returns their number."""
    found = 0
    for process in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(OSError):
            if f"{MARK}={folder}".encode() in (process / "environ").read_bytes().split(b"\0"):
                os.kill(int(process.name), number)
                found += 1
    return found


def preempt(name: str, folder: str) -> None:
    """Waits in a process of its own for the scheduled event, then preempts the slice."""

    def life() -> dict | None:
        slice_ = state["slices"].get(name)
        return slice_ if slice_ is not None and slice_["folder"] == folder else None

    with world() as state:
        when = life()["preempt"]
    deadline, file = time.monotonic() + 300, Path(when["file"])
    while not file.exists() or len(file.read_text().splitlines()) < when["lines"]:
        time.sleep(0.02)
        if time.monotonic() > deadline or not HOME.exists() or not Path(folder).exists():
            return
    if when["grace_seconds"] is not None:
        kill(Path(folder), signal.SIGTERM)
        over = time.monotonic() + when["grace_seconds"]
        while kill(Path(folder), 0) and time.monotonic() < over:
            time.sleep(0.1)  # the machine goes as soon as nothing runs on it
    with world() as state:
        kill(Path(folder), signal.SIGKILL)
        if life():
            life()["state"] = "LOST"


def bucket(path: str) -> Path:
    """The folder that stands for gs://BUCKET/PATH; a local path is itself."""
    return HOME / "buckets" / path.removeprefix("gs://") if path.startswith("gs://") else Path(path)


def storage(verb: str, names: list[str]) -> None:
    """The operations on buckets that the scripts and the guides use."""
    source = bucket(names[0])
    if names[0].startswith("gs://") and not (found := bucket("gs://" + names[0][5:].partition("/")[0])).is_dir():
        if verb != "create":
            raise Refused(f"HTTPError 404: The specified bucket {found.name} does not exist.")
        source.mkdir(parents=True)
    elif verb == "ls":
        for path in sorted(source.parent.parent.glob(f"{source.parent.name}/{source.name}")):
            print(f"gs://{path.relative_to(HOME / 'buckets')}")
    elif verb in ("cp", "rsync"):
        target = bucket(names[1])
        if verb == "cp" and target.is_dir():
            target = target / source.name
        if source.is_dir():
            shutil.copytree(source, target, dirs_exist_ok=True)
        else:
            shutil.copy2(source, target)
    elif verb == "rm":
        shutil.rmtree(source)


def main(words: list[str]) -> int:
    command = command_of(words)
    with (HOME / "calls.jsonl").open("a") as calls:
        calls.write(json.dumps(words) + "\n")
    if command is None or unknown_flags(words):
        raise Refused(f"unrecognized arguments: {' '.join(words)}")
    rest = words[len(command.split()) :]
    flags = {w[2:].partition("=")[0]: w.partition("=")[2] for w in rest if w.startswith("--")}
    names = [w for w in rest if not w.startswith("--")]
    *_, resource, verb = command.split()
    if command.startswith("storage "):
        storage(verb, names)
        return 0
    if resource not in ("queued-resources", "tpu-vm") or verb == "list":
        return 0
    queued = resource == "queued-resources"
    with world() as state:
        name = names[-1].partition(":")[0]
        if verb == "create":
            create(state, name, flags, queued)
            return 0
        slice_ = state["slices"].get(name)
        if slice_ is None:
            raise Refused(f"NOT_FOUND: Resource '{name}' was not found")
        if verb == "describe":
            print(describe(name, slice_, flags, queued))
            return 0
        if verb == "delete":
            delete(state, name, flags, queued)
            return 0
        workers = machines(slice_, flags)
    if verb == "scp":
        scp(slice_, workers, names[0], names[1].partition(":")[2])
        return 0
    return ssh(slice_, workers, flags["command"])


if __name__ == "__main__":
    if sys.argv[1] == "--preempt":
        preempt(*sys.argv[2:])
        sys.exit()
    try:
        sys.exit(main(sys.argv[1:]))
    except Refused as error:
        print(f"ERROR: (gcloud) {error}", file=sys.stderr)
        sys.exit(1)
