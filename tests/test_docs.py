"""Every command of the documents runs, and the demo reaches what it promises, in a copy with a space in its path."""

import json
import os
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from clip_jax import commands, errors
from clip_jax import config as configs
from clip_jax.data.emoji import LANGUAGES
from clip_jax.devices import hardware
from clip_jax.planning import plan as planning
from clip_jax.planning import report
from tests.data.shards import jpeg, write_shards
from tests.launch.conftest import MAIN, Cloud, commit, make_checkout
from tests.launch.processes import kill_all

ROOT = Path(__file__).resolve().parents[1]
POD = ROOT / "docs/pod.md"
"""Its commands meet the stand-in for the cloud."""
MODELS = ROOT / "docs/models.md"
"""Its blocks meet weights of their own, in test_docs_models.py."""
DOCUMENTS = [ROOT / "README.md", *sorted(set((ROOT / "docs").glob("*.md")) - {POD, MODELS})]

PROGRAM = ".venv/bin/clip-jax "
SHORT = "--config.steps=2 --config.optimizer.warmup_steps=0"
"""What makes a documented training run short: everything else of it runs as written."""


def blocks(language: str, documents: list[Path] = DOCUMENTS) -> list[str]:
    return [b for d in documents for b in re.findall(rf"```{language}\n(.*?)```", d.read_text(), re.DOTALL)]


@pytest.fixture(scope="module")
def clone(tmp_path_factory) -> Path:
    """The tracked and new files of this checkout, with its environment, and a folder of photos to train on."""
    folder = tmp_path_factory.mktemp("a fresh") / "copy"
    listed = ["git", "ls-files", "--cached", "--others", "--exclude-standard"]
    for name in subprocess.run(listed, cwd=ROOT, capture_output=True, text=True, check=True).stdout.splitlines():
        if (ROOT / name).is_file():
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy2(ROOT / name, folder / name)
    (folder / ".venv").symlink_to(Path(sys.prefix), target_is_directory=True)
    for split, count in (("train", 8), ("held_out", 4)):
        (folder / "photos" / split).mkdir(parents=True)
        for i in range(count):
            (folder / "photos" / split / f"{i}.jpg").write_bytes(jpeg(i))
            (folder / "photos" / split / f"{i}.txt").write_text(f"a {split} picture, number {i}")
    return folder


def run(clone: Path, command: str, seconds: float, optimized: bool = False) -> subprocess.CompletedProcess:
    """In a shell of its own; programs are compiled in a hurry, as all tests', or as users' are."""
    dropped = ("JAX_PLATFORMS", "MAKEFLAGS", *(("XLA_FLAGS",) if optimized else ()))
    environment = {k: v for k, v in os.environ.items() if k not in dropped}
    done = subprocess.run(
        ["bash", "-c", command], cwd=clone, capture_output=True, text=True, timeout=seconds, env=environment
    )
    assert done.returncode == 0, f"{command}\n{done.stdout[-2000:]}\n{done.stderr[-2000:]}"
    return done


@pytest.mark.slow
def test_the_demo_learns_combinations_it_has_never_seen(clone):
    done = run(clone, "make demo", seconds=1800, optimized=True)
    assert "zero_shot_top1" in done.stdout and "clip-jax classify" in done.stdout
    lines = [json.loads(line) for line in (clone / "runs/demo/metrics.jsonl").read_text().splitlines()]
    last = next(line for line in reversed(lines) if "eval/zero_shot/zero_shot_top1" in line)
    assert last["eval/zero_shot/zero_shot_top1"] >= 0.90
    assert (clone / "runs/demo/report.html").stat().st_size < 2_000_000
    again = run(clone, "make demo", seconds=120)  # quick the second time: there is nothing left to train
    assert "zero_shot_top1" in again.stdout


