"""Plans every recipe for the slice that its docstring names, and larger batches and slices: writes docs/plans.md.

pip install -e '.[plan]'
python benchmarks/plans.py > docs/plans.md

The TPU compiler compiles the step of each, without a TPU, in one to two minutes on one CPU core. Results are cached in
runs/plans; --only=PREFIX selects plans by name, and --cached estimates plans that are not cached instead of compiling.
To compile them one after the other, each with its row in the file: python benchmarks/plans.py --only=NAME --update
"""

import argparse
import datetime
import json
import re
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax

import clip_jax
from clip_jax import config as configs
from clip_jax.command_line import split_overrides
from clip_jax.devices.hardware import GIB, tpu
from clip_jax.planning.search import estimate as estimate_plan

RECIPES = sorted(Path("configs").glob("*.py"))
SLICE = re.compile(r"Planned for ([\w-]+)")
CACHE = Path("runs/plans")
FILE = Path("docs/plans.md")
STEP = ("models", "losses", "objectives", "devices", "training", "planning")
"""The folders of the package whose changes change the compiled step of a recipe, or its estimate."""
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
names; each later phase has a row of its own. *HBM per chip* is the compiler's peak memory, arguments included; where
*fits* says *estimated*, the plan was not compiled, and there is no time by the compiler. *Estimate* is the plan's own
figure of the memory without the compiler. *About* is the compiler's estimate of its own program, *at most* the bound of
the hardware ([how to read a plan](planning.md)). None of these steps was run on a TPU.
"""
COLUMNS = ("plan", "slice", "batch", "micro-batch", "remat", "mesh (data x fsdp)", "HBM per chip", "fits", "estimate")
SPEED = ("attention", "step, about", "pairs/s, about", "MFU, about", "pairs/s, at most", "MFU, at most", "bound by")


def cases() -> dict[str, tuple[str, str, int, list[str]]]:
    """{name: (recipe, slice, number of slices, overrides)} of all plans."""
    found = {}
    for recipe in RECIPES:
        case, changed = (recipe.stem, SLICE.search(recipe.read_text())[1], 1), {}
        phases = configs.load(str(recipe)).phases
        found[recipe.stem] = (*case, ["--config.phases=()"] if phases else [])
        for number, phase in enumerate(phases, start=2):
            changed |= {key: value for key, value in phase.items() if key != "start"}
            settings = [f"--config.{key}={value}" for key, value in changed.items()]
            found[f"{recipe.stem}, phase {number}"] = (*case, ["--config.phases=()", *settings])
    return found | LARGER


def plan_json(name: str, recipe: str, machine: str, slices: int, overrides: list[str], *, compile: bool) -> dict:
    """The JSON of a plan, from the cache or from the compiler; a plan of another step's code is made again."""
    file = CACHE / f"{re.sub(r'[^a-z0-9]+', '_', name.lower())}.json"
    if file.exists() and file.stat().st_mtime > newest_source(recipe):
        return json.loads(file.read_text())
    command = [sys.executable, "-m", "clip_jax", "plan", f"--config=configs/{recipe}.py", f"--tpu={machine}"]
    command += [f"--slices={slices}", "--compilations=1", "--json", *overrides, *["--estimate"] * (not compile)]
    print(" ".join(command[3:]), file=sys.stderr)
    output = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout
    if compile:
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(output)
    return json.loads(output)


def newest_source(recipe: str) -> float:
    """When the code of a step was last changed: what is compiled, and the recipe."""
    package = Path(clip_jax.__file__).parent
    files = [file for part in STEP for file in (package / part).rglob("*.py")]
    return max(file.stat().st_mtime for file in (*files, Path(f"configs/{recipe}.py")))


def estimate(recipe: str, machine: str, slices: int, overrides: list[str]) -> str:
    """The current estimate of the memory per chip, even if the plan is from the cache."""
    config = configs.load(f"configs/{recipe}.py", split_overrides(overrides)[1])
    return f"{estimate_plan(config, tpu(machine, slices)).memory.total / GIB:.2f} GiB"


def row(name: str, result: dict, case: tuple) -> list[str]:
    settings, hbm = result["settings"], result["hbm_bytes_per_chip"] / GIB
    bound, about = result["at_most"], ["", "", ""]
    if result["compiler"]:
        about = [
            f"{result['step_seconds'] * 1e3:,.0f} ms",
            f"{result['pairs_per_second']:,.0f}",
            f"{result['mfu']:.0%}",
        ]
    return [
        name,
        result["machines"],
        f"{settings['batch_size']:,}",
        f"{settings['micro_batch']:,}",
        settings["model.remat"],
        f"{settings['mesh.data']} x {settings['mesh.fsdp']}",
        f"{hbm:.2f} of {result['free_hbm_bytes_per_chip'] / GIB:.2f} GiB",
        ("yes" if result["fits"] else "**no**") + (", estimated" if not result["compiled"] else ""),
        estimate(*case),
        settings["model.attention"],
        *about,
        f"{bound['pairs_per_second']:,.0f}",
        f"{bound['mfu']:.0%}",
        result["bound"],
    ]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--only", default="", help="plans whose name begins with this")
    parser.add_argument("--cached", action="store_true", help="compile nothing: estimate plans that are not cached")
    parser.add_argument("--update", action="store_true", help="replace the rows of these plans in docs/plans.md")
    given = parser.parse_args()
    jax.config.update("jax_platforms", "cpu")
    every = cases()
    chosen = selected(every, given.only)
    plans = {name: plan_json(name, *case, compile=not given.cached) for name, case in chosen.items()}
    versions = {"libtpu": "none"} | max((plan["versions"] for plan in plans.values()), key=len)
    rows = {name: line(row(name, result, chosen[name])) for name, result in plans.items()}
    if given.update:
        old = [text for text in FILE.read_text().splitlines() if text.startswith("| ")][2:]
        rows = {text.removeprefix("| ").split(" | ")[0]: text for text in old} | rows
        rows = {name: rows[name] for name in every if name in rows}
    head = HEAD.format(date=datetime.date.today().isoformat(), **versions)
    text = "\n".join((head, line((*COLUMNS, *SPEED)), line(["---"] * len((*COLUMNS, *SPEED))), *rows.values()))
    if given.update:
        FILE.write_text(text + "\n")
    else:
        print(text)


def selected(every: dict[str, Any], only: str) -> dict[str, Any]:
    """The item of that name, or all whose names begin with it."""
    return {only: every[only]} if only in every else {k: v for k, v in every.items() if k.startswith(only)}


def line(cells: Sequence[str]) -> str:
    return "| " + " | ".join(cells) + " |"


if __name__ == "__main__":
    main()
