"""A run that cannot or must not go on says so in one line, keeps what it has, and exits with a code of its own."""

import errno
import json
import os
import re
import signal
import subprocess
import sys
import textwrap
import threading
import time

import jax
import jax.numpy as jnp
import portpicker
import pytest

from clip_jax import errors, interrupts
from clip_jax.devices.sharding import make_mesh
from clip_jax.storage.checkpoints import Checkpoints, latest_step
from clip_jax.training import loop, stop
from tests.training import runs
from tests.training.steps import train
from tests.training.test_resume import lines


def start(tmp_path, *arguments, **variables: str) -> subprocess.Popen:
    return subprocess.Popen(
        ["env", "--default-signal", *runs.command(*arguments)],  # the test runner may ignore SIGINT
        env=runs.environment(tmp_path) | variables,
        cwd=tmp_path,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )


def wait_for(condition, process: subprocess.Popen, seconds: float = 240) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert process.poll() is None, process.communicate()[0]
        assert time.monotonic() < deadline
        time.sleep(0.01)


ENDINGS = {
    signal.SIGTERM: (errors.EXIT_PREEMPTED, "received SIGTERM"),
    signal.SIGINT: (errors.EXIT_INTERRUPTED, "interrupted"),
}


@pytest.mark.slow
@pytest.mark.parametrize("sent", [signal.SIGTERM, pytest.param(signal.SIGINT, marks=pytest.mark.exhaustive)])
def test_sigterm_and_ctrl_c_write_a_checkpoint_at_the_next_step(tmp_path, sent):
    """Before the first periodic checkpoint too; the line about it is the last."""
    arguments = (f"--config={runs.write_recipe(tmp_path)}", f"--workdir={tmp_path / 'run'}")
    rare = ("--config.checkpoint.every_steps=1000", "--config.steps=2000", "--config.eval.held_out.every_steps=1000")
    process = start(tmp_path, *arguments, *rare)
    wait_for(lambda: lines(tmp_path / "run") >= 2, process)
    process.send_signal(sent)
    output = process.communicate(timeout=240)[0]
    code, reason = ENDINGS[sent]
    assert process.returncode == code, output
    said = re.match(rf"main.py: {reason}; step (\d+) of 2000 is saved, the same comm", output.splitlines()[-1])
    assert [p.name for p in (tmp_path / "run" / "checkpoints").iterdir()] == [said[1]]
    assert runs.metrics(tmp_path / "run")[-1]["step"] == int(said[1])
    assert (interrupts.FIRST in output) == (sent == signal.SIGINT)


@pytest.mark.slow
def test_ctrl_c_while_the_step_is_compiled_ends_the_run_at_once_with_one_line(tmp_path):
    process = start(tmp_path, f"--config={runs.write_recipe(tmp_path)}", f"--workdir={tmp_path / 'run'}")
    wait_for(lambda: (tmp_path / "run" / "metrics.jsonl").exists(), process)  # opened just before the first step
    process.send_signal(signal.SIGINT)
    output = process.communicate(timeout=240)[0]
    assert process.returncode == 130, output
    assert output.splitlines()[-1] == f"main.py: {interrupts.EARLY}" and "Traceback" not in output


AFTER_STEP = "interrupts.after_step(lambda: print('noted', flush=True))"


