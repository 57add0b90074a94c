"""The spot loop against the stand-in for the cloud, with the stand-in for main.py."""

import shutil
import signal
import subprocess

import pytest

from tests.launch.conftest import Cloud, commit
from tests.launch.processes import commands, wait_until


def test_a_run_goes_from_nothing_to_done_with_one_command(cloud):
    cloud.schedule({"waiting": 2, "provisioning": 1, "slow_boot": 2})
    cloud.script({"says": ["step 1", "step 2"], "checkpoint": 2})
    done = cloud.loop()
    assert done.returncode == 0, done.stdout + done.stderr
    in_order = ["is absent", "is waiting", "is active", "setup failed", "start 1, from step 0", "step 2\n"]
    positions = [done.stdout.index(text) for text in [*in_order, "the run ended: done", "to delete it: "]]
    assert positions == sorted(positions)
    assert "a-run (v4-8, spot) in us-central2-b is active, and costs money" in done.stdout
    assert cloud.count("queued-resources", "create") == 1 and cloud.count("delete") == 0


def test_a_mistake_in_the_settings_ends_the_loop_at_once_with_the_line_of_main(cloud):
    cloud.script({"says": ["main.py: config.batch_size=12 does not divide over 8 devices"], "code": 2})
    done = cloud.loop()
    assert done.returncode == 2 and cloud.starts() == 1
    line = "the run ended: a mistake in the settings (exit code 2): main.py: config.batch_size=12 does not divide"
    assert line in done.stdout and "to delete it: " in done.stdout


def test_the_line_of_main_is_found_above_a_page_of_a_librarys_text(cloud):
    cloud.script({"says": ["main.py: no space is left", *["a traceback"] * 1600], "code": 2})
    assert "(exit code 2): main.py: no space is left" in cloud.loop().stdout


def test_a_run_that_somebody_interrupted_is_not_started_again(cloud):
    cloud.script({"checkpoint": 5, "code": 130})
    done = cloud.loop()
    assert done.returncode == 130 and cloud.starts() == 1 and "interrupted by Ctrl-C" in done.stdout


def test_without_a_tpu_a_worker_does_not_train_on_its_cpu(cloud):
    cloud.script({"says": ["main.py: $JAX_PLATFORMS"]})
    assert "main.py: tpu,cpu" in cloud.loop().stdout


def test_an_error_that_a_restart_does_not_fix_ends_the_loop(cloud):
    cloud.script({"checkpoint": 5, "code": 45})
    assert cloud.loop().returncode == 45 and cloud.starts() == 1


@pytest.mark.slow
def test_a_hang_or_a_crash_restarts_on_the_same_slice_from_the_newest_complete_checkpoint(cloud):
    run = cloud.folder / "buckets/a-bucket/run"
    (run / "checkpoints/9").mkdir(parents=True)  # never completed
    cloud.script({"checkpoint": 3, "code": 44}, {"checkpoint": 7, "code": 134}, {})
    flags = [flag for flag in cloud.loop_flags() if not flag.startswith("--workdir")]
    done = cloud.launch(*flags, "--workdir=gs://a-bucket/run", "--delete-at-end")
    assert done.returncode == 0, done.stdout + done.stderr
    for start, step in enumerate((0, 3, 7), 1):
        assert f"start {start}, from step {step}, on 1 worker(s) of v4-8" in done.stdout
    # The second and third setup found the same dependencies installed.
    installs = (cloud.folder / "pip.log").read_text().splitlines()
    assert len(installs) == 1
    assert "-c " in installs[0] and installs[0].endswith("[tpu,gcs]") and "constraints.txt" in installs[0]
    assert cloud.count("create") == 1 and "a-run does not exist, and nothing costs money" in done.stdout


@pytest.mark.parametrize("grace_seconds", [None, 0.3])
def test_a_preempted_slice_is_deleted_and_requested_again(cloud, grace_seconds):
    cloud.schedule({"preempt": {"file": str(cloud.workdir / "kept"), "lines": 1, "grace_seconds": grace_seconds}})
    cloud.script({"checkpoint": 3, "says": ["a line of the log"], "lasts": 60}, {})
    done = cloud.loop()
    assert done.returncode == 0, done.stdout + done.stderr
    assert cloud.count("create") == 2 and cloud.count("delete") == 1
    assert "a-run (v4-8) is lost" in done.stdout and "from step 3" in done.stdout


