"""A run killed at any moment and started again equals one that was never killed, digit for digit."""

import json
import shutil
import signal
import subprocess
import time

import numpy as np
import portpicker
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from tests.data.faulty_server import serve
from tests.data.shards import jpeg, write_shard
from tests.training import runs


def kill_when(process: subprocess.Popen, condition, seconds: float = 600) -> None:
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


@pytest.mark.slow
@pytest.mark.every_jax
def test_killed_and_resumed_equals_never_killed(tmp_path):
    recipe = runs.write_recipe(tmp_path)
    undisturbed, killed = tmp_path / "whole", tmp_path / "killed"
    done = runs.main(tmp_path, f"--config={recipe}", f"--workdir={undisturbed}", cached=True)
    assert done.returncode == 0, done.stderr

    # Once in the middle of training, once while a checkpoint is being written.
    arguments = (f"--config={recipe}", f"--workdir={killed}")
    kill_when(start(tmp_path, *arguments), lambda: lines(killed) >= 8)
    unfinished = "*.orbax-checkpoint-tmp*"
    kill_when(
        start(tmp_path, *arguments), lambda: any((killed / "checkpoints").glob(unfinished)) and lines(killed) >= 10
    )
    resumed = runs.main(tmp_path, f"--workdir={killed}", cached=True)
    assert resumed.returncode == 0, resumed.stderr

    assert runs.metrics(killed) == runs.metrics(undisturbed)
    assert [line["step"] for line in runs.metrics(undisturbed) if "train/loss" in line] == list(range(1, 13))
    assert (killed / "report.html").exists()


