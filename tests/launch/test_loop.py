"""The spot loop against the stand-in for the cloud, with a main.py that only acts."""

import shutil
import signal
import subprocess
import time

import pytest

from tests.launch.conftest import Cloud, commit


def test_a_run_goes_from_nothing_to_done_with_one_command(cloud):
    cloud.schedule({"waiting": 2, "provisioning": 1, "slow_boot": 2})
    cloud.script({"says": ["step 1", "step 2"], "checkpoint": 2})
    done = cloud.loop()
    assert done.returncode == 0, done.stdout + done.stderr
    in_order = ["is absent", "is waiting", "is active", "setup did not succeed", "start 1, from step 0", "step 2\n"]
    positions = [done.stdout.index(text) for text in [*in_order, "the run ended: done", "to delete it: "]]
    assert positions == sorted(positions)
    assert "a-run (v4-8, spot) in us-central2-b is active, and costs money" in done.stdout
    assert cloud.count("queued-resources", "create") == 1 and cloud.count("delete") == 0


def test_the_slice_may_be_deleted_at_the_end(cloud):
    cloud.script({})
    done = cloud.loop("--delete-at-end")
    assert done.returncode == 0 and "nothing is left of a-run, and nothing costs money" in done.stdout


def test_a_mistake_in_the_settings_ends_the_loop_at_once_with_the_line_of_main(cloud):
    cloud.script({"says": ["main.py: config.batch_size=12 does not divide over 8 devices"], "code": 2})
    done = cloud.loop()
    assert done.returncode == 2 and cloud.starts() == 1
    said = "the run ended: a mistake in the settings (exit code 2): main.py: config.batch_size=12 does not divide"
    assert said in done.stdout and "to delete it: " in done.stdout


@pytest.mark.parametrize("code", [43, 45])
def test_what_a_restart_does_not_mend_ends_the_loop(cloud, code):
    cloud.script({"checkpoint": 5, "code": code})
    assert cloud.loop().returncode == code and cloud.starts() == 1


def test_a_hang_or_a_crash_starts_again_on_the_same_slice(cloud):
    cloud.script({"checkpoint": 1, "code": 44}, {"checkpoint": 2, "code": 134}, {})
    done = cloud.loop()
    assert done.returncode == 0 and cloud.starts() == 3, done.stdout
    assert cloud.count("create") == 1 and "start 3, from step 2" in done.stdout


@pytest.mark.parametrize(("grace_seconds", "provider"), [(None, "queued"), (0.3, "queued"), (None, "tpu-vm")])
def test_a_slice_that_is_taken_away_is_deleted_and_asked_for_again(cloud, grace_seconds, provider):
    gone = {"file": str(cloud.workdir / "kept"), "lines": 1, "grace_seconds": grace_seconds}
    cloud.schedule({"preempt": gone})
    cloud.script({"checkpoint": 3, "says": ["a line of the log"], "lasts": 30}, {})
    done = cloud.loop(f"--provider={provider}")
    assert done.returncode == 0, done.stdout + done.stderr
    assert cloud.count("create") == 2 and cloud.count("delete") == 1
    assert "a-run (v4-8) is lost" in done.stdout and "from step 3" in done.stdout


def test_starts_without_a_new_checkpoint_end_the_loop(cloud):
    cloud.script({"checkpoint": 7, "code": 1}, {"code": 1})
    done = cloud.loop()
    assert done.returncode == 2 and cloud.starts() == 4  # one that advanced, three that did not
    assert "3 starts without a new checkpoint (still step 7)" in done.stderr
    assert "to delete it: " in done.stdout


def test_without_room_for_the_first_kind_of_slice_the_second_is_taken(cloud):
    cloud.schedule({"failed": True}, {})
    cloud.script({})
    done = cloud.loop(accelerator="v4-16,v4-8")
    assert done.returncode == 0, done.stdout + done.stderr
    kinds = [word for call in cloud.calls() if "create" in call for word in call if "accelerator-type" in word]
    assert kinds == ["--accelerator-type=v4-16", "--accelerator-type=v4-8"]
    assert "on 1 worker(s) of v4-8" in done.stdout


