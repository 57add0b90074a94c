"""The TPU compiler's own estimate of a program's time, read from its optimized HLO.

The compiler schedules every fusion, product, copy and Pallas kernel and writes the cycles that it expects into
``backend_config``. An estimate, not a measurement: nothing was run. It leaves out transfers between devices, which
``collectives`` counts, transfers to the host, the input pipeline, and stalls that depend on data.
"""

import re

from clip_jax.devices.hardware import Chip
from clip_jax.planning.program import executed, parse

KERNEL = 'custom_call_target="tpu_custom_call"'
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


def estimated_cycles(hlo: str) -> int | None:
    """Cycles of one execution of a compiled program on one core; loops count by their trip counts.

    None if the program has a Pallas kernel without an estimate, or no estimate at all: libtpu estimates kernels only if
    it was started with ``--xla_jf_dump_static_llo_profile_to``.
    """
    computations, entry = parse(hlo)
    total = None
    for instruction, _, times, fused in executed(computations, entry):
        if fused:  # counted with its fusion
            continue
        # A line may repeat the figure for its parts; the largest is that of the whole.
        if found := [int(n) for n in _CYCLES.findall(instruction.rest)]:
            total = (total or 0) + max(found) * times
        elif instruction.opcode == "custom-call" and KERNEL in instruction.rest:
            return None
    return total
