"""Checks with ``clip-jax plan``, where it is installed, that a run fits a slice before the slice is requested."""

import json
import shlex
import shutil
import subprocess
from pathlib import Path

from accelerators import LaunchError

TIMEOUT_SECONDS = 1800
"""The TPU compiler takes minutes for a large model."""


def command(program: str, accelerator: str, main_flags: list[str]) -> list[str]:
    """The plan of exactly this run; one compilation is enough to know whether it fits."""
    flags = [flag for flag in main_flags if not flag.startswith("--workdir")]
    return [program, "plan", *flags, f"--tpu={accelerator}", "--compilations=1", "--json"]


def check(checkout: Path, accelerator: str, main_flags: list[str]) -> None:
    """Raises LaunchError if the plan says that the run does not fit; prints a note if there is no plan."""
    if not any(flag.startswith("--config=") for flag in main_flags):
        return  # a resumed run: its folder has the settings, and they fit before
    candidates = (checkout / ".venv/bin/clip-jax", shutil.which("clip-jax"))
    program = next((str(path) for path in candidates if path and Path(path).exists()), "")
    if not program:
        print("not checked whether the run fits: clip-jax is not installed here (make install)")
        return
    asked = command(program, accelerator, main_flags)
    try:
        done = subprocess.run(asked, cwd=checkout, capture_output=True, text=True, timeout=TIMEOUT_SECONDS)
    except subprocess.TimeoutExpired:
        print(f"not checked whether the run fits: clip-jax plan took longer than {TIMEOUT_SECONDS} s")
        return
    try:
        plan = json.loads(done.stdout)
        fits = plan["fits"]
    except (json.JSONDecodeError, KeyError, TypeError):
        last = (done.stderr.strip().splitlines() or ["no answer"])[-1]
        print(f"not checked whether the run fits: clip-jax plan failed ({last})")
        return
    if not fits:
        needs = plan.get("hbm_bytes_per_chip")
        needs = f" ({needs / 2**30:.1f} GiB per chip)" if needs else ""
        raise LaunchError(
            f"the run does not fit {accelerator}{needs}: {shlex.join(asked[:-2])} suggests settings that do; "
            "--no-plan launches the run anyway"
        )
    print(f"it fits {accelerator}, according to clip-jax plan")
