"""Chips and slices: memory, peak FLOP/s, bandwidths, names, topologies. A table of facts; nothing here uses a device.

All figures are per chip, in bytes and seconds; link bandwidths are one-way. A JAX device is a chip, except on v2, v3
and 7x, where it is half of one. Sources: cloud.google.com/tpu/docs (the page of each version; links of v2 and v3:
Norrie et al. 2021, "The Design Process for Google's Training Chips"), NVIDIA's data sheets (dense, without sparsity),
and for ``free_hbm`` the TPU compiler (libtpu 0.0.42), which reports the available memory when a program does not fit.
"""

import math
import re
from dataclasses import dataclass, field
from typing import NamedTuple

from clip_jax.errors import UserError, nearest

MIB, GIB = 2**20, 2**30
SINGLE_HOST_CHIPS = 8
"""v5e and v6e slices of up to this many chips are one virtual machine; larger slices have four chips per machine."""


@dataclass(frozen=True)
class Chip:
    """The figures of one chip."""

    name: str
    device_kinds: tuple[str, ...]
    """Possible values of ``jax.Device.device_kind``."""
    flops: float
    """Dense bfloat16 FLOP/s."""
    hbm: int
    free_hbm: int
    """What a program can use: the runtime reserves the rest."""
    hbm_bandwidth: float
    link_bandwidth: float
    """One way, of one ICI link; for a GPU, of all of its NVLink. 0: none."""
    network_bandwidth: float | None
    """Between slices (DCN), or between GPU hosts; None: slices cannot be joined."""
    chips_per_host: int
    devices_per_chip: int = 1
    vmem: int = 16 * MIB
    """Fast memory of a core (VMEM), of a TPU."""
    prefixes: tuple[str, ...] = ()
    """Prefixes of accelerator types, as in v5litepod-256 and v5e-256; Cloud TPU's own comes first."""
    units_per_chip: int = 1
    """Units per chip that the number in an accelerator type counts: v4-512 has 512 cores and 256 chips."""
    single_host_chips: int = 0
    """The size of the largest slice that is one host; 0: ``chips_per_host`` always applies."""
    runtime_version: str | None = None
    """Runtime version of a Cloud TPU virtual machine; None if the Cloud TPU API does not offer the chip."""
    topologies: dict[int, tuple[int, ...]] = field(default_factory=dict, hash=False)
    """Number of chips -> shape of the slice."""

    @property
    def is_tpu(self) -> bool:
        return bool(self.topologies)

    @property
    def free_hbm_per_device(self) -> int:
        return self.free_hbm // self.devices_per_chip


def _shapes(*shapes: tuple[int, ...]) -> dict[int, tuple[int, ...]]:
    return {math.prod(shape): shape for shape in shapes}


_LITE = _shapes((1, 1), (2, 2), (2, 4), (4, 4), (4, 8), (8, 8), (8, 16), (16, 16))
_CUBES = _shapes(
    *((2, 2, 1), (2, 2, 2), (2, 2, 4), (2, 4, 4), (4, 4, 4), (4, 4, 8), (4, 8, 8)),
    *((8, 8, 8), (8, 8, 16), (8, 16, 16)),
)

