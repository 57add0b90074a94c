"""The TPU compiler's own estimate of a program's time, read from its optimized HLO.

The compiler schedules every fusion, product, copy and Pallas kernel and writes the cycles that it expects into
``backend_config``. An estimate, not a measurement: nothing was run. It leaves out transfers between devices, which
``collectives`` counts, transfers to the host, the input pipeline, and stalls that depend on data.
"""

import dataclasses
import functools
import re
from collections import Counter
from collections.abc import Iterator
from typing import NamedTuple

import jax
from jax.core import ShapedArray
from jax.experimental.layout import Format, Layout
from jax.extend.core import ClosedJaxpr, Jaxpr, JaxprEqn, Var
from jax.sharding import SingleDeviceSharding

from clip_jax.devices.hardware import Chip
from clip_jax.planning.profile import Share, merge, share, without_scores
from clip_jax.planning.program import executed, is_program, parse

KERNEL = 'custom_call_target="tpu_custom_call"'
_SHAPE = re.compile(r"\b[a-z]+\d+\[[\d,]*\]")
_TYPES = {"float32": "f32", "bfloat16": "bf16", "int32": "s32"}
_CYCLES = re.compile(r'"estimated_cycles":"(\d+)"')

# Multiply-adds per cycle of one core, by generation: matrix units x rows x columns. v2 to v4: Jouppi et al. 2023,
# "TPU v4"; v5e, v5p, v6e, 7x: cloud.google.com/tpu/docs. With the peak FLOP/s they give the clock.
MATRIX_UNITS = {
    "v2": (1, 128), "v3": (2, 128), "v4": (4, 128), "v5e": (4, 128), "v5p": (4, 128), "v6e": (4, 256), "7x": (4, 256),
}  # fmt: skip
CORES = {"v2": 2, "v3": 2, "v4": 2, "v5e": 1, "v5p": 2, "v6e": 1, "7x": 2}


def clock(chip: Chip) -> float:
    """Cycles per second of a core, from the chip's peak: 1.5e9 for a v5e."""
    units, side = MATRIX_UNITS[chip.name]
    return chip.flops / (CORES[chip.name] * units * side**2 * 2)


class Estimate(NamedTuple):
    """The cycles of one execution of a program on one core, loops by their trip counts."""

    cycles: int
    """Cycles without the Pallas kernels, which the compiler does not estimate as part of a program."""
    kernels: dict[str, int]
    """Executions of each Pallas kernel by shapes: ``bf16[8,256,768] bf16[8,256,768] -> bf16[8,256,768]``."""
    profile: tuple[Share, ...] = ()
    """The same by part of the model and kind of work."""


def estimate(hlo: str) -> Estimate:
    """Reads the optimized HLO of a TPU program."""
    computations, entry = parse(hlo)
    cycles, kernels, shares = 0, Counter(), []
    for instruction, computation, times, fused in executed(computations, entry):
        if fused:  # counted with its fusion
            continue
        # A line may repeat the figure for its parts; the largest is that of the whole.
        if found := [int(n) for n in _CYCLES.findall(instruction.rest)]:
            cycles += max(found) * times
            shares.append(share(instruction, computation, computations, times, max(found), ""))
        elif instruction.opcode == "custom-call" and KERNEL in instruction.rest:
            operands = [computations[computation][name].shape for name in instruction.operands]
            shapes = _signature(" ".join(operands), instruction.shape)
            kernels[shapes] += times
            shares.append(share(instruction, computation, computations, times, 0, shapes))
    return Estimate(cycles, dict(kernels), merge(without_scores(shares)))


def kernel_cycles(program: ClosedJaxpr, device: jax.Device) -> dict[str, int]:
    """{shapes: cycles} of the Pallas kernels of a program, each compiled alone for a device.

    Needs a libtpu that was started with ``--xla_jf_dump_static_llo_profile_to``: it then estimates kernels, but ends
    the process at some of XLA's own fusions, so that whole programs cannot be compiled with it. Of kernels with equal
    shapes the slowest counts.
    """
    found: dict[str, int] = {}
    for shapes, call in {(signature(call), str(call.params["jaxpr"])): call for call in pallas_calls(program)}.items():
        found[shapes[0]] = max(_cycles_of(call, device), found.get(shapes[0], 0))
    return found


def _cycles_of(call: JaxprEqn, device: jax.Device, compiled: int = 128) -> int:
    """The cycles of one execution. Along the first axis of the grid they grow by as many for each program.

    The compiler schedules programs one by one: 2,048 took 50 seconds and 10 GB, for a figure that two short grids give
    to a thousandth. ``compiled``: programs of the longer one.
    """
    programs = call.params["grid_mapping"].grid[0]
    if programs <= compiled:
        return _cycles_alone(call, device)
    half, whole = (_cycles_alone(_shortened(call, n), device) for n in (compiled // 2, compiled))
    return whole + (whole - half) * (programs - compiled) // (compiled - compiled // 2)


def _shortened(call: JaxprEqn, programs: int) -> JaxprEqn:
    """The same kernel for the first rows of its operands, as many as this number of programs takes."""
    mapping = call.params["grid_mapping"]
    rows = call.invars[0].aval.shape[0] * programs // mapping.grid[0]

    def first(aval: ShapedArray) -> ShapedArray:
        return aval if aval.shape[0] == 1 else aval.update(shape=(rows, *aval.shape[1:]))  # a mask that all share

    blocks = (dataclasses.replace(block, array_aval=first(block.array_aval)) for block in mapping.block_mappings)
    shorter = dataclasses.replace(mapping, grid=(programs, *mapping.grid[1:]), block_mappings=tuple(blocks))
    params = call.params | {"grid_mapping": shorter, "out_avals": tuple(map(first, call.params["out_avals"]))}
    invars, outvars = (
        [Var(first(variable.aval)) for variable in variables] for variables in (call.invars, call.outvars)
    )
    return call.replace(params=params, invars=invars, outvars=outvars)


def _cycles_alone(call: JaxprEqn, device: jax.Device) -> int:
    """The same, compiled. The layouts are the kernel's own: with the flag, a large copy takes minutes."""

    def row_major(variables) -> list[Format]:
        return [Format(Layout(tuple(range(v.aval.ndim))), SingleDeviceSharding(device)) for v in variables]

    run = functools.partial(call.primitive.bind, **call.params)
    run = jax.jit(run, in_shardings=row_major(call.invars), out_shardings=row_major(call.outvars))
    arguments = [jax.ShapeDtypeStruct(v.aval.shape, v.aval.dtype) for v in call.invars]
    kernel = re.search(rf"^.*{KERNEL}.*$", run.lower(*arguments).compile().as_text(), re.MULTILINE)
    return max(int(n) for n in _CYCLES.findall(kernel[0]))


def signature(call: JaxprEqn) -> str:
    """The shapes of a ``pallas_call`` as in ``Estimate.kernels``."""
    operands, results = (
        " ".join(f"{_TYPES[v.aval.dtype.name]}[{','.join(map(str, v.aval.shape))}]" for v in variables)
        for variables in (call.invars, call.outvars)
    )
    return _signature(operands, results)


def pallas_calls(program: ClosedJaxpr | Jaxpr) -> Iterator[JaxprEqn]:
    for equation in getattr(program, "jaxpr", program).eqns:
        if equation.primitive.name == "pallas_call":
            yield equation
        else:
            for inner in filter(is_program, jax.tree.leaves(equation.params, is_leaf=is_program)):
                yield from pallas_calls(inner)


def _signature(operands: str, results: str) -> str:
    return " -> ".join(" ".join(_SHAPE.findall(shapes)) for shapes in (operands, results))
