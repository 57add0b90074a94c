"""Small runs for tests: a recipe over a few tar shards, and ``main.py`` in a process of its own."""

import json
import os
import subprocess
import sys
from pathlib import Path

from clip_jax.training.metrics import is_timing
from tests.data.shards import write_shards

ROOT = Path(__file__).resolve().parents[2]

RECIPE = '''"""A test."""
from clip_jax.config import defaults, evaluation


def get_config():
    config = defaults()
    config.steps = 12
    config.batch_size = 16
    config.data.train = "{train}"
    config.eval.held_out = evaluation(source="{held_out}", every_steps=5)
    config.checkpoint.every_steps = 3
    config.log.every_steps = 1
    config.log.samples = True
    config.model.name = "ViT-Shapes/16"
    for tower, layers in ((config.model.image, 2), (config.model.text, 1)):
        tower.width, tower.layers, tower.heads, tower.mlp_width = 32, layers, 2, 64
    config.model.image.image_size = 32
    config.model.text.vocab_size = 320
    config.model.embed_dim = 24
    config.optimizer.warmup_steps = 3
    return config
'''


def write_recipe(folder: Path) -> Path:
    """Shards of 50 training and 13 held-out pairs, and a recipe over them."""
    train, held_out = write_shards(folder / "train", 50), write_shards(folder / "held_out", 13, shards=1)
    path = folder / "recipe.py"
    path.write_text(RECIPE.format(train=train, held_out=held_out))
    return path


def command(*arguments: object) -> list[str]:
    return [sys.executable, str(ROOT / "main.py"), *map(str, arguments)]


def environment(tmp_path: Path) -> dict[str, str]:
    """That of the tests; the same programs are compiled again and again, so they are kept beside the test's data."""
    return os.environ | {
        "JAX_COMPILATION_CACHE_DIR": str(tmp_path / "compiled"),
        "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
    }


def main(tmp_path: Path, *arguments: object, cached: bool = False) -> subprocess.CompletedProcess:
    """Runs ``main.py`` to its end. ``cached``: not where stderr is read, on which some CPUs report a refused entry."""
    env = environment(tmp_path) if cached else None
    return subprocess.run(command(*arguments), env=env, capture_output=True, text=True, timeout=300, cwd=tmp_path)


def start(tmp_path: Path, *arguments: object) -> subprocess.Popen:
    """One of several processes, its output and errors in one pipe; they do not share a cache of compiled programs."""
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True}
    return subprocess.Popen(command(*arguments), cwd=tmp_path, **pipes)


def metrics(workdir: Path) -> list[dict]:
    """The lines of metrics.jsonl without timings."""
    lines = [json.loads(line) for line in (workdir / "metrics.jsonl").read_text().splitlines()]
    return [{name: value for name, value in line.items() if not is_timing(name)} for line in lines]