@pytest.mark.parametrize(
    ("prepare", "sent", "said"),
    [("", 1, [interrupts.EARLY]), (AFTER_STEP, 2, [interrupts.FIRST, interrupts.SECOND])],
)
def test_ctrl_c_ends_a_process_whose_main_thread_runs_no_python(prepare, sent, said):
    """As it is while XLA compiles. The second Ctrl-C does not wait for the step."""
    program = f"""
        import hashlib
        from clip_jax import interrupts
        interrupts.install()
        {prepare}
        print("begun", flush=True)
        hashlib.pbkdf2_hmac("sha256", b"", b"", 2**31 - 1)
    """
    command = ["env", "--default-signal=INT", sys.executable, "-c", textwrap.dedent(program)]
    process = subprocess.Popen(command, cwd=runs.ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    assert process.stdout.readline() == "begun\n"
    for number in range(sent):
        process.send_signal(signal.SIGINT)
        if number < sent - 1:
            assert process.stdout.readline() == "noted\n"
    assert process.stderr.read().splitlines() == [f"main.py: {line}" for line in said]
    assert process.wait(timeout=240) == 130


def test_ctrl_c_stays_ignored_where_the_shell_has_ignored_it():
    """As for the background jobs of a script."""
    program = "import os, signal; from clip_jax import interrupts; interrupts.install(); os.kill(os.getpid(), 2)"
    command = ["env", "--ignore-signal=INT", sys.executable, "-c", program]
    assert subprocess.run(command, cwd=runs.ROOT).returncode == 0


def start_two(tmp_path, **variables: str):
    """Two processes of one run that would take long."""
    port = portpicker.pick_unused_port()
    arguments = (f"--config={runs.write_recipe(tmp_path)}", f"--workdir={tmp_path / 'run'}", "--config.steps=2000")
    joined = (f"--coordinator=127.0.0.1:{port}", "--num_processes=2", "--config.eval.held_out.every_steps=1000")
    return [start(tmp_path, *arguments, *joined, f"--process_id={i}", **variables) for i in range(2)]


@pytest.mark.parametrize(
    "sent",
    [pytest.param(signal.SIGTERM, marks=pytest.mark.slow), pytest.param(signal.SIGINT, marks=pytest.mark.exhaustive)],
)
def test_a_signal_to_one_of_two_processes_stops_both_after_the_same_step(tmp_path, sent):
    both = start_two(tmp_path)
    wait_for(lambda: lines(tmp_path / "run") >= 2, both[0])
    both[1].send_signal(sent)
    outputs = [process.communicate(timeout=240)[0] for process in both]
    code, reason = ENDINGS[sent]
    assert [process.returncode for process in both] == [code, code], outputs
    kept = {re.search(rf"main.py: {reason}; step (\d+) of 2000 is saved", output)[1] for output in outputs}
    newest = max(int(p.name) for p in (tmp_path / "run" / "checkpoints").iterdir())
    assert kept == {str(newest)}


@pytest.mark.slow
def test_when_one_of_two_processes_dies_the_other_ends_by_itself(tmp_path):
    # JAX's processes notice after 100 s without a heartbeat; here after 10.
    patched = tmp_path / "patched"
    patched.mkdir()
    (patched / "sitecustomize.py").write_text(
        "import functools, jax\n"
        "jax.distributed.initialize = functools.partial(jax.distributed.initialize, heartbeat_timeout_seconds=10)\n"
    )
    path = os.pathsep.join((str(patched), runs.environment(tmp_path).get("PYTHONPATH", "")))
    both = start_two(tmp_path, PYTHONPATH=path)
    wait_for(lambda: lines(tmp_path / "run") >= 4, both[0])
    both[1].kill()
    output = both[0].communicate(timeout=120)[0]  # and not after the minutes that JAX would wait for the other at exit
    assert both[0].returncode not in (0, 2, 42), output
    both[1].communicate()


@pytest.mark.slow
def test_a_run_that_hangs_shows_its_threads_and_exits_with_44():
    program = """
        import time
        from clip_jax.training import stop

        def hangs_here():
            time.sleep(600)

        with stop.watchdog(6) as heartbeat:
            for _ in range(14):  # 7 s, but never 6 s without a heartbeat
                time.sleep(0.5)
                heartbeat()
            print("alive", flush=True)
            hangs_here()
    """
    done = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(program)], cwd=runs.ROOT, capture_output=True, text=True, timeout=300
    )
    assert done.returncode == errors.EXIT_WATCHDOG == 44 and done.stdout == "alive\n"
    assert "in hangs_here" in done.stderr
    assert done.stderr.splitlines()[-1].startswith("main.py: no step finished in 6 s")


def watchdogs():
    return [thread for thread in threading.enumerate() if thread.name == "watchdog"]


def test_a_run_that_ends_leaves_no_watchdog():
    before = watchdogs()
    with stop.watchdog(3600):
        assert len(watchdogs()) == len(before) + 1
    with stop.watchdog(0):  # never
        assert watchdogs() == before
    with pytest.raises(KeyError), stop.watchdog(3600):
        raise KeyError
    assert watchdogs() == before


