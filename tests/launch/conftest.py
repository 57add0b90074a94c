"""A checkout to launch from, and the stand-in for the cloud that its commands use."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import NamedTuple

import pytest

from tests.launch.processes import kill_all

ROOT = Path(__file__).resolve().parents[2]
BIN = Path(__file__).resolve().parent / "bin"

MAIN = '''"""Stands in for main.py: acts the next entry of the script."""
import json, os, pathlib, sys, time

cloud = pathlib.Path(os.environ["CLIP_JAX_CLOUD"])
path = next(a.partition("=")[2] for a in sys.argv if a.startswith("--workdir="))
workdir = cloud / "buckets" / path[5:] if path.startswith("gs://") else pathlib.Path(path)
workdir.mkdir(parents=True, exist_ok=True)
turn = workdir / "turns"
number = len(turn.read_text()) if turn.exists() else 0
turn.write_text("x" * (number + 1))
script = json.loads((cloud / "script.json").read_text())
act = script[min(number, len(script) - 1)]
(workdir / f"arguments-{number}.json").write_text(json.dumps(sys.argv[1:]))
for line in act.get("says", []):
    print(os.path.expandvars(line), flush=True)
if "checkpoint" in act:
    kept = workdir / "checkpoints" / str(act["checkpoint"])
    kept.mkdir(parents=True, exist_ok=True)
    (kept / "commit_success.txt").write_text("")
    (workdir / "kept").write_text("a checkpoint")
time.sleep(act.get("lasts", 0))
while "until" in act and not pathlib.Path(act["until"]).exists():
    time.sleep(0.02)
sys.exit(act.get("code", 0))
'''


class Cloud(NamedTuple):
    """The stand-in for one test."""

    folder: Path
    checkout: Path

    @property
    def workdir(self) -> Path:
        return self.folder / "run"

    def schedule(self, *lives: dict, **environment: str) -> None:
        (self.folder / "schedule.json").write_text(json.dumps({"lives": lives, "environment": environment}))

    def script(self, *acts: dict) -> None:
        """What main.py does at each of its starts; the last entry repeats."""
        (self.folder / "script.json").write_text(json.dumps(acts))

    def command(self, *arguments: str) -> list[str]:
        return [sys.executable, str(self.checkout / "launch/tpu.py"), *map(str, arguments)]

    def environment(self) -> dict[str, str]:
        own = {"CLIP_JAX_CLOUD": str(self.folder), "CLIP_JAX_CLOUD_PYTHON": sys.executable}
        return os.environ | own | {"PATH": f"{BIN}:/usr/local/bin:/usr/bin:/bin"}

    def machine(self, life: int, worker: int = 0) -> Path:
        """The disk of a worker of a slice; ``life`` counts the slices created."""
        return self.folder / "machines" / f"a-run-{life}" / str(worker)

    def launch(self, *arguments: str, seconds: float = 60) -> subprocess.CompletedProcess:
        return subprocess.run(
            self.command(*arguments), env=self.environment(), capture_output=True, text=True, timeout=seconds
        )

    def loop(self, *arguments: str, accelerator: str = "v4-8", seconds: float = 60) -> subprocess.CompletedProcess:
        return self.launch(*self.loop_flags(accelerator), *arguments, seconds=seconds)

    def loop_flags(self, accelerator: str = "v4-8") -> list[str]:
        where = ["loop", "--name=a-run", "--zone=us-central2-b", f"--accelerator={accelerator}", "--poll-seconds=0.01"]
        return [*where, "--config=configs/ok.py", f"--workdir={self.workdir}"]

    def calls(self) -> list[list[str]]:
        file = self.folder / "calls.jsonl"
        return [json.loads(line) for line in file.read_text().splitlines()] if file.exists() else []

    def count(self, *words: str) -> int:
        """The number of gcloud calls with all these words."""
        return sum(all(word in call for word in words) for call in self.calls())

    def starts(self) -> int:
        turns = self.workdir / "turns"
        return len(turns.read_text()) if turns.exists() else 0


def make_checkout(folder: Path, files: list[str]) -> Path:
    """A folder with these files of the project."""
    for name in files:
        source, target = ROOT / name, folder / name
        target.parent.mkdir(parents=True, exist_ok=True)
        if source.is_dir():
            shutil.copytree(source, target, ignore=shutil.ignore_patterns("__pycache__"), dirs_exist_ok=True)
        else:
            shutil.copy2(source, target)
    return folder


def commit(folder: Path) -> None:
    identity = ["-c", "user.name=test", "-c", "user.email=test@localhost"]
    for words in (["init", "-q"], ["add", "-A"], [*identity, "commit", "-q", "-m", "all of it"]):
        subprocess.run(["git", *words], cwd=folder, check=True)


@pytest.fixture(scope="session")
def checkout(tmp_path_factory) -> Path:
    """The launch scripts with the stand-in for main.py."""
    folder = make_checkout(tmp_path_factory.mktemp("a check") / "out", ["launch", "setup.py"])
    (folder / "main.py").write_text(MAIN)
    (folder / "configs").mkdir()
    (folder / "configs" / "ok.py").write_text("")
    commit(folder)
    return folder


@pytest.fixture
def cloud(tmp_path, checkout):
    cloud = Cloud(tmp_path, checkout)
    cloud.schedule()
    yield cloud
    kill_all(tmp_path)