@pytest.mark.slow
def test_every_command_of_the_documents_runs(clone, shared_data, monkeypatch):
    """Those of the README as typed; clip-jax of the guides in this process, which spares it the imports."""
    monkeypatch.chdir(clone)
    as_typed = set("".join(blocks("bash", [ROOT / "README.md"])).splitlines())
    (clone / "data").mkdir()
    (clone / "data/emoji").symlink_to(shared_data / "emoji", target_is_directory=True)
    for line in "".join(blocks("bash")).splitlines():
        if not line or line.startswith("make "):
            continue  # make demo and make test have their own tests; make test would run this one
        command = line.replace("/data/train-", f"{shared_data}/emoji/train-")
        if "main.py" in command:
            resumes = "--config=" not in command
            small = " --config.batch_size=8 --config.data.max_bad_share=1.0"
            big = small + " --config.model.image.layers=1 --config.model.text.layers=1" if "clip_vit" in command else ""
            needs_merges = "clip_vit" in command or "emoji.py" in command
            vocabulary = (
                f" --config.tokenizer.vocab={shared_data}/clip_bpe/bpe_simple_vocab_16e6.txt.gz" if needs_merges else ""
            )
            few = small if "own_images" in command or "emoji" in command else ""
            if "multilingual" in command:
                few += "".join(f" --config.eval.{language}.source=" for language in LANGUAGES if language != "ko")
            command += "" if resumes else f" {SHORT}{big}{vocabulary}{few}"
        sets_devices = command.startswith(f"{PROGRAM}doctor")  # which this process cannot do again
        if command.startswith(PROGRAM) and command not in as_typed and not sets_devices:
            assert commands.main(shlex.split(command)[1:]) in (0, None), command
        else:
            run(clone, command, seconds=900)


@pytest.mark.slow
def test_the_python_of_the_readme_runs(clone):
    done = run(clone, f".venv/bin/python - <<'END'\n{''.join(blocks('python'))}\nEND", seconds=300)
    probabilities = np.array(re.findall(r"\[\[([^]]*)\]\]", done.stdout)[-1].split(), float)
    assert probabilities[0] > 0.9


@pytest.fixture
def cloud(tmp_path):
    """The stand-in for the cloud, and a checkout of ours to launch from, with a main.py that only acts."""
    folder = make_checkout(tmp_path / "a check" / "out", ["launch", "setup.py", "configs", "clip_jax"])
    (folder / "main.py").write_text(MAIN)
    (folder / ".gitignore").write_text("__pycache__\n.venv\n")
    commit(folder)
    (folder / ".venv").symlink_to(Path(sys.prefix), target_is_directory=True)
    write_shards(folder / "shards", 4)
    cloud = Cloud(tmp_path, folder)
    now = {"waiting": 0, "provisioning": 0}
    kept = str(tmp_path / "buckets/my-bucket/runs/b32/kept")
    cloud.schedule(now, now | {"preempt": {"file": kept, "lines": 1, "grace_seconds": None}}, now, now)
    yield cloud
    kill_all(tmp_path)


@pytest.mark.slow
def test_every_command_on_the_way_to_a_pod_runs_against_the_stand_in_for_the_cloud(cloud):
    lasts, done = {"says": ["step 500"], "checkpoint": 500, "lasts": 60}, {"says": ["the end"]}
    cloud.script(lasts, done)
    (cloud.folder / "buckets/my-bucket/runs/try").mkdir(parents=True)  # its own run just ends
    (cloud.folder / "buckets/my-bucket/runs/try/turns").write_text("x")
    (cloud.folder / "buckets/my-bucket/runs/gpu").mkdir(parents=True)
    (cloud.folder / "buckets/my-bucket/runs/gpu/turns").write_text("x")
    environment = cloud.environment() | {"PYTHONPATH": str(cloud.checkout)}
    said = ""
    for command in "".join(blocks("bash", [POD])).splitlines():
        check_settings(command)
        quick = " --poll-seconds=0.1" if " loop " in command else ""
        ran = subprocess.run(
            ["bash", "-c", command + quick], cwd=cloud.checkout, capture_output=True, text=True, env=environment
        )
        assert ran.returncode == 0, f"{command}\n{ran.stdout[-3000:]}\n{ran.stderr[-3000:]}"
        said += ran.stdout
    # The run was taken away once, and went on from its checkpoint; on the second slice it went on again.
    assert "the slice was taken away" in said and said.count("from step 500") >= 2, said
    assert "it fits v5litepod-16" in said and "clip-jax is absent" in said and "nothing costs money" in said
    data = [list((cloud.folder / "machines").glob(f"clip-jax-{life}/*/home/data/*.tar")) for life in range(4)]
    assert [len(found) for found in data] == [2, 8, 8, 2]  # both shards on every worker