TPUS = (
    Chip(
        "v2",
        ("TPU v2",),
        flops=45e12,
        hbm=16 * GIB,
        free_hbm=int(2 * 7.48 * GIB),
        hbm_bandwidth=700e9,
        link_bandwidth=62e9,
        network_bandwidth=None,
        chips_per_host=4,
        devices_per_chip=2,
        prefixes=("v2",),
        units_per_chip=2,
        runtime_version="tpu-ubuntu2204-base",
        topologies=_shapes((2, 2), (4, 4), (8, 8), (8, 16), (16, 16)),
    ),
    Chip(
        "v3",
        ("TPU v3",),
        flops=123e12,
        hbm=32 * GIB,
        free_hbm=int(2 * 15.48 * GIB),
        hbm_bandwidth=900e9,
        link_bandwidth=82e9,
        network_bandwidth=None,
        chips_per_host=4,
        devices_per_chip=2,
        prefixes=("v3",),
        units_per_chip=2,
        runtime_version="tpu-ubuntu2204-base",
        topologies=_shapes((2, 2), (4, 4), (8, 8), (8, 16), (16, 16), (16, 32), (32, 32)),
    ),
    Chip(
        "v4",
        ("TPU v4",),
        flops=275e12,
        hbm=32 * GIB,
        free_hbm=int(30.75 * GIB),
        hbm_bandwidth=1200e9,
        link_bandwidth=45e9,
        network_bandwidth=6.25e9,
        chips_per_host=4,
        prefixes=("v4",),
        units_per_chip=2,
        runtime_version="tpu-ubuntu2204-base",
        topologies=_CUBES,
    ),
    Chip(
        "v5e",
        ("TPU v5 lite", "TPU v5e"),
        flops=197e12,
        hbm=16 * GIB,
        free_hbm=int(15.75 * GIB),
        hbm_bandwidth=819e9,
        link_bandwidth=50e9,
        network_bandwidth=3.125e9,  # a host of eight has two cards of 100 Gbit/s
        chips_per_host=4,
        vmem=128 * MIB,
        prefixes=("v5litepod", "v5e"),
        single_host_chips=SINGLE_HOST_CHIPS,
        runtime_version="v2-alpha-tpuv5-lite",
        topologies=_LITE,
    ),
    Chip(
        "v5p",
        ("TPU v5", "TPU v5p"),
        flops=459e12,
        hbm=96 * GIB,
        free_hbm=int(95.74 * GIB),
        hbm_bandwidth=2765e9,
        link_bandwidth=100e9,
        network_bandwidth=6.25e9,
        chips_per_host=4,
        vmem=64 * MIB,
        prefixes=("v5p",),
        units_per_chip=2,
        runtime_version="v2-alpha-tpuv5",
        topologies=_CUBES | _shapes((16, 16, 16), (16, 16, 24)),
    ),
    Chip(
        "v6e",
        ("TPU v6 lite", "TPU v6e"),
        flops=918e12,
        hbm=32 * GIB,
        free_hbm=int(31.25 * GIB),
        hbm_bandwidth=1638e9,
        link_bandwidth=100e9,
        network_bandwidth=12.5e9,  # a host of eight has four cards of 200 Gbit/s
        chips_per_host=4,
        vmem=128 * MIB,
        prefixes=("v6e",),
        single_host_chips=SINGLE_HOST_CHIPS,
        runtime_version="v2-alpha-tpuv6e",
        topologies=_LITE,
    ),
    Chip(
        "7x",
        ("TPU7x",),
        flops=2307e12,
        hbm=192 * GIB,
        free_hbm=int(2 * 94.75 * GIB),
        hbm_bandwidth=7380e9,
        link_bandwidth=100e9,
        network_bandwidth=12.5e9,
        chips_per_host=4,
        devices_per_chip=2,
        vmem=64 * MIB,
        prefixes=("tpu7x", "v7x", "7x"),
        units_per_chip=2,
        topologies=_CUBES | _shapes((1, 1, 1), (16, 16, 16)),
    ),
)


def _gpu(name: str, kinds: tuple[str, ...], tflops: float, gib: float, hbm: float, link: float, network: float) -> Chip:
    # CUDA and its libraries take about one GiB.
    return Chip(
        name,
        kinds,
        flops=tflops * 1e12,
        hbm=int(gib * GIB),
        free_hbm=int((gib - 1) * GIB),
        hbm_bandwidth=hbm * 1e9,
        link_bandwidth=link * 1e9,
        network_bandwidth=network * 1e9,
        chips_per_host=8,
    )


# Memory as the driver reports it, which can be less than the name says: ECC takes a sixteenth on an L4 and L40S.
# Network of a typical host: a card of 200 Gbit/s per A100, of 400 per later GPU; of 25 per L4 and L40S.
GPUS = (
    _gpu("a100-40gb", ("NVIDIA A100-SXM4-40GB", "NVIDIA A100-PCIE-40GB"), 312, 40, 1555, 300, 25),
    _gpu("a100", ("NVIDIA A100-SXM4-80GB", "NVIDIA A100 80GB PCIe"), 312, 80, 2039, 300, 25),
    _gpu("h100", ("NVIDIA H100 80GB HBM3",), 989, 80, 3350, 450, 50),
    _gpu("h100-pcie", ("NVIDIA H100 PCIe",), 756, 80, 2000, 300, 25),
    _gpu("h200", ("NVIDIA H200",), 989, 140, 4800, 450, 50),
    _gpu("b200", ("NVIDIA B200",), 2250, 179, 7700, 900, 50),
    _gpu("l4", ("NVIDIA L4",), 121, 22.5, 300, 32, 3.125),
    _gpu("l40s", ("NVIDIA L40S",), 362, 45, 864, 32, 3.125),
)
_KINDS = {kind: chip for chip in (*TPUS, *GPUS) for kind in chip.device_kinds}


def chip_of(device_kind: str) -> Chip | None:
    """The chip of a JAX device, or None if the table has no entry (a CPU, a new chip)."""
    return _KINDS.get(device_kind)


def peak_flops(device_kind: str) -> float | None:
    """Dense bfloat16 FLOP/s of one JAX device, or None if the table has no entry (a CPU, a new chip)."""
    chip = _KINDS.get(device_kind)
    return None if chip is None else chip.flops / chip.devices_per_chip