@pytest.mark.slow
def test_starts_without_a_new_checkpoint_end_the_loop(cloud):
    cloud.script({"checkpoint": 7, "code": 1}, {"code": 1})
    done = cloud.loop("--max-restarts-without-progress=2")
    assert done.returncode == 2 and cloud.starts() == 3  # one that made progress, two that did not
    assert "2 starts without a new checkpoint (still step 7)" in done.stderr
    assert "to delete it: " in done.stdout


@pytest.mark.slow
def test_without_capacity_the_next_accelerator_is_requested_and_after_a_preemption_the_first_again(cloud):
    preempted = {"preempt": {"file": str(cloud.workdir / "kept"), "lines": 1, "grace_seconds": None}}
    cloud.schedule({"failed": True}, preempted, {})
    cloud.script({"checkpoint": 3, "lasts": 60}, {})
    done = cloud.loop(accelerator="v6e-8,v4-8")
    assert done.returncode == 0, done.stdout + done.stderr
    types = [word for call in cloud.calls() if "create" in call for word in call if "accelerator-type" in word]
    assert types == [f"--accelerator-type={name}" for name in ("v6e-8", "v4-8", "v6e-8")]
    assert "on 1 worker(s) of v4-8" in done.stdout and "on 1 worker(s) of v6e-8" in done.stdout


@pytest.mark.slow
def test_plain_tpu_vms_are_requested_until_there_is_capacity(cloud):
    full = {"refused": 'There is no more capacity in the zone "us-central2-b"'}
    preempted = {"preempt": {"file": str(cloud.workdir / "kept"), "lines": 1, "grace_seconds": None}}
    cloud.schedule(full, full, preempted, {})
    cloud.script({"checkpoint": 3, "lasts": 60}, {})
    done = cloud.loop("--provider=tpu-vm")
    assert done.returncode == 0, done.stdout + done.stderr
    assert cloud.count("tpu-vm", "create") == 4 and cloud.count("queued-resources") == 0
    assert cloud.count("tpu-vm", "delete") == 1 and "start 2, from step 3" in done.stdout


@pytest.mark.parametrize(
    ("refused", "message"),
    [
        ("RESOURCE_EXHAUSTED: Quota limit 'TPUV4sPreemptible' has been exceeded", "the project's quota is too small"),
        ("PERMISSION_DENIED: Permission 'tpu.nodes.create' denied", "permission denied"),
    ],
)
def test_a_missing_quota_or_permission_is_one_line_and_ends_the_loop(cloud, refused, message):
    cloud.schedule({"refused": refused})
    done = cloud.loop()
    assert done.returncode == 2 and cloud.count("create") == 1
    assert done.stderr.splitlines()[-1].startswith(f"launch/tpu.py: {message}")
    assert "a-run does not exist, and nothing costs money" in done.stdout


def test_without_a_slice_at_the_deadline_the_loop_ends_and_leaves_no_request(cloud):
    cloud.schedule({"waiting": 10_000})
    done = cloud.loop("--wait-hours=0.0001")
    assert done.returncode == 2 and "no slice in 0.0001 hours" in done.stderr
    assert "a-run does not exist" in done.stdout


def test_a_dropped_connection_does_not_end_the_run_and_no_line_of_the_log_is_lost_or_repeated(cloud):
    # The connections of a life: first status, true, copy, setup, status, start, and then the log.
    cloud.schedule({"drops": [7, 8]})
    cloud.script({"says": [f"line {i}" for i in range(40)]})
    done = cloud.loop()
    assert done.returncode == 0 and cloud.starts() == 1, done.stdout + done.stderr
    log = "".join(f"line {i}\n" for i in range(40))
    assert log in done.stdout and done.stdout.count("line ") == 40
    offsets = [int(call[-1].split()[-2]) for call in cloud.calls() if " follow " in call[-1]]
    assert len(offsets) >= 3 and offsets == sorted(offsets)


def started(cloud, *prefix: str) -> tuple[subprocess.Popen, str]:
    """The loop under a command such as nohup, and its output up to the first line of the run's log."""
    command = [*prefix, *cloud.command(*cloud.loop_flags())]
    process = subprocess.Popen(command, env=cloud.environment(), stdout=subprocess.PIPE, text=True)
    output = ""
    for line in process.stdout:
        output += line
        if line == "begun\n":
            break
    return process, output


