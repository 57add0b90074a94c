"""Measures a training step and its parts on the devices at hand, beside what the plan estimates for them.

The first user with a TPU can tell with it how far the compiler's estimate is from the truth. On a CPU only the measured
half exists.
"""

import functools
import statistics
import time
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from ml_collections import ConfigDict

from clip_jax.devices import hardware
from clip_jax.devices.hardware import Machines
from clip_jax.devices.sharding import make_mesh, to_devices
from clip_jax.errors import UserError
from clip_jax.planning import compiling
from clip_jax.planning.compiling import Compiled
from clip_jax.planning.cycles import clock, pallas_calls, signature
from clip_jax.training.setup import check_attention, make_learner

REPEATS = 5
PRODUCT = {"cpu": 512}, 8192
"""Sides of the square matrices: by platform, and of all others."""
COPY = {"cpu": 2**24}, 2**28
"""Elements of the array that is read and written."""
STEPS = 100_000
"""A placeholder for the length of the run, which changes no shape."""


class Measurement(NamedTuple):
    """A part of the step; seconds of one execution."""

    name: str
    measured: float
    estimated: float | None
    source: str
    """Where the estimate comes from, or why there is none."""


def machines_here() -> Machines | None:
    """The devices at hand as the plan knows them; None for a CPU, a GPU, or a slice that is not in the table."""
    devices = jax.devices()
    chip = hardware.chip_of(devices[0].device_kind)
    if chip is None or not chip.is_tpu:
        return None
    units = len(devices) // chip.devices_per_chip * chip.units_per_chip
    try:
        return hardware.tpu(f"{chip.prefixes[0]}-{units}")
    except UserError:
        return None


def examine(config: ConfigDict) -> list[Measurement]:
    """Measures the rates of one device, the Pallas kernels of the step, and the step itself."""
    check_attention(config, jax.default_backend())
    machines = machines_here()
    mesh = make_mesh(config.mesh.data, config.mesh.fsdp, config.mesh.tensor, config.mesh.slices)
    learner = make_learner(config, mesh, steps=STEPS, examples=STEPS)
    compiled, why = None, "no estimate: this is no TPU that the plan knows"
    if machines is not None and not compiling.is_installed():
        why = f"no estimate: {compiling.INSTALL}"
    elif machines is not None:
        compiled, why = compiling.compile_step(config, machines), "the TPU compiler"
    found = rates(machines)
    step, arguments = learner.step(), _arguments(config, learner, mesh)
    found += kernels(jax.make_jaxpr(step)(*arguments), compiled, machines, why)
    ran = step.lower(*arguments).compile()
    state, *rest = arguments

    def run() -> Any:
        nonlocal state
        state, metrics = ran(state, *rest)
        return metrics

    cycles = None if compiled is None else compiled.cycles
    seconds = None if cycles is None else cycles / clock(machines.chip)
    return [*found, Measurement(f"training step, {config.batch_size:,} pairs", timed(run), seconds, why)]


def rates(machines: Machines | None) -> list[Measurement]:
    """A large matrix product and a large copy on one device, beside the chip table."""
    platform = jax.default_backend()
    side, elements = (sizes.get(platform, other) for sizes, other in (PRODUCT, COPY))
    left = jnp.ones((side, side), jnp.bfloat16)
    array = jnp.ones((elements,), jnp.bfloat16)
    product, copy = jax.jit(lambda x: x @ x), jax.jit(lambda x: x + 1)
    flops = bandwidth = None
    if machines is not None:
        chip = machines.chip
        flops, bandwidth = chip.flops / chip.devices_per_chip, chip.hbm_bandwidth / chip.devices_per_chip
    source = "the chip table" if machines is not None else "no estimate: this is no TPU that the plan knows"
    return [
        Measurement(
            f"product of {side:,} x {side:,} in bfloat16",
            timed(lambda: product(left)),
            flops and 2 * side**3 / flops,
            source,
        ),
        Measurement(
            f"read and write {2 * elements / 1e6:,.0f} MB",
            timed(lambda: copy(array)),
            bandwidth and 4 * elements / bandwidth,
            source,
        ),
    ]


def kernels(program: Any, compiled: Compiled | None, machines: Machines | None, why: str) -> list[Measurement]:
    """Each Pallas kernel of a step, alone on one device with random numbers."""
    found = []
    for shapes, call in {signature(call): call for call in pallas_calls(program)}.items():
        rng = np.random.default_rng(0)
        inputs = [jnp.asarray(rng.normal(size=v.aval.shape), v.aval.dtype) for v in call.invars]
        run = jax.jit(functools.partial(call.primitive.bind, **call.params))
        cycles = None if compiled is None else (compiled.kernels or {}).get(shapes)
        seconds = None if cycles is None else cycles / clock(machines.chip)
        found.append(Measurement(f"kernel {shapes}", timed(functools.partial(run, *inputs)), seconds, why))
    return found


def timed(run: Callable[[], Any]) -> float:
    """The median of a few executions in seconds, after one that compiles."""
    jax.block_until_ready(run())
    found = []
    for _ in range(REPEATS):
        start = time.perf_counter()
        jax.block_until_ready(run())
        found.append(time.perf_counter() - start)
    return statistics.median(found)


def _arguments(config: ConfigDict, learner: Any, mesh: Any) -> tuple[Any, Any, Any]:
    vocabulary, rng = learner.model.architecture.text.vocab_size, np.random.default_rng(0)
    batch = {
        name: rng.integers(1, vocabulary if name == "text" else 256, array.shape).astype(array.dtype)
        for name, array in learner.batch_spec(config.batch_size).items()
    }
    return learner.create_state(), to_devices(batch, mesh, config.batch_size), learner.load_constants()