def test_a_slice_that_is_lost_is_first_asked_for_as_it_was(cloud):
    gone = {"file": str(cloud.workdir / "kept"), "lines": 1, "grace_seconds": None}
    cloud.schedule({"preempt": gone})
    cloud.script({"checkpoint": 3, "lasts": 30}, {})
    done = cloud.loop(accelerator="v6e-8,v4-8")
    assert done.returncode == 0, done.stdout + done.stderr
    assert cloud.count("--accelerator-type=v6e-8") == 2 and cloud.count("--accelerator-type=v4-8") == 0


def test_plain_tpu_vms_are_asked_for_until_there_is_room(cloud):
    full = {"refused": 'There is no more capacity in the zone "us-central2-b"'}
    cloud.schedule(full, full, {})
    cloud.script({})
    done = cloud.loop("--provider=tpu-vm")
    assert done.returncode == 0, done.stdout + done.stderr
    assert cloud.count("tpu-vm", "create") == 3 and cloud.count("queued-resources") == 0


@pytest.mark.parametrize(
    ("refused", "said"),
    [
        ("RESOURCE_EXHAUSTED: Quota limit 'TPUV4sPreemptible' has been exceeded", "the project's quota does not reach"),
        ("PERMISSION_DENIED: Permission 'tpu.nodes.create' denied", "gcloud may not do this"),
    ],
)
def test_what_only_a_person_can_mend_in_the_cloud_is_one_line(cloud, refused, said):
    cloud.schedule({"refused": refused})
    done = cloud.loop()
    assert done.returncode == 2 and cloud.count("create") == 1
    assert done.stderr.splitlines()[-1].startswith(f"launch/tpu.py: {said}")
    assert "nothing is left of a-run" in done.stdout


def test_no_slice_within_the_deadline_is_the_end_and_leaves_no_request_behind(cloud):
    cloud.schedule({"waiting": 10_000})
    done = cloud.loop("--wait-hours=0.0001")
    assert done.returncode == 2 and "no slice in 0.0001 hours" in done.stderr
    assert "nothing is left of a-run" in done.stdout


def test_a_connection_that_drops_neither_ends_the_run_nor_loses_nor_repeats_its_log(cloud):
    # connections of a life: a first look, true, copy, setup, status, start, and then the log
    cloud.schedule({"drops": [7, 9]})
    cloud.script({"says": [f"line {i}" for i in range(40)], "pause": 0.1})
    done = cloud.loop()
    assert done.returncode == 0 and cloud.starts() == 1, done.stdout + done.stderr
    shown = [line for line in done.stdout.splitlines() if line.startswith("line ")]
    assert shown == [f"line {i}" for i in range(40)]


def started(cloud, *shell):
    """The loop, when its run has begun. ``shell`` gives it its signals."""
    command = [*shell, *cloud.command(*cloud.loop_flags())]
    process = subprocess.Popen(command, env=cloud.environment(), stdout=subprocess.PIPE, text=True)
    for line in process.stdout:
        if line == "begun\n":
            break
    return process


