"""The TPU compiler's time of training steps and of attention on one v5e chip, against the bounds of this project.

pip install -e '.[plan]'
python benchmarks/tpu_cycles.py

No TPU is needed: all figures are the compiler's estimates. --only=PREFIX selects rows by name. A step takes one to
four minutes of one CPU core. Exits with 1 if a bound is missed.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.experimental import topologies
from jax.sharding import SingleDeviceSharding

from clip_jax import config as configs
from clip_jax.command_line import split_overrides
from clip_jax.devices.hardware import GIB, tpu
from clip_jax.models.attention_tpu import TPUAttention
from clip_jax.planning import compiling
from clip_jax.planning.cycles import clock, estimate, kernel_cycles
from clip_jax.planning.plan import Request, make_plan
from clip_jax.planning.profile import PRODUCTS, Share, with_kernels

CHIP = "v5e-1"


class Step(NamedTuple):
    """A training step of 128 pairs."""

    recipe: str
    overrides: tuple[str, ...]
    xla: float
    """Milliseconds with XLA's attention."""
    bound: float


class Layer(NamedTuple):
    """The attention of one layer, bfloat16: everything between the projections, copies and pads included."""

    batch: int
    tokens: int
    heads: int
    dim: int
    xla: float
    bound: float


ROWS: dict[str, Step | Layer] = {
    "attention, 128 x 12 x 64, 197 tokens": Layer(128, 197, 12, 64, 8.6, 2.0),
    "attention, 128 x 12 x 64, 256 tokens": Layer(128, 256, 12, 64, 6.1, 1.7),
    "attention, 128 x 16 x 64, 257 tokens": Layer(128, 257, 16, 64, 22, 7.0),
    "clip_vit_b16": Step("clip_vit_b16", (), 360, 230),
    "clip_vit_l14": Step("clip_vit_l14", (), 1685, 1000),
    "siglip_b16 at 224 px": Step("siglip_b16", ("--config.model.remat=dots",), 391, 250),
}


def step_row(step: Step) -> tuple[float, str, str]:
    """(milliseconds, MFU, peak memory)."""
    overrides = ["--config.batch_size=128", *step.overrides]
    config = configs.load(f"configs/{step.recipe}.py", split_overrides(overrides)[1])
    plan = make_plan(Request(config, tpu(CHIP), compilations=1))
    if not plan.fits:
        return float("nan"), "", "does not fit"
    if plan.cycle_seconds is None:
        raise SystemExit(f"{step.recipe}: the compiler made no estimate")
    return 1e3 * plan.cycle_seconds, f"{plan.mfu:.0%}", f"{plan.chosen_compiled.hbm_bytes / GIB:.2f} GiB"


def layer_row(name: str) -> tuple[float, str, str]:
    machines = tpu(CHIP)
    variables = os.environ | compiling.environment(machines)
    program = _child(name, "program", variables)
    with tempfile.TemporaryDirectory() as profile:
        each = _child(name, "kernels", variables | {"LIBTPU_INIT_ARGS": f"{compiling.PROFILE}={profile}"})
    cycles = sum(s.cycles for s in with_kernels([Share(*share) for share in program], each) if s.kind != PRODUCTS)
    return 1e3 * cycles / clock(machines.chip), "", ""


def _child(name: str, what: str, variables: dict[str, str]) -> list | dict:
    done = subprocess.run(
        [sys.executable, __file__, f"--child={what}", f"--only={name}"],
        stdout=subprocess.PIPE,
        text=True,
        env=variables,
        check=True,
    )
    return json.loads(done.stdout.splitlines()[-1])


def compile_layer(layer: Layer, what: str) -> list | dict:
    """In a process of its own: the profile of a layer without its kernels, or the cycles of its kernels."""
    device = topologies.get_topology_desc(platform="tpu", **compiling.topology(tpu(CHIP))).devices[0]
    batch, tokens, heads, dim = layer[:4]
    width = heads * dim

    def forward(x, query, key, value, out):
        parts = ((x @ weight).reshape(batch, tokens, heads, dim) for weight in (query, key, value))
        return TPUAttention()(*parts).reshape(x.shape) @ out

    def both(arguments, gradient):
        result, backward = jax.vjp(forward, *arguments)
        return result, backward(gradient)

    sharding = SingleDeviceSharding(device)
    x = jax.ShapeDtypeStruct((batch, tokens, width), jnp.bfloat16, sharding=sharding)
    weight = jax.ShapeDtypeStruct((width, width), jnp.bfloat16, sharding=sharding)
    arguments = ((x, *[weight] * 4), x)
    if what == "kernels":
        return kernel_cycles(jax.make_jaxpr(both)(*arguments), device)
    return estimate(jax.jit(both).lower(*arguments).compile().as_text()).profile


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--only", default="", help="rows whose name begins with this")
    parser.add_argument("--child", help=argparse.SUPPRESS)
    given = parser.parse_args()
    jax.config.update("jax_platforms", "cpu")
    if given.child:
        print(json.dumps(compile_layer(ROWS[given.only], given.child)))
        return
    print(f"One v5e chip, bfloat16, jax {jax.__version__}, libtpu {compiling.version()}. Estimated, not run.\n")
    print("| | XLA's attention, ms | now, ms | MFU | peak memory | bound, ms | |")
    print("|---|---|---|---|---|---|---|")
    missed = []
    for name, row in ROWS.items():
        if not name.startswith(given.only):
            continue
        found, mfu, peak = step_row(row) if isinstance(row, Step) else layer_row(name)
        kept = found <= row.bound
        missed += [] if kept else [name]
        verdict = "kept" if kept else "**MISSED**"
        print(f"| {name} | {row.xla:g} | {found:.1f} | {mfu} | {peak} | {row.bound:g} | {verdict} |", flush=True)
    if missed:
        raise SystemExit(f"bounds missed: {', '.join(missed)}")


if __name__ == "__main__":
    main()
