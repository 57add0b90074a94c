"""The spot loop keeps a real pretraining run alive, on two processes and then one, through preemptions."""

import json
import sys

import pytest

from tests.launch.conftest import Cloud, commit, make_checkout
from tests.training import runs

STEPS = 60
"""Well past the last preemption, so that the run cannot end before it."""


@pytest.fixture(scope="module")
def whole_checkout(tmp_path_factory):
    """A git checkout of the project with a small recipe."""
    folder = tmp_path_factory.mktemp("a whole check") / "out"
    make_checkout(folder, ["launch", "setup.py", "main.py", "clip_jax", "configs"])
    data = tmp_path_factory.mktemp("data")
    recipe = runs.write_recipe(data).read_text()
    (folder / "configs/small.py").write_text(recipe)
    commit(folder)
    (folder / ".venv").symlink_to(sys.prefix, target_is_directory=True)  # has clip-jax plan
    return folder


@pytest.fixture
def cloud(cloud, whole_checkout):
    return Cloud(cloud.folder, whole_checkout)


FLAGS = [
    "--config=configs/small.py",
    f"--config.steps={STEPS}",
    "--config.checkpoint.every_steps=10",
    "--config.eval.held_out.source=",
    "--config.eval.held_out.every_steps=-1",
]


def environment(folder) -> dict[str, str]:
    """A compilation cache, because each start of the run compiles the same programs."""
    cache = {"JAX_COMPILATION_CACHE_DIR": str(folder / "compiled"), "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0"}
    return {"JAX_PLATFORMS": "cpu", **cache}


def samples_of_steps(workdir) -> dict[int, list[int]]:
    """The samples of every step in the order of the global batch; a repeated step must have had the same ones."""
    taken: dict[tuple[int, int], int] = {}
    for file in workdir.glob("samples.*.jsonl"):
        for line in file.read_text().splitlines():
            try:
                written = json.loads(line)
            except json.JSONDecodeError:
                continue  # the line that SIGKILL interrupted
            for row, sample in zip(written["rows"], written["samples"], strict=True):
                assert taken.setdefault((written["step"], row), sample) == sample
    steps = sorted({step for step, _ in taken})
    return {step: [taken[key] for key in sorted(taken) if key[0] == step] for step in steps}


def losses(workdir) -> dict[int, float]:
    return {line["step"]: line["train/loss"] for line in runs.metrics(workdir) if "train/loss" in line}


@pytest.mark.slow
def test_three_preemptions_and_a_change_from_two_workers_to_one_do_not_change_a_run(cloud, tmp_path):
    metrics = str(cloud.workdir / "metrics.jsonl")
    cloud.schedule(
        {"waiting": 2, "slow_boot": 2, "preempt": {"file": metrics, "lines": 4, "grace_seconds": 30}},  # two workers
        {"drops": [7], "preempt": {"file": metrics, "lines": 22, "grace_seconds": None}},  # two workers
        {"failed": True},  # no more capacity for two workers
        {"preempt": {"file": metrics, "lines": 32, "grace_seconds": 30}},  # one worker
        {"failed": True},
        {},  # one worker, to the end
        **environment(tmp_path),
    )
    flags = ["--name=a-run", "--zone=us-central2-b", "--accelerator=v4-16,v4-8", "--poll-seconds=0.1", "--no-plan"]
    done = cloud.launch("loop", *flags, *FLAGS, f"--workdir={cloud.workdir}", seconds=400)
    assert done.returncode == 0, done.stdout[-5000:] + done.stderr[-2000:]

    undisturbed = runs.main(
        tmp_path,
        *FLAGS,
        f"--config={cloud.checkout}/configs/small.py",
        f"--workdir={tmp_path}/undisturbed",
        cached=True,
    )
    assert undisturbed.returncode == 0, undisturbed.stderr

    # The lock of the machine that was killed was taken at once.
    assert "is in use" not in done.stdout and "has not released it" not in done.stdout
    assert "received SIGTERM" in done.stdout and cloud.count("queued-resources", "create") == 6
    assert "on 2 worker(s) of v4-16" in done.stdout and "on 1 worker(s) of v4-8" in done.stdout
    whole = samples_of_steps(tmp_path / "undisturbed")
    assert list(whole) == list(range(1, STEPS + 1)) and samples_of_steps(cloud.workdir) == whole
    ours, theirs = losses(cloud.workdir), losses(tmp_path / "undisturbed")
    assert list(ours) == list(theirs) == list(range(1, STEPS + 1))
    apart = max(abs(ours[step] - theirs[step]) for step in ours)
    print(done.stdout, f"the losses differ by at most {apart:.1e}", sep="\n")
    assert apart < 1e-5


@pytest.mark.slow
def test_a_mistake_that_main_reports_ends_the_loop(cloud, tmp_path):
    cloud.schedule({}, **environment(tmp_path))
    where = ["--name=a-run", "--zone=us-central2-b", "--accelerator=v4-16", "--poll-seconds=0.1", "--no-plan"]
    done = cloud.launch("loop", *where, *FLAGS, f"--workdir={cloud.workdir}", "--config.batch_size=13", seconds=200)
    assert done.returncode == 2, done.stdout + done.stderr
    line = "a mistake in the settings (exit code 2): main.py: config.batch_size=13 does not divide over 2 devices"
    assert line in done.stdout and done.stdout.count("] start ") == 1


@pytest.mark.slow
def test_a_run_that_does_not_fit_requests_no_slice(cloud):
    where = ["--name=a-run", "--zone=us-central2-b", "--accelerator=v5litepod-8"]
    done = cloud.launch("loop", *where, "--config=configs/clip_vit_l14.py", f"--workdir={cloud.workdir}", seconds=120)
    assert done.returncode == 2 and cloud.calls() == [], done.stdout + done.stderr
    assert "launch/tpu.py: the run does not fit v5litepod-8 (" in done.stderr
