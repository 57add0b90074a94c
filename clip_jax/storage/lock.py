"""Allows one run at a time in a folder, by a lease that the training process holds and renews.

``lock.json``, on disk or in a bucket, names the process that trains in the folder. A killed process leaves the file
behind. On the same machine, a new process checks whether the owner still runs; on another machine, it waits for one
lease and checks whether the file's content changes, because clocks differ. A process that finds another owner in the
file has lost the folder, and exits.
"""

import contextlib
import json
import os
import platform
import secrets
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

from clip_jax.command_line import program
from clip_jax.errors import EXIT_USER_ERROR, UserError
from clip_jax.storage import atomic
from clip_jax.storage.buckets import Remote

FILE = "lock.json"
LEASE_SECONDS = 60.0
RENEWALS = 6
"""Renewals per lease: a few of them may fail without losing the folder."""
SETTLE_SECONDS = 0.5
"""Wait after taking over a lease, in which another process that does the same would write its name."""

Holder = dict[str, Any]


class Store(NamedTuple):
    """Access to the lock file. ``read`` returns None if the file is missing or incomplete."""

    read: Callable[[], Holder | None]
    create: Callable[[Holder], bool]
    """False if the file exists already."""
    replace: Callable[[Holder], None]
    remove: Callable[[], None]


@contextlib.contextmanager
def locked(where: str, path: Path, remote: Remote | None) -> Iterator[None]:
    """Holds the run folder ``where`` for the block. Raises UserError if a live process holds it."""
    store = _local(path / FILE) if remote is None else _in_bucket(remote)
    holder = {
        "owner": secrets.token_hex(8),
        "host": platform.node(),
        "machine": machine(),
        "process": os.getpid(),
        "process_started": process_started(os.getpid()),
        "since": time.strftime("%Y-%m-%d %H:%M:%S %Z"),
        "renewed": 0,
    }
    _acquire(store, holder, where)
    stop_event = threading.Event()
    thread = threading.Thread(target=_renew, args=(store, holder, where, stop_event), name="lock", daemon=True)
    thread.start()
    try:
        yield
    finally:
        stop_event.set()
        thread.join(timeout=LEASE_SECONDS / RENEWALS)
        with contextlib.suppress(Exception):  # a lease that is left behind expires
            if _owner(store.read()) == holder["owner"]:
                store.remove()


def _acquire(store: Store, holder: Holder, where: str) -> None:
    found = store.read()
    if found is None and store.create(holder):
        return
    if found := found or store.read():
        _wait_until_free(store, found, where)
    store.replace(holder)
    time.sleep(SETTLE_SECONDS)
    if _owner(found := store.read()) != holder["owner"] and found is not None:
        raise _in_use(found, where)


def _wait_until_free(store: Store, found: Holder, where: str) -> None:
    """Returns when the process that wrote the lease is gone. Raises UserError when it is not."""
    if found["machine"] == machine():
        if process_started(found["process"]) == found["process_started"]:
            raise _in_use(found, where)
        return
    print(
        f"{where}: {_described(found)} has not released it; waiting up to {LEASE_SECONDS:.0f} s to see if it runs",
        flush=True,
    )
    deadline = time.monotonic() + LEASE_SECONDS
    while time.monotonic() < deadline:
        time.sleep(LEASE_SECONDS / RENEWALS / 4)
        now = store.read()
        if now is None:
            return
        if now != found:
            raise _in_use(now, where)


def _renew(store: Store, holder: Holder, where: str, stop_event: threading.Event) -> None:
    while not stop_event.wait(LEASE_SECONDS / RENEWALS):
        try:
            found = store.read()
            if found is not None and _owner(found) != holder["owner"]:
                print(f"{program()}: {where}: taken over by {_described(found)}; this process ends", flush=True)
                os._exit(EXIT_USER_ERROR)
            holder["renewed"] += 1
            store.replace(holder)
        except Exception:  # a full disk or an unreachable store, which the run itself reports
            continue


def _owner(holder: Holder | None) -> str | None:
    return None if holder is None else holder["owner"]


def _described(holder: Holder) -> str:
    return f"process {holder['process']} on {holder['host']} (since {holder['since']})"


def _in_use(holder: Holder, where: str) -> UserError:
    return UserError(f"{where} is in use by {_described(holder)}: stop that run first, or use another --workdir")


def machine() -> str:
    """Identifies the scope in which process IDs are unique: a boot of a machine and a PID namespace (container)."""
    try:
        boot = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
        return f"{boot} {os.readlink('/proc/self/ns/pid')}"
    except OSError:
        return platform.node()


def process_started(number: int) -> int | None:
    """The start time of a local process, in ticks since boot (0 if unknown); None if it does not exist.

    Process IDs are reused, but not together with the same start time.
    """
    if not Path("/proc/self/stat").exists():
        try:
            os.kill(number, 0)
        except ProcessLookupError:
            return None
        except PermissionError:
            pass
        return 0
    try:
        state, *fields = Path(f"/proc/{number}/stat").read_text().rpartition(")")[2].split()
    except OSError:
        return None
    return None if state in "ZX" else int(fields[18])


def _local(file: Path) -> Store:
    def read() -> Holder | None:
        try:
            return json.loads(file.read_text(encoding="utf-8"))
        except (FileNotFoundError, json.JSONDecodeError):
            return None

    def create(holder: Holder) -> bool:
        temporary = file.with_name(f".{FILE}.{holder['owner']}")
        temporary.write_text(json.dumps(holder), encoding="utf-8")
        try:
            os.link(temporary, file)  # fails if the file exists; readers never see a partial file
        except FileExistsError:
            return False
        except OSError:  # a file system without hard links
            temporary.replace(file)
        finally:
            temporary.unlink(missing_ok=True)
        return True

    return Store(read, create, lambda holder: atomic.write_text(file, json.dumps(holder)), file.unlink)


def _in_bucket(remote: Remote) -> Store:
    name, files = f"{remote.root}/{FILE}", remote.filesystem

    def read() -> Holder | None:
        try:
            return json.loads(files.cat_file(name))
        except (FileNotFoundError, json.JSONDecodeError):
            return None

    def create(holder: Holder) -> bool:
        try:
            files.pipe_file(name, json.dumps(holder).encode(), mode="create")
        except FileExistsError:
            return False
        return True

    return Store(
        read, create, lambda holder: files.pipe_file(name, json.dumps(holder).encode()), lambda: files.rm_file(name)
    )