def run_together(tmp_path, processes, *arguments) -> list[str]:
    """What each of the processes of one run printed; all must end well."""
    port = portpicker.pick_unused_port()
    started = [
        subprocess.Popen(
            runs.command(
                *arguments,
                f"--coordinator=127.0.0.1:{port}",
                f"--num_processes={processes}",
                f"--process_id={i}",
            ),
            cwd=tmp_path,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        for i in range(processes)
    ]
    outputs = [process.communicate(timeout=600)[0] for process in started]
    assert not any(process.returncode for process in started), outputs
    return outputs


MESH = ("--config.mesh.fsdp=2", "--config.mesh.tensor=2", "--config.mesh.cpu_devices={}")


@pytest.fixture(scope="module")
def one_process(tmp_path_factory):
    """(recipe, metrics of its first ten steps) of one process with eight devices in a mesh of all three axes."""
    folder = tmp_path_factory.mktemp("one process")
    recipe = runs.write_recipe(folder)
    mesh = " ".join(MESH).format(8).split()
    run_together(folder, 1, f"--config={recipe}", f"--workdir={folder / 'run'}", "--config.steps=10", *mesh)
    return recipe, runs.metrics(folder / "run")


@pytest.mark.exhaustive
def test_four_processes_have_the_metrics_of_one_over_10_steps(one_process, tmp_path):
    recipe, expected = one_process
    mesh = " ".join(MESH).format(2).split()
    run_together(tmp_path, 4, f"--config={recipe}", f"--workdir={tmp_path}", "--config.steps=10", *mesh)
    found = runs.metrics(tmp_path)
    assert [line["step"] for line in found if "train/loss" in line] == list(range(1, 11))
    for ours, theirs in zip(found, expected, strict=True):
        assert ours == pytest.approx(theirs, rel=1e-5, abs=1e-5)


@pytest.mark.exhaustive
def test_two_processes_train_as_one_and_one_goes_on_from_their_checkpoint(tmp_path):
    recipe = runs.write_recipe(tmp_path)
    one, two = tmp_path / "one", tmp_path / "two"
    devices = "--config.mesh.cpu_devices={}"
    done = runs.main(tmp_path, f"--config={recipe}", f"--workdir={one}", devices.format(4))
    assert done.returncode == 0, done.stderr

    run_together(tmp_path, 2, f"--config={recipe}", f"--workdir={two}", devices.format(2), "--config.mesh.fsdp=2")
    expected, found = runs.metrics(one), runs.metrics(two)
    assert [line.keys() for line in found] == [line.keys() for line in expected]
    for ours, theirs in zip(found, expected, strict=True):
        for name, value in ours.items():
            assert value == pytest.approx(theirs[name], rel=1e-4, abs=1e-5), (name, ours["step"])

    # The newest checkpoint of two processes, read by one with another mesh.
    for step in (12,):
        folder = two / "checkpoints" / str(step)
        folder.rename(tmp_path / f"away-{step}")
    resumed = runs.main(
        tmp_path, f"--workdir={two}", "--config.mesh.cpu_devices=1", "--config.mesh.fsdp=1", "--config.model.remat=full"
    )
    assert resumed.returncode == 0, resumed.stderr
    for ours, theirs in zip(runs.metrics(two), expected, strict=True):
        assert ours["step"] == theirs["step"]
        assert ours.get("train/loss", 0) == pytest.approx(theirs.get("train/loss", 0), rel=1e-4)


def samples_of(workdir) -> dict[tuple[int, int], int]:
    """(step, row of the global batch) -> sample, of all processes; a step that was taken again has the same."""
    found = {}
    for file in workdir.glob("samples.*.jsonl"):
        for line in map(json.loads, file.read_text().splitlines()):
            for row, sample in zip(line["rows"], line["samples"], strict=True):
                assert found.setdefault((line["step"], row), sample) == sample
    return found


REAL = [pytest.param("emoji", where, marks=pytest.mark.exhaustive) for where in ("disk", "failing server")]


@pytest.mark.parametrize(("data", "where"), [pytest.param("made", "failing server", marks=pytest.mark.slow), *REAL])
def test_a_mixture_killed_twice_and_moved_to_two_processes_has_the_samples_and_losses_of_an_undisturbed_run(
    tmp_path, request, data, where
):
    """Shards with captions in two languages, a table and scenes; the undisturbed run reads them from the disk."""
    recipe, folder = runs.write_recipe(tmp_path), tmp_path / "train"
    pairs, shards, steps, caption = 50, "train-{00000..00001}.tar", 12, "captions.de=1,caption=2"
    if data == "emoji":
        pairs, shards, steps, caption = 3461, "emoji/train-{00000..00005}.tar", 60, "captions.en=1,captions.ko=1"
        shutil.copytree(request.getfixturevalue("shared_data") / "emoji", folder / "emoji")
    rows = {"image": [jpeg(i) for i in range(20)], "caption": [f"picture {i}" for i in range(20)]}
    pq.write_table(pa.table(rows), folder / "own.parquet")
    # A held-out image that only one of two processes decodes, and that none can use.
    write_shard(tmp_path / "held_out" / "train-00001.tar", [{"jpg": b"no picture", "txt": b"nothing"}], first=13)

    def arguments(root: str, name: str) -> tuple[str, ...]:
        train = (
            f'("tar:{root}/{shards}", 1.0, "{caption}"),'
            f'("parquet:{root}/own.parquet", {pairs * 4 / 50}, "caption"), ("shapes:heldout", {pairs * 0.1 / 50})'
        )
        return (
            f"--config={recipe}",
            f"--config.steps={steps}",
            f"--config.model.text.vocab_size={2000 if data == 'emoji' else 320}",  # Korean has many characters
            f"--config.data.train=({train})",
            "--config.mesh.cpu_devices=2",
            f"--workdir={tmp_path / name}",
        )

    done = runs.main(tmp_path, *arguments(folder, "whole"), cached=True)
    assert done.returncode == 0, done.stderr
    killed = tmp_path / "killed"
    with serve(folder) as server:
        server.every = 20
        root = folder if where == "disk" else server.url
        kill_when(start(tmp_path, *arguments(root, "killed")), lambda: lines(killed) >= steps // 3)
        kill_when(start(tmp_path, *arguments(root, "killed")), lambda: lines(killed) >= steps * 2 // 3)
        run_together(tmp_path, 2, f"--workdir={killed}", "--config.mesh.cpu_devices=1")
        assert len(server.requests) > 100 or where == "disk"
    expected, found = samples_of(tmp_path / "whole"), samples_of(killed)
    assert found == expected and len(expected) == steps * 16
    assert {np.searchsorted([pairs, pairs + 20], sample, "right") for sample in expected.values()} == {0, 1, 2}
    for name in ("train/loss", "eval/held_out/loss"):
        ours, theirs = (
            [line[name] for line in runs.metrics(run) if name in line] for run in (killed, tmp_path / "whole")
        )
        assert ours == pytest.approx(theirs, rel=1e-4) and len(ours) == (steps if "train" in name else -(-steps // 5))
