"""The launch scripts without a cloud: what they would run, what they reject, and what they never print."""

import json
import os
import re
import runpy
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from clip_jax import errors
from clip_jax.devices import hardware
from tests.launch.conftest import ROOT
from tests.launch.gcloud_flags import FLAGS, command_of, unknown_flags

sys.path.insert(0, str(ROOT / "launch"))
import accelerators
import gcloud
import plans
import restarts
import spot_loop
from accelerators import LaunchError
from gcloud import State

WHERE = ["--name=a-run", "--zone=us-east5-b", "--project=a-project"]
MAIN = ["--config=configs/ok.py", "--workdir=gs://bucket/run"]
SCRIPTS = sorted(path.name for path in (ROOT / "launch").glob("*.sh"))


def printed(output: str) -> list[list[str]]:
    """The commands of a dry run."""
    return [shlex.split(line[2:]) for line in output.splitlines() if line.startswith("+ ")]


def dry(checkout: Path, program: str, *arguments: str) -> subprocess.CompletedProcess:
    """A dry run in which a call of gcloud would be noticed."""
    command = [str(checkout / "launch" / program), *arguments]
    if program.endswith(".py"):
        command.insert(0, sys.executable)
    path = f"{Path(__file__).parent / 'no_cloud'}:/usr/local/bin:/usr/bin:/bin"
    done = subprocess.run(command, capture_output=True, text=True, env=os.environ | {"PATH": path}, timeout=300)
    assert "gcloud was called" not in done.stderr
    return done


