"""Accelerator types of Cloud TPU: the hosts and devices of a slice, and the runtime version it needs.

A small copy of ``clip_jax/devices/hardware.py``, so that a laptop can launch runs without installing anything; a test
compares the two.
"""

import difflib
from typing import NamedTuple


class LaunchError(Exception):
    """Ends a command with one line: what is wrong, where, and what to do."""


class Generation(NamedTuple):
    """A TPU version. ``sizes`` are the numbers that may follow its prefix."""

    version: str
    """The runtime version (cloud.google.com/tpu/docs/runtimes)."""
    sizes: tuple[int, ...]
    cores_per_chip: int
    """Units of the size per chip: cores (two per chip) up to v4 and for v5p, chips for v5e and v6e."""
    devices_per_chip: int
    one_host_up_to: int
    """The most chips in one virtual machine; larger slices have four chips per machine."""


_LITE = (1, 4, 8, 16, 32, 64, 128, 256)
_CUBES = (8, 16, 32, 64, 128, 256, 512, 1024, 2048, 4096)

GENERATIONS = {
    "v2": Generation("tpu-ubuntu2204-base", (8, 32, 128, 256, 512), 2, 2, 4),
    "v3": Generation("tpu-ubuntu2204-base", (8, 32, 128, 256, 512, 1024, 2048), 2, 2, 4),
    "v4": Generation("tpu-ubuntu2204-base", _CUBES, 2, 1, 4),
    "v5litepod": Generation("v2-alpha-tpuv5-lite", _LITE, 1, 1, 8),
    "v5p": Generation("v2-alpha-tpuv5", (*_CUBES, 8192, 12288), 2, 1, 4),
    "v6e": Generation("v2-alpha-tpuv6e", _LITE, 1, 1, 8),
}


class Accelerator(NamedTuple):
    name: str
    version: str
    hosts: int
    devices: int


def names() -> list[str]:
    return [f"{prefix}-{size}" for prefix, generation in GENERATIONS.items() for size in generation.sizes]


def accelerator(name: str) -> Accelerator:
    """Looks up an accelerator type such as ``v5litepod-16``. Raises LaunchError with the nearest type if unknown."""
    if name not in names():
        close = difflib.get_close_matches(name.replace("v5e-", "v5litepod-"), names(), n=1, cutoff=0.5)
        raise LaunchError(
            f"--accelerator={name} is not an accelerator type of Cloud TPU"
            + (f" (nearest: {close[0]})" if close else f"; choose {', '.join(GENERATIONS)} with a size, as in v6e-8")
        )
    prefix, size = name.split("-")
    generation = GENERATIONS[prefix]
    chips = int(size) // generation.cores_per_chip
    hosts = 1 if chips <= generation.one_host_up_to else chips // 4
    return Accelerator(name, generation.version, hosts, chips * generation.devices_per_chip)