class Machines(NamedTuple):
    """The chips of a run: ``slices`` slices of the same ``topology``; for GPUs, a slice is a host."""

    chip: Chip
    topology: tuple[int, ...]
    slices: int = 1

    @property
    def chips_per_slice(self) -> int:
        return math.prod(self.topology)

    @property
    def chips(self) -> int:
        return self.slices * self.chips_per_slice

    @property
    def devices(self) -> int:
        """What ``len(jax.devices())`` would return."""
        return self.chips * self.chip.devices_per_chip

    @property
    def hosts(self) -> int:
        """Virtual machines, and therefore processes, of all slices."""
        if self.chips_per_slice <= self.chip.single_host_chips:
            return self.slices
        return self.slices * -(-self.chips_per_slice // self.chip.chips_per_host)

    @property
    def links(self) -> int:
        """ICI links of a chip inside the slice: two along each axis, or one if the axis has only two chips.

        1 for a GPU, because ``link_bandwidth`` covers all of its links.
        """
        if not self.chip.is_tpu:
            return min(1, self.chips_per_slice - 1)
        return sum(min(2, size - 1) for size in self.topology)

    @property
    def accelerator_type(self) -> str:
        """Cloud TPU's name for one slice: v5litepod-256, v4-512."""
        return f"{self.chip.prefixes[0]}-{self.chips_per_slice * self.chip.units_per_chip}"

    @property
    def name(self) -> str:
        """The common name: v5e-256, 2 x v5e-256, h100:8."""
        if not self.chip.is_tpu:
            return f"{self.chip.name}:{self.chips}"
        one = self.accelerator_type.replace("v5litepod", "v5e")
        return one if self.slices == 1 else f"{self.slices} x {one}"


def tpu(name: str, slices: int = 1) -> Machines:
    """The slices named by an accelerator type (``v5e-256``, ``v4-512``) or a shape (``v5p:4x4x4``).

    Raises UserError, with the nearest known name, for any other name.
    """
    text = name.strip().lower()
    match = re.fullmatch(r"([a-z0-9]+)(?:-(\d+)|:(\d+(?:x\d+)+))", text)
    chip = next((c for c in TPUS if match and match[1] in c.prefixes), None)
    if chip is None:
        raise UserError(f"{name}: no such TPU slice{nearest(text, tpu_names())}; examples: v5e-256, v4-512, v5p:4x4x4")
    if match[2]:
        chips = int(match[2]) / chip.units_per_chip
        if chips not in chip.topologies:
            closest = min(chip.topologies, key=lambda c: abs(math.log(c / max(chips, 0.5))))
            counted = " (the number counts cores, two per chip)" if chip.units_per_chip > 1 else ""
            raise UserError(
                f"{name}: {chip.name} has no slice of that size{counted}; "
                f"the nearest is {match[1]}-{closest * chip.units_per_chip}"
            )
        topology = chip.topologies[int(chips)]
    else:
        topology = tuple(int(size) for size in match[3].split("x"))
        if tuple(sorted(topology)) not in {tuple(sorted(t)) for t in chip.topologies.values()}:
            known = ", ".join("x".join(map(str, t)) for t in chip.topologies.values())
            raise UserError(f"{name}: {chip.name} has no slice of that shape; it has {known}")
    if slices < 1:
        raise UserError(f"--slices={slices} must be at least 1")
    if slices > 1 and chip.network_bandwidth is None:
        raise UserError(f"{name}: {chip.name} slices cannot be joined in one run; remove --slices")
    return Machines(chip, topology, slices)


def gpu(name: str) -> Machines:
    """The GPUs named by ``h100:8``; ``h100`` is one. Raises UserError, with the nearest known name, for any other."""
    kind, _, count = name.strip().lower().partition(":")
    known = {chip.name: chip for chip in GPUS}
    if kind not in known:
        raise UserError(f"{name}: no such GPU{nearest(kind, known)}; known are {', '.join(known)}")
    if count and (not count.isdigit() or int(count) < 1):
        raise UserError(f"{name}: the number of GPUs must be positive; example: {kind}:8")
    chip, number = known[kind], int(count or 1)
    hosts = max(1, number // chip.chips_per_host)
    if number % hosts or number // hosts > chip.chips_per_host:
        raise UserError(f"{name}: several hosts must have {chip.chips_per_host} GPUs each; example: {kind}:{8 * hosts}")
    return Machines(chip, (number // hosts,), hosts)


def tpu_names() -> list[str]:
    """All accelerator types, with every prefix."""
    return [f"{p}-{n * c.units_per_chip}" for c in TPUS for p in c.prefixes for n in sorted(c.topologies)]
