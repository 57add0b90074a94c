"""The wheel is complete: installed without the checkout, it trains by a recipe's name and classifies."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]


def pip(*arguments: object) -> None:
    command = [sys.executable, "-m", "pip", "--quiet", "--disable-pip-version-check", *map(str, arguments)]
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode and "No matching distribution found for setuptools" in done.stderr:
        pytest.skip("the build needs setuptools, which cannot be downloaded here")
    assert done.returncode == 0, done.stderr


@pytest.mark.slow
def test_an_installed_wheel_trains_by_a_recipes_name(tmp_path):
    source = tmp_path / "source"  # a build leaves files behind
    for name in ("clip_jax", "configs"):
        shutil.copytree(ROOT / name, source / name, ignore=shutil.ignore_patterns("__pycache__"))
    for name in ("setup.py", "pyproject.toml", "MANIFEST.in", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, source)
    pip("wheel", "--no-deps", "--wheel-dir", tmp_path / "wheel", source)
    (wheel,) = (tmp_path / "wheel").iterdir()
    installed, here = tmp_path / "installed", tmp_path / "an empty folder"
    pip("install", "--no-deps", "--target", installed, wheel)
    here.mkdir()
    environment = os.environ | {"PYTHONPATH": str(installed), "PYTHONSAFEPATH": "1", "JAX_NUM_CPU_DEVICES": "1"}

    def run(*command: str) -> str:
        done = subprocess.run(command, cwd=here, env=environment, capture_output=True, text=True, timeout=300)
        assert done.returncode == 0, f"{command}\n{done.stdout[-2000:]}\n{done.stderr[-2000:]}"
        return done.stdout

    program = [sys.executable, str(installed / "bin/clip-jax")]
    where = run(sys.executable, "-c", "import clip_jax; print(clip_jax.__file__)").strip()
    assert Path(where).is_relative_to(installed)
    small = ["--config.steps=2", "--config.batch_size=16", "--config.optimizer.warmup_steps=0"]
    small += [
        "--config.eval.zero_shot.source=",
        "--config.eval.held_out.source=",
        "--config.tokenizer.train_captions=500",
    ]
    run(*program, "train", "--config=demo", "--workdir=runs/demo", *small)
    assert (here / "runs/demo/report.html").exists()
    said = run(*program, "classify", "--model=runs/demo", f"--image={ROOT}/docs/red_circle.png", "--labels=a cat,a dog")
    assert said.count("%") == 2