def test_every_script_passes_shellcheck():
    found = shutil.which("shellcheck", path=f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}")
    scripts = [f"launch/{name}" for name in SCRIPTS] + [str(p) for p in Path(__file__).parent.glob("bin/*")]
    done = subprocess.run([found, "--external-sources", *scripts], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout


def test_launching_needs_the_standard_library_alone(checkout):
    command = [sys.executable, "-E", "-S", str(checkout / "launch/tpu.py"), "loop", *WHERE, *MAIN, "--dry-run"]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


COMMANDS = [
    ("create_tpu_vm.sh", "--accelerator=v6e-8"),
    ("create_tpu_vm.sh", "--accelerator=v4-16", "--provider=tpu-vm", "--capacity=reserved", "--internal-ips"),
    ("create_tpu_vm.sh", "--accelerator=v5p-8", "--wait=6h", "--service-account=a@b.iam.gserviceaccount.com"),
    ("setup_worker.sh", "--internal-ips"),
    ("train.sh", "--hosts=4", "--follow", "--", *MAIN),
    ("delete_tpu_vm.sh",),
    ("delete_tpu_vm.sh", "--provider=tpu-vm"),
    *(("tpu.py", command, *MAIN) for command in ("create", "run", "loop")),
    *(("tpu.py", command, "--internal-ips") for command in ("setup", "status", "logs", "stop", "delete")),
    ("tpu.py", "loop", "--provider=tpu-vm", "--accelerator=v4-16,v4-8", *MAIN),
]


@pytest.mark.parametrize("command", COMMANDS, ids=" ".join)
def test_a_dry_run_runs_nothing_and_every_flag_is_one_that_its_gcloud_command_takes(checkout, command):
    program, *arguments = command
    verb = [arguments.pop(0)] if program == "tpu.py" else []
    done = dry(checkout, program, *verb, "--dry-run", *WHERE, *arguments)
    assert done.returncode == 0, done.stderr
    commands = [words[1:] for words in printed(done.stdout) if words[0] == "gcloud"]
    assert commands
    for words in commands:
        assert command_of(words) is not None and unknown_flags(words) == []
        assert "--zone=us-east5-b" in words and "--project=a-project" in words


def test_the_list_of_flags_distinguishes_the_two_flags_for_the_version():
    assert unknown_flags(["compute", "tpus", "tpu-vm", "create", "x", "--runtime-version=r"]) == ["--runtime-version=r"]
    assert unknown_flags(["compute", "tpus", "queued-resources", "create", "x", "--version=r"]) == ["--version=r"]


def test_the_list_of_flags_agrees_with_an_installed_gcloud():
    """Reads gcloud's own completion table, where gcloud is installed; gcloud is not run."""
    found = shutil.which("gcloud")
    table = Path(found).resolve().parents[1] / "data/cli/gcloud_completions.py" if found else None
    if table is None or not table.exists():
        pytest.skip("no gcloud is installed here")
    tree = runpy.run_path(str(table))["STATIC_COMPLETION_CLI_TREE"]
    for command, flags in FLAGS.items():
        node = tree
        for word in command.split():
            node = node["commands"][word]
        # Flags that every command takes, such as --version, are in the table once.
        assert flags <= {flag.removeprefix("--") for flag in (*node["flags"], *tree["flags"])}, command


def test_the_dry_run_of_the_loop_shows_every_step_of_a_run(checkout):
    flags = ["--zone=us-west4-a", "--accelerator=v5litepod-256", *MAIN]
    done = dry(checkout, "tpu.py", "loop", "--dry-run", *flags)
    index = {"gcloud": 4, "git": 3, "clip-jax": 1}
    verbs = [words[index[words[0]]] for words in printed(done.stdout)]
    setup, run = ["archive", "ssh", "scp", "ssh"], ["ssh", "ssh", "ssh", "ssh"]
    assert verbs == ["plan", "create", "describe", "describe", *setup, *run, "delete"], done.stdout
    assert "in gs://bucket/run: v5litepod-256 (64 worker(s), 256 devices), spot, in us-west4-a" in done.stdout
    decisions = dict(re.findall(r"^#    (\w+) +(stop|restart at 4|done)", done.stdout, re.MULTILINE))
    stops, restarted = (
        dict.fromkeys(("2", "43", "45", "130"), "stop"),
        dict.fromkeys(("42", "44", "other"), "restart at 4"),
    )
    assert decisions == {"0": "done"} | stops | restarted
    assert re.search(r"^# 2\. Request a slice$", done.stdout, re.MULTILINE)
    assert re.search(r"^# 4\. Set up its 64 worker", done.stdout, re.MULTILINE)


def test_the_dry_run_of_a_loop_that_resumes_from_a_folder_alone_has_no_plan(checkout):
    done = dry(checkout, "tpu.py", "loop", "--dry-run", *WHERE, "--workdir=gs://bucket/run")
    assert done.returncode == 0 and "clip-jax plan" not in done.stdout


NASTY = [
    "--config.data.train=tar:/my data/$HOME/`x`/train-*.tar",
    """--config.model.name=a 'b' "c" \\d""",
    "--config.x=",
]


def test_arguments_reach_main_unchanged_and_secrets_only_through_a_file(cloud):
    canary = "hf_canary_0123456789"
    secrets = cloud.folder / "my secrets"
    secrets.write_text(f"HF_TOKEN='{canary}'\n")
    cloud.script({"says": ["a line"]})
    done = cloud.loop(f"--env-file={secrets}", *NASTY)
    assert done.returncode == 0, done.stdout + done.stderr
    arrived = json.loads((cloud.workdir / "arguments-0.json").read_text())
    assert arrived == ["--config=configs/ok.py", f"--workdir={cloud.workdir}", *NASTY]
    assert canary not in done.stdout + done.stderr + json.dumps(cloud.calls())
    env_file = cloud.machine(0) / "home/.clip_jax.env"
    assert canary in env_file.read_text() and env_file.stat().st_mode & 0o777 == 0o600
    log = (cloud.machine(0) / "home/clip_jax/run/log").read_text()
    assert "a line" in log and canary not in log


@pytest.mark.parametrize("flag", ["--config.hf_token=x", "--config.Password=x", "--config.a.api_key=x"])
def test_a_secret_on_the_command_line_is_rejected(checkout, flag):
    done = dry(checkout, "train.sh", *WHERE, "--hosts=1", "--dry-run", "--", *MAIN, flag)
    assert done.returncode == 2 and "secrets do not belong on the command line" in done.stderr
    assert (
        dry(checkout, "train.sh", *WHERE, "--hosts=1", "--dry-run", "--", "--config.tokenizer.vocab=x").returncode == 0
    )


@pytest.mark.parametrize(
    ("program", "arguments", "message"),
    [
        ("create_tpu_vm.sh", ["--name=a", "--zone=z"], "--accelerator=... is missing"),
        ("create_tpu_vm.sh", [*WHERE, "--accelerator=v9-8"], "has no known runtime; pass --version=..."),
        ("create_tpu_vm.sh", [*WHERE, "--acelerator=v6e-8"], "--acelerator=v6e-8 is not a flag of this script"),
        ("train.sh", [*WHERE, "--hosts=1"], "the flags of main.py are missing"),
        ("setup_worker.sh", [*WHERE, "--revision=nowhere"], "not a revision of"),
        ("setup_worker.sh", [*WHERE, "--prepare=mount.sh"], "--prepare=mount.sh: no such file"),
        ("tpu.py", ["loop", *WHERE, *MAIN, "--env-file=nowhere"], "--env-file=nowhere: no such file"),
        (
            "tpu.py",
            ["loop", *WHERE, *MAIN, "--accelerator=v5e-12"],
            "Cloud TPU (nearest: v5litepod-1",
        ),
        ("tpu.py", ["loop", *WHERE, "--config=configs/ok.py"], "--workdir=gs://BUCKET/NAME is missing"),
        (
            "tpu.py",
            ["loop", *WHERE, "--workdir=s3://b/r"],
            "--workdir=s3://b/r: on Cloud TPU a run is stored in gs://",
        ),
        (
            "tpu.py",
            ["loop", *WHERE, "--config=configs/no.py", "--workdir=gs://b/r"],
            "is not in HEAD: commit it",
        ),
        ("tpu.py", ["loop", *WHERE, *MAIN, "--config.hf_token=x"], "secrets do not belong on the command line"),
    ],
)
def test_a_mistake_is_one_line_before_anything_costs_money(checkout, program, arguments, message):
    done = dry(checkout, program, *arguments)
    assert done.returncode == 2 and message in done.stderr, done.stdout + done.stderr
    assert "Traceback" not in done.stderr and "gcloud" not in done.stdout


@pytest.mark.parametrize("name", accelerators.names())
def test_an_accelerator_agrees_with_the_chip_table(name):
    ours, theirs = accelerators.accelerator(name), hardware.tpu(name)
    assert (ours.hosts, ours.devices) == (theirs.hosts, theirs.devices)
    assert ours.version == theirs.chip.runtime_version


def test_every_accelerator_type_of_cloud_tpu_is_known():
    table = {
        f"{c.prefixes[0]}-{n * c.units_per_chip}" for c in hardware.TPUS if c.runtime_version for n in c.topologies
    }
    assert set(accelerators.names()) == table


@pytest.mark.parametrize("prefix", accelerators.GENERATIONS)
def test_the_create_script_requests_the_same_runtime(checkout, prefix):
    generation = accelerators.GENERATIONS[prefix]
    name = f"{prefix}-{generation.sizes[0]}"
    queued = printed(dry(checkout, "create_tpu_vm.sh", *WHERE, f"--accelerator={name}", "--dry-run").stdout)[0]
    assert f"--runtime-version={generation.version}" in queued and f"--accelerator-type={name}" in queued


@pytest.mark.parametrize(
    ("codes", "decision", "code"),
    [
        ([0, 0], "done", 0),
        ([0, 1], "restart", 1),
        ([1, 2], "stop", 2),  # one host's mistake ends the others with other codes
        ([134, 45], "stop", 45),
        ([43, 43], "stop", 43),
        ([130, 42], "stop", 130),
        ([44, 134], "restart", 44),
        ([42, 42], "restart", 42),
        ([137, None], "restart", 1),
        ([], "restart", 1),
    ],
)
def test_the_exit_codes_of_all_workers_have_one_outcome(codes, decision, code):
    found = restarts.outcome(codes)
    assert (found.decision, found.code) == (decision, code)


def test_the_exit_codes_are_those_of_main():
    mains = {getattr(errors, name) for name in dir(errors) if name.startswith("EXIT_")}
    assert {code for code, _, _ in restarts.EXIT_CODES} == mains - {errors.EXIT_DONE, errors.EXIT_UNEXPECTED}


@pytest.mark.parametrize(
    ("request_state", "node", "state"),
    [
        (["WAITING_FOR_RESOURCES"], [], State.WAITING),
        (["ACCEPTED"], [], State.WAITING),  # the older name
        (["PROVISIONING"], [], State.WAITING),
        (["ACTIVE"], ["READY", "projects/p/acceleratorTypes/v6e-8"], State.ACTIVE),
        (["ACTIVE"], ["CREATING", "v6e-8"], State.WAITING),
        (["ACTIVE"], ["PREEMPTED", "v6e-8"], State.LOST),
        (["ACTIVE"], [], State.LOST),  # its node is gone
        (["SUSPENDING"], [], State.LOST),
        (["SUSPENDED"], ["READY", "v6e-8"], State.LOST),
        (["FAILED"], [], State.LOST),
        ([], [], State.ABSENT),
    ],
)
def test_the_state_of_a_slice_combines_its_request_and_its_node(monkeypatch, request_state, node, state):
    monkeypatch.setattr(gcloud, "_query", lambda command: node if "tpu-vm" in command else request_state)
    slice_ = gcloud.Slice("a-run", "z", "", "queued", accelerators.accelerator("v6e-8"))
    found, accelerator_type = gcloud.state(slice_)
    assert found is state and accelerator_type in ("", "v6e-8")


def test_waits_double_up_to_a_bound_with_jitter(monkeypatch):
    slept = []
    monkeypatch.setattr(spot_loop.time, "sleep", slept.append)
    backoff = spot_loop.Backoff(20.0)
    for _ in range(8):
        backoff.sleep()
    for seconds, about in zip(slept, [20, 40, 80, 160, 300, 300, 300, 300], strict=True):
        assert 0.8 * about <= seconds <= 1.2 * about
    assert len(set(slept)) == 8


def test_starts_per_hour_are_limited():
    starts = [restarts.Start(time, 0) for time in (0.0, 100.0, 3000.0)]
    assert restarts.seconds_to_wait(starts, 3100.0, per_hour=4) == 0
    assert restarts.seconds_to_wait(starts, 3100.0, per_hour=3) == 500.0  # the first is an hour old then
    assert restarts.seconds_to_wait(starts, 3600.0, per_hour=3) == 0
    assert restarts.seconds_to_wait(starts, 3100.0, per_hour=1) == 3500.0


def test_starts_from_the_same_checkpoint_are_limited():
    starts = [restarts.Start(time, 40) for time in (0.0, 1.0)]
    restarts.check_progress(starts, 40, max_without_progress=3)
    restarts.check_progress([restarts.Start(0.0, 20), *starts], 40, max_without_progress=3)
    with pytest.raises(LaunchError, match="3 starts without a new checkpoint"):
        restarts.check_progress([*starts, restarts.Start(2.0, 40)], 40, max_without_progress=3)


@pytest.mark.parametrize(
    ("answer", "message"),
    [
        (
            'echo \'{"fits": false, "hbm_bytes_per_chip": 21474836480}\'; exit 2',
            "not fit v6e-8 (20.0 GiB per chip)",
        ),
        ("echo '{\"fits\": true}'", "it fits v6e-8"),
        ("echo clip-jax: plan is not a command >&2; exit 2", "clip-jax plan failed (clip-jax: plan is not a command)"),
    ],
)
def test_a_run_that_does_not_fit_is_rejected(tmp_path, capsys, answer, message):
    program = tmp_path / ".venv/bin/clip-jax"
    program.parent.mkdir(parents=True)
    program.write_text(f"#!/bin/sh\n{answer}\n")
    program.chmod(0o755)
    try:
        plans.check(tmp_path, "v6e-8", MAIN)
        output = capsys.readouterr().out
    except LaunchError as error:
        assert "false" in answer
        output = str(error)
    assert message in output
