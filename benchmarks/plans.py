"""Plans every recipe for the slice that its docstring names, and larger batches and slices besides: docs/plans.md.

pip install -e '.[plan]'
python benchmarks/plans.py > docs/plans.md

The step of each is compiled by the TPU compiler for a slice that is not there: one to two minutes each on one CPU core.
Answers are kept in runs/plans and not asked for again; --only=NAME takes those whose name begins so, and --kept reckons
those that were never compiled instead of compiling them.
"""

import argparse
import datetime
import json
import re
import subprocess
import sys
from pathlib import Path

import jax

from clip_jax import config as configs
from clip_jax.command_line import split_overrides
from clip_jax.hardware import GIB, tpu
from clip_jax.planning.search import reckon

RECIPES = sorted(Path("configs").glob("*.py"))
SLICE = re.compile(r"Planned for ([\w-]+)")
KEPT = Path("runs/plans")
ACCUMULATED = ["--config.micro_batch=16384", "--config.model.remat=dots", "--config.mesh.fsdp=16"]
# name -> recipe, slice, slices, overrides
LARGER = {
    "L/14, 131,072": ("clip_vit_l14", "v5e-256", 1, ["--config.batch_size=131072", *ACCUMULATED]),
    "L/14, 1,048,576": ("clip_vit_l14", "v5e-256", 1, ["--config.batch_size=1048576", *ACCUMULATED]),
    "L/14, two slices": ("clip_vit_l14", "v5e-256", 2, ["--config.batch_size=65536"]),
}
HEAD = """# Plans of the recipes

Written by `python benchmarks/plans.py` on {date} with jax {jax} and libtpu {libtpu}, on a machine without a TPU.

Each row is the real training step of a recipe, compiled by the TPU compiler for the slice that the recipe's docstring
names. *HBM* is the most that a chip holds at one time, arguments included, as the compiler says it; where *fits* says
*estimated*, the plan was not compiled. *Pairs/s* and *MFU* are bounds: nothing is faster
([how to read a plan](planning.md)). Nothing here was run on a TPU.
"""
COLUMNS = ("plan", "slice", "batch", "micro-batch", "remat", "mesh (data x fsdp)", "HBM of a chip", "fits", "estimate")
SPEED = ("pairs/s, at most", "MFU, at most", "bound by")


def cases() -> dict[str, tuple[str, str, int, list[str]]]:
    """All plans by name."""
    found = {}
    for recipe in RECIPES:
        found[recipe.stem] = (recipe.stem, SLICE.search(recipe.read_text())[1], 1, [])
    return found | LARGER


def asked(name: str, recipe: str, machine: str, slices: int, overrides: list[str], *, compile: bool) -> dict:
    """The plan's JSON, from the last time or from the compiler now."""
    file = KEPT / f"{re.sub(r'[^a-z0-9]+', '_', name.lower())}.json"
    if file.exists():
        return json.loads(file.read_text())
    command = [sys.executable, "-m", "clip_jax", "plan", f"--config=configs/{recipe}.py", f"--tpu={machine}"]
    command += [f"--slices={slices}", "--compilations=1", "--json", *overrides, *["--estimate"] * (not compile)]
    print(" ".join(command[3:]), file=sys.stderr)
    answer = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout
    if compile:
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(answer)
    return json.loads(answer)


def estimate(recipe: str, machine: str, slices: int, overrides: list[str]) -> str:
    """Of a chip's memory, as it is reckoned today, however long ago the step was compiled."""
    config = configs.load(f"configs/{recipe}.py", split_overrides(overrides)[1])
    return f"{reckon(config, tpu(machine, slices)).memory.total / GIB:.2f} GiB"


def row(name: str, plan: dict, case: tuple) -> list[str]:
    settings, hbm = plan["settings"], plan["hbm_bytes_per_chip"] / GIB
    return [
        name,
        plan["machines"],
        f"{settings['batch_size']:,}",
        f"{settings['micro_batch']:,}",
        settings["model.remat"],
        f"{settings['mesh.data']} x {settings['mesh.fsdp']}",
        f"{hbm:.2f} of {plan['free_hbm_bytes_per_chip'] / GIB:.2f} GiB",
        ("yes" if plan["fits"] else "**no**") + (", estimated" if not plan["compiled"] else ""),
        estimate(*case),
        f"{plan['pairs_per_second']:,.0f}",
        f"{plan['mfu']:.0%}",
        plan["bound"],
    ]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--only", default="", help="plans whose name begins so")
    parser.add_argument("--kept", action="store_true", help="compile nothing: reckon what is not kept")
    given = parser.parse_args()
    jax.config.update("jax_platforms", "cpu")
    chosen = {name: case for name, case in cases().items() if name.startswith(given.only)}
    plans = {name: asked(name, *case, compile=not given.kept) for name, case in chosen.items()}
    versions = {"libtpu": "none"} | max((plan["versions"] for plan in plans.values()), key=len)
    print(HEAD.format(date=datetime.date.today().isoformat(), **versions))
    for line in (
        (*COLUMNS, *SPEED),
        ["---"] * len((*COLUMNS, *SPEED)),
        *(row(n, p, chosen[n]) for n, p in plans.items()),
    ):
        print("| " + " | ".join(line) + " |")


if __name__ == "__main__":
    main()
