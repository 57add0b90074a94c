"""Does the run fit the slice? ``clip-jax plan`` knows, without the slice; asked where it is installed."""

import json
import shlex
import shutil
import subprocess
from pathlib import Path

from accelerators import LaunchError

PLAN_SECONDS = 1800
"""The TPU compiler takes minutes for a large model."""


def command(program: str, accelerator: str, main_flags: list[str]) -> list[str]:
    """One compilation is enough to know whether this very run fits."""
    flags = [flag for flag in main_flags if not flag.startswith("--workdir")]
    return [program, "plan", *flags, f"--tpu={accelerator}", "--compilations=1", "--json"]


def check(checkout: Path, accelerator: str, main_flags: list[str], *, wanted: bool = True) -> None:
    """Raises LaunchError when the plan says that the run cannot fit; says so where there is no plan."""
    if not wanted:
        return
    program = next(
        (p for p in (checkout / ".venv/bin/clip-jax", shutil.which("clip-jax")) if p and Path(p).exists()), ""
    )
    asked = command(str(program), accelerator, main_flags)
    if not any(flag.startswith("--config=") for flag in main_flags):
        return  # a run that goes on: its folder decides what it is, and it did fit
    if not program:
        print("no plan: clip-jax is not installed here (make install), so whether the run fits is not known")
        return
    try:
        done = subprocess.run(asked, cwd=checkout, capture_output=True, text=True, timeout=PLAN_SECONDS)
        plan = json.loads(done.stdout)
        fits = plan["fits"]
    except (subprocess.TimeoutExpired, json.JSONDecodeError, KeyError, TypeError):
        last = (done.stderr.strip().splitlines() or ["no answer"])[-1] if "done" in locals() else "no answer"
        print(f"no plan ({last}), so whether the run fits is not known")
        return
    if not fits:
        needs = plan.get("hbm_bytes_per_chip")
        needs = f" ({needs / 2**30:.1f} GiB a chip)" if needs else ""
        raise LaunchError(
            f"the run does not fit {accelerator}{needs}: {shlex.join(asked[:-2])} shows settings that do; "
            "--no-plan launches it all the same"
        )
    print(f"it fits {accelerator}, says clip-jax plan")
