"""The TPU compiler's time of training steps and of attention on v5e chips, against the bounds of this project.

pip install -e '.[plan]'
python benchmarks/tpu_cycles.py

No TPU is needed: all figures are the compiler's estimates. --only=PREFIX selects rows by name. A step takes one to
five minutes of one CPU core; results of steps are cached in runs/plans, together with those of benchmarks/plans.py.
Exits with 1 if a bound is missed.
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

import plans
from clip_jax.devices.hardware import GIB, tpu
from clip_jax.models.attention_tpu import TPUAttention
from clip_jax.planning import compiling
from clip_jax.planning.cycles import clock, estimate, kernel_cycles
from clip_jax.planning.profile import PRODUCTS, Share, with_kernels

CHIP = "v5e-1"


class Step(NamedTuple):
    """A training step of 128 pairs on one chip."""

    recipe: str
    overrides: tuple[str, ...]
    xla: float
    """Milliseconds with XLA's attention."""
    bound: float


class Planned(NamedTuple):
    """A chip's share of a recipe's step on the slice that its docstring names; the memory may not grow."""

    recipe: str
    share: float | None
    """The bound of the time, relative to that with XLA's attention."""


class Layer(NamedTuple):
    """The attention of one layer, bfloat16: everything between the projections, copies and pads included."""

    batch: int
    tokens: int
    heads: int
    dim: int
    xla: float
    bound: float


class Found(NamedTuple):
    """The cells of a row."""

    milliseconds: float
    bound: float | None
    xla: float
    mfu: str = ""
    peak: float | None = None
    """GiB."""
    xla_peak: float | None = None

    @property
    def verdict(self) -> str:
        in_time = self.bound is None or self.milliseconds <= self.bound
        in_memory = self.xla_peak is None or self.peak <= self.xla_peak
        return "met" if in_time and in_memory else "**MISSED**"


ROWS: dict[str, Step | Planned | Layer] = {
    "attention, 128 x 12 x 64, 197 tokens": Layer(128, 197, 12, 64, 8.6, 2.0),
    "attention, 128 x 12 x 64, 256 tokens": Layer(128, 256, 12, 64, 6.1, 1.7),
    "attention, 128 x 16 x 64, 257 tokens": Layer(128, 257, 16, 64, 22, 7.0),
    "clip_vit_b16": Step("clip_vit_b16", (), 360, 230),
    "clip_vit_l14": Step("clip_vit_l14", (), 1685, 1000),
    "siglip_b16 at 224 px": Step("siglip_b16", ("--config.model.remat=dots",), 391, 250),
    "planned clip_vit_b16": Planned("clip_vit_b16", None),
    "planned clip_vit_l14": Planned("clip_vit_l14", None),
    "planned siglip_b16": Planned("siglip_b16", None),
    "planned clip_vit_l14_336": Planned("clip_vit_l14_336", 0.6),
    "planned siglip_so400m14": Planned("siglip_so400m14", 0.6),
}


def compiled(name: str, *case) -> tuple[float, str, float]:
    """(milliseconds, MFU, GiB per chip) of a plan."""
    plan = plans.plan_json(name, *case, compile=True)
    if not plan["fits"]:
        return float("nan"), "does not fit", plan["hbm_bytes_per_chip"] / GIB
    if plan["compiler"] is None:
        raise SystemExit(f"{name}: the compiler made no estimate")
    return 1e3 * plan["compiler"]["seconds"], f"{plan['mfu']:.0%}", plan["hbm_bytes_per_chip"] / GIB


def step_row(name: str, step: Step) -> Found:
    overrides = ["--config.batch_size=128", *step.overrides]
    milliseconds, mfu, peak = compiled(f"{name} on {CHIP}", step.recipe, CHIP, 1, overrides)
    return Found(milliseconds, step.bound, step.xla, mfu, peak)


def planned_row(row: Planned) -> Found:
    recipe, machine, slices, overrides = plans.cases()[row.recipe]
    milliseconds, mfu, peak = compiled(row.recipe, recipe, machine, slices, overrides)
    without = [*overrides, "--config.model.attention=xla"]
    xla, _, xla_peak = compiled(f"{row.recipe} with XLA's attention", recipe, machine, slices, without)
    return Found(milliseconds, row.share and row.share * xla, xla, mfu, peak, xla_peak)


def layer_row(name: str, layer: Layer) -> Found:
    machines = tpu(CHIP)
    variables = os.environ | compiling.environment(machines)
    program = _child(name, "program", variables)
    with tempfile.TemporaryDirectory() as profile:
        each = _child(name, "kernels", variables | {"LIBTPU_INIT_ARGS": f"{compiling.PROFILE}={profile}"})
    cycles = sum(s.cycles for s in with_kernels([Share(*share) for share in program], each) if s.kind != PRODUCTS)
    return Found(1e3 * cycles / clock(machines.chip), layer.bound, layer.xla)


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
        return TPUAttention(vmem=tpu(CHIP).chip.vmem // 2)(*parts).reshape(x.shape) @ out

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
    print(f"bfloat16, jax {jax.__version__}, libtpu {compiling.version()}. Estimated, not run.\n")
    print("| | XLA's attention, ms | its peak memory | now, ms | MFU | peak memory | bound, ms | |")
    print("|---|---|---|---|---|---|---|---|")
    missed = []
    for name, row in plans.selected(ROWS, given.only).items():
        if isinstance(row, Planned):
            found = planned_row(row)
        else:
            found = step_row(name, row) if isinstance(row, Step) else layer_row(name, row)
        missed += [name] if found.verdict != "met" else []
        cells = (
            *(name, f"{found.xla:,.6g}", gibibytes(found.xla_peak), f"{found.milliseconds:,.4g}", found.mfu),
            *(gibibytes(found.peak), "" if found.bound is None else f"{found.bound:,.5g}", found.verdict),
        )
        print("| " + " | ".join(cells) + " |", flush=True)
    if missed:
        raise SystemExit(f"bounds missed: {', '.join(missed)}")


def gibibytes(size: float | None) -> str:
    return "" if size is None else f"{size:.2f} GiB"


if __name__ == "__main__":
    main()