@pytest.mark.parametrize("ending", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
def test_the_loop_may_be_stopped_and_joins_the_run_when_it_is_started_again(cloud, ending):
    cloud.script({"says": ["begun"], "lasts": 12})
    first = started(cloud, "env", "--default-signal")  # also where the tests run behind an &
    first.send_signal(ending)
    rest = first.communicate(timeout=30)[0]
    assert first.returncode == 130 and "what runs on the slice goes on" in rest and "to delete it: " in rest
    second = cloud.loop()
    assert second.returncode == 0 and "the run is under way; following it" in second.stdout
    assert cloud.starts() == 1 and "begun" in second.stdout


def test_a_loop_under_nohup_outlives_its_terminal(cloud):
    cloud.script({"says": ["begun"], "lasts": 2})
    process = started(cloud, "nohup")
    process.send_signal(signal.SIGHUP)
    assert process.communicate(timeout=30) and process.returncode == 0


def test_a_start_stops_the_run_before_it_and_clears_its_lock(cloud):
    cloud.script({"lasts": 60}, {})
    flags = ["--name=a-run", "--zone=us-central2-b", "--accelerator=v4-8"]
    for command in ("create", "status", "status", "status", "setup"):
        assert cloud.launch(command, *flags).returncode == 0
    main = ["--config=configs/ok.py", f"--workdir={cloud.workdir}"]
    first = subprocess.Popen(cloud.command("run", *flags, *main), env=cloud.environment(), stdout=subprocess.DEVNULL)
    while cloud.starts() < 1:
        time.sleep(0.02)
    lock = cloud.folder / "machines/a-run-0/0/tmp/libtpu_lockfile"
    lock.write_text("")
    assert cloud.launch("run", *flags, *main).returncode == 0
    assert cloud.starts() == 2 and not lock.exists()
    first.wait(timeout=90)


def test_a_worker_is_set_up_once_for_all_revisions_with_the_same_dependencies(cloud):
    cloud.script({"checkpoint": 1, "code": 44}, {})
    assert cloud.loop().returncode == 0
    installs = (cloud.folder / "pip.log").read_text().splitlines()
    assert len(installs) == 1
    assert "-c " in installs[0] and installs[0].endswith("[tpu,gcs]") and "constraints.txt" in installs[0]


def test_a_script_of_ones_own_prepares_every_worker_before_the_run_starts_there(cloud):
    script = cloud.folder / "my data.sh"
    script.write_text('mkdir -p "$HOME/data" && [ ! -e "$CLIP_JAX_CLOUD/run/turns" ] && touch "$HOME/data/shard.tar"\n')
    cloud.script({})
    done = cloud.loop(f"--prepare={script}", accelerator="v4-16")
    assert done.returncode == 0, done.stdout + done.stderr
    assert [(cloud.machine(0, worker) / "home/data/shard.tar").exists() for worker in (0, 1)] == [True, True]


def test_a_script_that_fails_to_prepare_is_tried_again_and_no_run_starts_over_it(cloud):
    script = cloud.folder / "prepare.sh"
    script.write_text('echo "main.py was not to start"; exit 1\n')
    cloud.script({})
    done = cloud.loop(f"--prepare={script}", "--fruitless-restarts=1")
    assert done.returncode == 2 and cloud.starts() == 0, done.stdout
    assert "setup did not succeed (attempt 6 of 6)" in done.stdout and "nothing is left of a-run" in done.stdout


def test_the_newest_checkpoint_in_a_bucket_is_one_that_is_complete(cloud):
    run = cloud.folder / "buckets/a-bucket/run"
    (run / "checkpoints/9").mkdir(parents=True)  # begun and never finished
    cloud.script({"checkpoint": 3, "code": 44}, {"checkpoint": 7, "code": 44}, {})
    flags = [f for f in cloud.loop_flags() if not f.startswith("--workdir")]
    done = cloud.launch(*flags, "--workdir=gs://a-bucket/run")
    assert done.returncode == 0, done.stdout + done.stderr
    assert "start 1, from step 0" in done.stdout and "start 2, from step 3" in done.stdout
    assert "start 3, from step 7" in done.stdout


def test_newer_code_is_what_the_next_start_runs(cloud, tmp_path):
    newer = Cloud(cloud.folder, tmp_path / "out")
    shutil.copytree(cloud.checkout, newer.checkout)
    cloud.script({"checkpoint": 1, "code": 2}, {})
    assert newer.loop().returncode == 2
    program = newer.checkout / "main.py"
    program.write_text('print("newer code", flush=True)\n' + program.read_text())
    assert "newer code" not in newer.loop().stdout  # not committed
    commit(newer.checkout)
    assert "newer code" in newer.loop().stdout


def test_data_in_a_bucket_is_mounted_on_every_worker(cloud):
    shards = cloud.folder / "buckets/a-bucket/some/shards"
    shards.mkdir(parents=True)
    (shards / "train-00000.tar").write_bytes(b"a shard")
    (cloud.folder / "env").write_text("DATA=gs://a-bucket/some/shards\n")
    cloud.script({"checkpoint": 1, "code": 44}, {})  # the second setup finds it mounted
    mount = cloud.checkout / "launch/prepare_mount.sh"
    done = cloud.loop(f"--prepare={mount}", f"--env-file={cloud.folder / 'env'}", accelerator="v4-16")
    assert done.returncode == 0, done.stdout + done.stderr
    for worker in (0, 1):
        assert (cloud.machine(0, worker) / "home/data/train-00000.tar").read_bytes() == b"a shard"