def check_settings(command: str) -> None:
    """UserError where a command names a recipe or a setting that there is not, or warms up for longer than it runs."""
    for words in (shlex.split(command), *(shlex.split(w.partition("=")[2]) for w in shlex.split(command) if " " in w)):
        flags = [w for w in words if w.startswith("--config")]
        recipe = next((w.partition("=")[2] for w in flags if w.startswith("--config=")), None)
        if recipe:
            overrides = dict(w.removeprefix("--config.").split("=", 1) for w in flags if w.startswith("--config."))
            config = configs.load(str(ROOT / recipe), overrides)
            configs.check_lengths(config, configs.duration(config, "", 400_000_000), 400_000_000)


@pytest.mark.parametrize("row", re.findall(r"^\| `(\w+\.py)` \|(.*)\|$", POD.read_text(), re.MULTILINE))
def test_the_costs_in_the_guide_are_those_that_the_plan_says(row):
    recipe, cells = row[0], [cell.strip() for cell in row[1].split("|")]
    for mfu, expected in ((None, cells[:3]), (0.3, cells[3:])):
        request = planning.Request(
            config=configs.load(str(ROOT / "configs" / recipe), {"examples": "1000000000"}),
            machines=hardware.tpu("v5e-256"),
            price=1.2,
            mfu=mfu,
            compile=False,
        )
        said = dict(dict(report.sections(planning.make_plan(request)))["The run"])
        hours = re.search(r"([\d:]+), (?:at least )?([\d,]+) chip-hours", said["time"])
        cost = re.search(r"([\d,]+) at 1.2", said["cost"])
        assert [*hours.groups(), cost[1]] == expected


def test_every_row_of_what_happens_when_names_tests_that_there_are():
    text = (ROOT / "docs/what_happens_when.md").read_text()
    named = re.findall(r"`([\w/]+\.py)::(\w+)`", text)
    for file, test in named:
        assert f"def {test}(" in (ROOT / "tests" / file).read_text(), f"{file}::{test}"
    rows = re.split(r"^(?=\*\*|## )", text, flags=re.MULTILINE)[1:]
    assert all("::test_" in row for row in rows if row.startswith("**")) and len(named) > 40
    codes = {getattr(errors, name) for name in dir(errors) if name.startswith("EXIT_")}
    assert codes == {int(code) for code in re.findall(r"^\| (\d+)", text, re.MULTILINE)}


def test_every_file_that_the_readme_names_is_there():
    named = re.findall(r"`((?:configs|clip_jax|tests|docs)/[\w/.]+)`|\]\(([\w/.]+)\)", (ROOT / "README.md").read_text())
    for name in {a or b for a, b in named}:
        assert (ROOT / name).exists(), name


def test_nothing_tracked_carries_a_path_of_a_machine():
    listed = subprocess.run(["git", "ls-files"], cwd=ROOT, capture_output=True, text=True, check=True).stdout
    for name in listed.splitlines():
        if (ROOT / name).suffix in (".py", ".md", ".toml", ".sh", ".html") and name != "tests/test_docs.py":
            text = (ROOT / name).read_text(encoding="utf-8")
            assert not re.search(r"(?<![\w}])/(root|home|work|tmp)/\w+", text), name
