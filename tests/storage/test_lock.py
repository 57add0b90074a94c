"""One run at a time in a folder: a lease that is renewed keeps others out, and nothing else does."""

import json
import os
import subprocess
import sys
import threading
import time

import fsspec
import pytest

from clip_jax.errors import UserError
from clip_jax.storage import buckets, lock
from tests import emulators
from tests.training.runs import ROOT


def found(folder) -> dict:
    return json.loads((folder / lock.FILE).read_text())


def left_behind(folder, **changes) -> dict:
    """A lease of a process of this machine that is gone, or as the changes say."""
    with lock.locked("a run", folder, None):
        holder = found(folder) | {"owner": "another", "process_started": 1} | changes
    (folder / lock.FILE).write_text(json.dumps(holder))
    return holder


@pytest.fixture(autouse=True)
def short_lease(monkeypatch):
    monkeypatch.setattr(lock, "LEASE_SECONDS", 0.6)
    monkeypatch.setattr(lock, "SETTLE_SECONDS", 0.0)


def test_a_process_that_lives_keeps_others_out_and_leaves_nothing_behind(tmp_path):
    with lock.locked("runs/a", tmp_path, None):
        message = rf"^runs/a is in use by process {os.getpid()} on .* \(since 20"
        with pytest.raises(UserError, match=message), lock.locked("runs/a", tmp_path, None):
            pass
        assert found(tmp_path)["process"] == os.getpid()  # the one who was refused took nothing away
    assert list(tmp_path.iterdir()) == []


def test_a_process_that_was_killed_on_this_machine_does_not(tmp_path, capsys):
    program = "import sys, time\nfrom pathlib import Path\nfrom clip_jax.storage import lock\n"
    program += "with lock.locked('a run', Path(sys.argv[1]), None): print('held', flush=True); time.sleep(600)"
    process = subprocess.Popen([sys.executable, "-c", program, str(tmp_path)], cwd=ROOT, stdout=subprocess.PIPE)
    assert process.stdout.readline() == b"held\n"
    with pytest.raises(UserError, match=f"in use by process {process.pid}"), lock.locked("a run", tmp_path, None):
        pass
    process.kill()
    os.waitid(os.P_PID, process.pid, os.WEXITED | os.WNOWAIT)  # ended, and its parent has not asked yet
    with lock.locked("a run", tmp_path, None):
        assert found(tmp_path)["process"] == os.getpid()
    process.communicate()
    assert capsys.readouterr().out == ""


def test_a_number_that_another_process_has_by_now_is_not_the_holder(tmp_path):
    left_behind(tmp_path, process=os.getpid())
    with lock.locked("a run", tmp_path, None):
        assert found(tmp_path)["owner"] != "another"


def test_elsewhere_a_lease_that_nobody_renews_is_taken_after_its_time(tmp_path, capsys):
    left_behind(tmp_path, machine="another", host="tpu-3", process=7)
    started = time.monotonic()
    with lock.locked("a run", tmp_path, None):
        assert time.monotonic() - started >= lock.LEASE_SECONDS
    assert "a run: process 7 on tpu-3 (since 20" in capsys.readouterr().out


def test_elsewhere_a_lease_that_is_renewed_keeps_others_out(tmp_path, monkeypatch):
    monkeypatch.setattr(lock, "LEASE_SECONDS", 60)  # it ends at the first renewal that it sees
    holder, over = left_behind(tmp_path, machine="another", host="tpu-3"), threading.Event()

    def renew():
        while not over.wait(0.02):
            holder["renewed"] += 1
            lock._local(tmp_path / lock.FILE).replace(holder)

    thread = threading.Thread(target=renew)
    thread.start()
    with pytest.raises(UserError, match=r"in use by process .* on tpu-3"), lock.locked("a run", tmp_path, None):
        pass
    over.set()
    thread.join()


def test_a_lease_is_renewed_and_one_that_is_released_meanwhile_is_free(tmp_path, monkeypatch):
    with lock.locked("a run", tmp_path, None):
        deadline = time.monotonic() + 60
        while found(tmp_path)["renewed"] < 2:
            assert time.monotonic() < deadline
            time.sleep(0.01)
    left_behind(tmp_path, machine="another")
    monkeypatch.setattr(lock.time, "sleep", lambda _: (tmp_path / lock.FILE).unlink(missing_ok=True))
    monkeypatch.setattr(lock, "LEASE_SECONDS", 1e9)
    lock._wait_until_free(lock._local(tmp_path / lock.FILE), found(tmp_path), "a run")


def test_of_two_that_take_over_at_once_one_has_it(tmp_path, monkeypatch):
    left_behind(tmp_path)
    other = left_behind(tmp_path, owner="the other", host="tpu-4")
    monkeypatch.setattr(lock.time, "sleep", lambda _: (tmp_path / lock.FILE).write_text(json.dumps(other)))
    with pytest.raises(UserError, match=r"in use by .* on tpu-4"), lock.locked("a run", tmp_path, None):
        pass
    assert found(tmp_path) == other


def test_a_process_that_has_lost_the_folder_ends(tmp_path):
    program = (
        "import sys, time\nfrom pathlib import Path\nfrom clip_jax.storage import lock\nlock.LEASE_SECONDS = 0.1\n"
    )
    program += "with lock.locked('a run', Path(sys.argv[1]), None): print('held', flush=True); time.sleep(600)"
    process = subprocess.Popen([sys.executable, "-c", program, str(tmp_path)], cwd=ROOT, stdout=subprocess.PIPE)
    assert process.stdout.readline() == b"held\n"
    taken = found(tmp_path) | {"owner": "another", "host": "tpu-3"}
    while process.poll() is None:  # a renewal that has just begun may write once more
        lock._local(tmp_path / lock.FILE).replace(taken)
        time.sleep(0.05)
    said = process.communicate(timeout=60)[0].decode()
    assert process.returncode == 2 and "main.py: a run: taken over by process" in said


@pytest.mark.parametrize("kind", emulators.STORES)
def test_a_bucket_has_the_same_lease(kind, tmp_path, monkeypatch):
    with emulators.STORES[kind]() as environment:
        for name, value in environment.items():
            monkeypatch.setenv(name, value)
        fsspec.config.conf.clear()
        fsspec.get_filesystem_class(kind).clear_instance_cache()
        remote = buckets.connect(f"{kind}://{emulators.BUCKET}/a/run")
        with lock.locked("a run", tmp_path, remote):
            with pytest.raises(UserError, match="in use by"), lock.locked("a run", tmp_path, remote):
                pass
            holder = lock._in_bucket(remote).read()
        assert lock._in_bucket(remote).read() is None
        lock._in_bucket(remote).create(holder | {"machine": "another"})
        with lock.locked("a run", tmp_path, remote):
            assert lock._in_bucket(remote).read()["owner"] != holder["owner"]
