"""A run killed at any moment and started again equals one that was never killed, digit for digit."""

import signal
import subprocess
import time

import pytest

from tests.training import runs


def kill_when(process: subprocess.Popen, condition, seconds: float = 240) -> None:
    """SIGKILL as soon as the condition holds."""
    deadline = time.monotonic() + seconds
    while process.poll() is None and time.monotonic() < deadline:
        if condition():
            process.send_signal(signal.SIGKILL)
            process.wait()
            return
        time.sleep(0.002)
    process.kill()
    pytest.fail(f"the run ended (code {process.poll()}) or the time was over before it could be killed")


def start(tmp_path, *arguments) -> subprocess.Popen:
    return subprocess.Popen(
        runs.command(*arguments),
        env=runs.environment(tmp_path),
        cwd=tmp_path,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )


def lines(workdir) -> int:
    file = workdir / "metrics.jsonl"
    return len(file.read_text().splitlines()) if file.exists() else 0


def test_killed_and_resumed_equals_never_killed(tmp_path):
    recipe = runs.write_recipe(tmp_path)
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    done = runs.main(tmp_path, f"--config={recipe}", f"--workdir={whole}")
    assert done.returncode == 0, done.stderr

    # Once in the middle of training, once while a checkpoint is being written.
    arguments = (f"--config={recipe}", f"--workdir={killed}")
    kill_when(start(tmp_path, *arguments), lambda: lines(killed) >= 8)
    unfinished = "*.orbax-checkpoint-tmp*"
    kill_when(
        start(tmp_path, *arguments), lambda: any((killed / "checkpoints").glob(unfinished)) and lines(killed) >= 10
    )
    resumed = runs.main(tmp_path, f"--workdir={killed}")
    assert resumed.returncode == 0, resumed.stderr

    assert runs.metrics(killed) == runs.metrics(whole)
    assert [line["step"] for line in runs.metrics(whole) if "train/loss" in line] == list(range(1, 13))
    assert (killed / "report.html").exists()

    # Started once more, there is nothing left to train, and nothing is lost.
    again = runs.main(tmp_path, f"--workdir={killed}")
    assert again.returncode == 0, again.stderr
    assert runs.metrics(killed) == runs.metrics(whole)


@pytest.mark.slow
def test_two_processes_train_as_one_and_one_goes_on_from_their_checkpoint(tmp_path):
    recipe = runs.write_recipe(tmp_path)
    one, two = tmp_path / "one", tmp_path / "two"
    devices = "--config.mesh.cpu_devices={}"
    done = runs.main(tmp_path, f"--config={recipe}", f"--workdir={one}", devices.format(4))
    assert done.returncode == 0, done.stderr

    import portpicker

    port = portpicker.pick_unused_port()
    processes = [
        subprocess.Popen(
            runs.command(
                f"--config={recipe}",
                f"--workdir={two}",
                devices.format(2),
                "--config.mesh.fsdp=2",
                f"--coordinator=127.0.0.1:{port}",
                "--num_processes=2",
                f"--process_id={i}",
            ),
            cwd=tmp_path,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        for i in range(2)
    ]
    outputs = [process.communicate(timeout=300)[0] for process in processes]
    assert [process.returncode for process in processes] == [0, 0], outputs
    expected, found = runs.metrics(one), runs.metrics(two)
    assert [line.keys() for line in found] == [line.keys() for line in expected]
    for ours, theirs in zip(found, expected, strict=True):
        for name, value in ours.items():
            assert value == pytest.approx(theirs[name], rel=1e-4, abs=1e-5), (name, ours["step"])

    # The newest checkpoint of two processes, read by one with another mesh.
    for step in (12,):
        folder = two / "checkpoints" / str(step)
        folder.rename(tmp_path / f"away-{step}")
    resumed = runs.main(tmp_path, f"--workdir={two}", "--config.mesh.cpu_devices=1", "--config.mesh.fsdp=1")
    assert resumed.returncode == 0, resumed.stderr
    for ours, theirs in zip(runs.metrics(two), expected, strict=True):
        assert ours["step"] == theirs["step"]
        assert ours.get("train/loss", 0) == pytest.approx(theirs.get("train/loss", 0), rel=1e-4)