def test_out_of_memory_is_one_line_and_45(tmp_path, monkeypatch, capsys):
    def too_large(*_, **__):
        return jax.block_until_ready(jnp.zeros(1 << 50, jnp.float32))

    monkeypatch.setattr(loop.initialize, "initial_state", too_large)
    recipe = str(runs.write_recipe(tmp_path))
    code = loop.run(workdir=str(tmp_path / "run"), recipe=recipe, overrides={})
    assert code == errors.EXIT_OUT_OF_MEMORY == 45
    last = capsys.readouterr().out.splitlines()[-1]
    assert ": the devices are out of memory (RESOURCE_EXHAUSTED" in last and "remat=full" in last


def test_another_error_of_the_devices_is_not_called_out_of_memory():
    with pytest.raises(jax.errors.JaxRuntimeError), stop.concise_system_errors("a run"):
        raise jax.errors.JaxRuntimeError("INTERNAL: something else")


@pytest.mark.parametrize("code", [errno.ENOSPC, errno.EDQUOT])
def test_a_full_disk_is_one_line_and_2(code):
    with (
        pytest.raises(errors.UserError, match="no space is left for runs/a: free some"),
        stop.concise_system_errors("runs/a"),
    ):
        raise OSError(code, os.strerror(code))


@pytest.mark.parametrize(
    "error",
    [
        PermissionError(errno.EACCES, "Permission denied", "runs/a/run.json"),
        OSError(errno.EROFS, "Read-only file system", "runs/a/run.json"),
        ValueError('PERMISSION_DENIED: Failed to open "runs/a/checkpoints/3": Permission denied [os_error_code=13]'),
    ],
)
def test_a_folder_that_may_not_be_read_or_written_is_one_line_and_2(error):
    with (
        pytest.raises(errors.UserError, match=r"^runs/a.*: (Permission denied|Read-only file system); "),
        stop.concise_system_errors("runs/a"),
    ):
        raise error


def test_a_device_that_is_not_there_is_one_line():
    program = "from clip_jax.training import stop\nimport jax\nwith stop.concise_system_errors('x'): jax.devices()"
    command = ["env", "JAX_PLATFORMS=tpu,cpu", sys.executable, "-c", program]
    done = subprocess.run(command, cwd=runs.ROOT, capture_output=True, text=True)
    assert done.stderr.splitlines()[-1].startswith("clip_jax.errors.NoDeviceError: Unable to initialize backend 'tpu'")


@pytest.mark.slow
def test_a_save_in_progress_is_complete_however_the_run_ends(tmp_path):
    _, state = train(make_mesh(devices=jax.devices()[:1]), steps=1)
    with (
        pytest.raises(errors.UserError, match="bad data"),
        Checkpoints(tmp_path, keep_last=2, keep_every=None) as saver,
    ):
        saver.save(1, state)
        raise errors.UserError("bad data")
    assert latest_step(tmp_path) == 1


@pytest.mark.slow
def test_a_disk_that_fills_up_keeps_the_last_checkpoint(tmp_path):
    """On a file system of three megabytes; skipped where the test may not mount one."""
    disk = tmp_path / "disk"
    disk.mkdir()
    mounted = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=3m", "tmpfs", str(disk)], capture_output=True)
    if mounted.returncode:
        pytest.skip("a test may not mount a file system here")
    try:
        recipe = runs.write_recipe(tmp_path)
        many = ("--config.checkpoint.keep_last=100", "--config.checkpoint.every_steps=1", "--config.steps=100")
        done = runs.main(tmp_path, f"--config={recipe}", f"--workdir={disk / 'run'}", *many)
        assert done.returncode == errors.EXIT_USER_ERROR, done.stderr
        assert done.stderr.startswith("main.py: no space is left for") and len(done.stderr.splitlines()) == 1
        kept = latest_step(str(disk / "run"))
        assert kept is not None and kept >= 1
    finally:
        subprocess.run(["umount", str(disk)], check=True)


def test_a_run_writes_which_samples_each_step_took(small_run):
    written = [json.loads(line) for line in (small_run / "samples.0.jsonl").read_text().splitlines()]
    assert [line["step"] for line in written] == list(range(1, 13))
    assert all(line["rows"] == list(range(16)) for line in written)
    seen = [sample for line in written for sample in line["samples"]]
    assert sorted(seen[:50]) == sorted(seen[50:100]) == list(range(50))  # an epoch has every sample once
