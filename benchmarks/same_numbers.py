"""Whether two commits compute the same numbers: train/loss digit for digit, evaluations to 1e-6.

python benchmarks/same_numbers.py --old=bcd0a80 [--new=HEAD] [--steps=60] [--recipes=demo,emoji]

Trains each recipe with the code of both commits on this machine, each in a worktree of its own, and compares every line
of metrics.jsonl but its timings. An evaluation that was renamed is compared with its successor.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path

from clip_jax.training.metrics import is_timing

ROOT = Path(__file__).resolve().parents[1]
DATA = ROOT.parent / "shared" / "data"
RENAMED = {"eval/heldout/": "eval/held_out/"}
EVALUATION_TOLERANCE = 1e-6


def train(commit: str, recipe: str, steps: int, folder: Path) -> list[dict[str, float]]:
    """The lines of metrics.jsonl of a run with the code of a commit."""
    tree, workdir = folder / f"tree-{commit}", folder / f"{recipe}-{commit}"
    if not tree.exists():
        subprocess.run(["git", "worktree", "add", "--detach", "--force", tree, commit], cwd=ROOT, check=True)
        if not (folder / "shared").exists():
            (folder / "shared").symlink_to(ROOT.parent / "shared")  # where an older emoji recipe looks for its data
        (tree / "data").mkdir(exist_ok=True)
        (tree / "data/emoji").symlink_to(DATA / "emoji")  # where a newer one does
    vocabulary = [f"--config.tokenizer.vocab={DATA}/clip_bpe/bpe_simple_vocab_16e6.txt.gz"] if recipe == "emoji" else []
    lengths = [f"--config.steps={steps}", "--config.log.every_steps=1", f"--config.optimizer.warmup_steps={steps // 2}"]
    subprocess.run(
        [sys.executable, "main.py", f"--config=configs/{recipe}.py", f"--workdir={workdir}", *lengths, *vocabulary],
        cwd=tree,
        env=os.environ | {"PYTHONPATH": str(tree)},
        check=True,
        stdout=subprocess.DEVNULL,
    )
    return [json.loads(line) for line in (workdir / "metrics.jsonl").read_text().splitlines()]


def renamed(name: str) -> str:
    for old, new in RENAMED.items():
        name = name.replace(old, new)
    return name


def differences(old: list[dict[str, float]], new: list[dict[str, float]]) -> list[str]:
    """One line per number that differs."""
    found = [] if len(old) == len(new) else [f"{len(old)} lines and {len(new)}"]
    for before, after in zip(old, new, strict=False):
        for name, value in before.items():
            other = after.get(renamed(name))
            same = value == other
            if name.startswith("eval/") and other is not None:
                same = abs(value - other) <= EVALUATION_TOLERANCE * max(1.0, abs(value))
            if not same and not is_timing(name):
                found.append(f"step {before['step']}: {name} {value} and {other}")
    return found


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--old", required=True)
    parser.add_argument("--new", default="HEAD")
    parser.add_argument("--steps", type=int, default=60)
    parser.add_argument("--recipes", default="demo,emoji")
    args = parser.parse_args()
    different = False
    with tempfile.TemporaryDirectory() as folder:
        try:
            for recipe in args.recipes.split(","):
                old, new = (train(commit, recipe, args.steps, Path(folder)) for commit in (args.old, args.new))
                found = differences(old, new)
                losses = [line["train/loss"] for line in new if "train/loss" in line]
                print(
                    f"{recipe}: {len(losses)} losses, the last {losses[-1]!r}: {'different' if found else 'the same'}"
                )
                print("\n".join(found[:20]))
                different |= bool(found)
        finally:
            for commit in (args.old, args.new):
                subprocess.run(["git", "worktree", "remove", "--force", Path(folder) / f"tree-{commit}"], cwd=ROOT)
    return int(different)


if __name__ == "__main__":
    sys.exit(main())