@pytest.mark.slow
def test_a_stopped_loop_leaves_the_run_alone_and_joins_it_when_started_again(cloud):
    finish = cloud.folder / "finish"
    cloud.script({"says": ["begun"], "until": str(finish)})
    default = ("env", "--default-signal")  # the test runner may ignore some signals
    for number, ending in enumerate((signal.SIGINT, signal.SIGTERM, signal.SIGHUP)):
        loop, output = started(cloud, *default)
        assert ("the run is in progress; following it" in output) == (number > 0)
        loop.send_signal(ending)
        rest = loop.communicate(timeout=300)[0]
        assert loop.returncode == 130 and "to delete it: " in rest
        assert "stopped watching; the run on the slice continues" in rest
    loop, output = started(cloud, *default, "nohup")
    assert "the run is in progress; following it" in output
    loop.send_signal(signal.SIGHUP)
    finish.touch()
    rest = loop.communicate(timeout=300)[0]
    assert loop.returncode == 0 and "the run ended: done" in rest
    assert cloud.starts() == 1


@pytest.mark.slow
def test_a_start_stops_the_earlier_run_and_clears_its_lock(cloud):
    cloud.script({"lasts": 600}, {})
    flags = ["--name=a-run", "--zone=us-central2-b", "--accelerator=v4-8"]
    for command in ("create", "status", "setup"):
        assert cloud.launch(command, *flags).returncode == 0
    main = ["--config=configs/ok.py", f"--workdir={cloud.workdir}"]
    first = subprocess.Popen(cloud.command("run", *flags, *main), env=cloud.environment(), stdout=subprocess.DEVNULL)
    wait_until(lambda: cloud.starts() == 1)
    lock = cloud.machine(0) / "tmp/libtpu_lockfile"
    lock.write_text("")
    assert cloud.launch("run", *flags, *main).returncode == 0
    assert cloud.starts() == 2 and not lock.exists()
    assert not [words for _, words in commands(cloud.folder) if "main.py" in words]
    first.wait(timeout=300)


@pytest.mark.slow
def test_newer_code_is_what_the_next_start_runs(cloud, tmp_path):
    newer = Cloud(cloud.folder, tmp_path / "out")
    shutil.copytree(cloud.checkout, newer.checkout)
    cloud.script({})
    program = newer.checkout / "main.py"
    program.write_text('print("newer code", flush=True)\n' + program.read_text())
    assert "newer code" not in newer.loop().stdout  # not committed
    commit(newer.checkout)
    assert "newer code" in newer.loop().stdout


@pytest.mark.slow
def test_a_script_prepares_every_worker_before_the_run_starts_there(cloud):
    shards = cloud.folder / "buckets/a-bucket/some/shards"
    shards.mkdir(parents=True)
    (shards / "train-00000.tar").write_bytes(b"a shard")
    (cloud.folder / "env").write_text("DATA=gs://a-bucket/some/shards\n")
    script = cloud.folder / "my data.sh"
    script.write_text(
        '[ -e "$CLIP_JAX_CLOUD/run/turns" ] || touch "$HOME/before the run"\n'
        "bash clip_jax/code/launch/prepare_mount.sh\n"
    )
    cloud.script({"checkpoint": 1, "code": 44}, {})  # the second setup finds the bucket mounted
    done = cloud.loop(f"--prepare={script}", f"--env-file={cloud.folder / 'env'}", accelerator="v4-16")
    assert done.returncode == 0 and "start 2" in done.stdout, done.stdout + done.stderr
    for worker in (0, 1):
        home = cloud.machine(0, worker) / "home"
        assert (home / "before the run").exists()
        assert (home / "data/train-00000.tar").read_bytes() == b"a shard"


@pytest.mark.slow
def test_a_failing_prepare_script_is_tried_again_and_the_run_does_not_start(cloud):
    script = cloud.folder / "prepare.sh"
    script.write_text('echo "main.py must not start"; exit 1\n')
    cloud.script({})
    done = cloud.loop(f"--prepare={script}", "--max-restarts-without-progress=1")
    assert done.returncode == 2 and cloud.starts() == 0, done.stdout
    assert "setup failed (attempt 6 of 6)" in done.stdout and "a-run does not exist" in done.stdout
