"""Every command of the documents runs, and the demo reaches what it promises, in a copy with a space in its path."""

import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from tests.data.shards import jpeg

ROOT = Path(__file__).resolve().parents[1]
DOCUMENTS = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]

SHORT = "--config.steps=2 --config.optimizer.warmup_steps=0"
"""What makes a documented training run short: everything else of it runs as written."""


def blocks(language: str) -> list[str]:
    return [b for d in DOCUMENTS for b in re.findall(rf"```{language}\n(.*?)```", d.read_text(), re.DOTALL)]


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
    for split, count in (("train", 8), ("heldout", 4)):
        (folder / "photos" / split).mkdir(parents=True)
        for i in range(count):
            (folder / "photos" / split / f"{i}.jpg").write_bytes(jpeg(i))
            (folder / "photos" / split / f"{i}.txt").write_text(f"a {split} picture, number {i}")
    return folder


def run(clone: Path, command: str, seconds: float) -> subprocess.CompletedProcess:
    environment = {k: v for k, v in os.environ.items() if k not in ("JAX_PLATFORMS", "XLA_FLAGS", "MAKEFLAGS")}
    done = subprocess.run(
        ["bash", "-c", command], cwd=clone, capture_output=True, text=True, timeout=seconds, env=environment
    )
    assert done.returncode == 0, f"{command}\n{done.stdout[-2000:]}\n{done.stderr[-2000:]}"
    return done


@pytest.mark.slow
def test_the_demo_learns_combinations_it_has_never_seen(clone):
    done = run(clone, "make demo", seconds=1200)
    assert "zero_shot_top1" in done.stdout and "clip-jax classify" in done.stdout
    lines = [json.loads(line) for line in (clone / "runs/demo/metrics.jsonl").read_text().splitlines()]
    last = next(line for line in reversed(lines) if "eval/zero_shot/zero_shot_top1" in line)
    assert last["eval/zero_shot/zero_shot_top1"] >= 0.90
    assert (clone / "runs/demo/report.html").stat().st_size < 2_000_000
    again = run(clone, "make demo", seconds=120)  # quick the second time: there is nothing left to train
    assert "zero_shot_top1" in again.stdout


@pytest.mark.slow
def test_every_command_of_the_documents_runs(clone, shared_data):
    (clone.parent / "shared").symlink_to(shared_data.parent, target_is_directory=True)  # where emoji.py looks
    for line in "".join(blocks("bash")).splitlines():
        if not line or line.startswith("make "):
            continue  # make demo and make test have their own tests; make test would run this one
        command = line.replace("/data/train-", f"{shared_data}/emoji/train-")
        if "main.py" in command:
            resumes = "--config=" not in command
            small = " --config.batch_size=8 --config.data.max_bad_share=1.0"
            big = small + " --config.model.image.layers=1 --config.model.text.layers=1" if "clip_vit" in command else ""
            vocabulary = f" --config.tokenizer.vocab={shared_data}/clip_bpe/bpe_simple_vocab_16e6.txt.gz" if big else ""
            own = small if "own_images" in command else ""
            command += "" if resumes else f" {SHORT}{big}{vocabulary}{own}"
        run(clone, command, seconds=600)


@pytest.mark.slow
def test_the_python_of_the_readme_runs(clone):
    done = run(clone, f".venv/bin/python - <<'END'\n{''.join(blocks('python'))}\nEND", seconds=300)
    probabilities = np.array(re.findall(r"\[\[([^]]*)\]\]", done.stdout)[-1].split(), float)
    assert probabilities[0] > 0.9


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
