"""How long a step must take at least: what it has to do, divided by what the hardware can do at most."""

from typing import NamedTuple

from clip_jax.hardware import Machines
from clip_jax.planning.work import Work


class Roofline(NamedTuple):
    """Seconds that a step needs for each of its resources if it used that one at its peak."""

    compute: float
    hbm: float
    ici: float
    dcn: float

    @property
    def bound(self) -> str:
        """The resource that the step waits for when all else is hidden behind it."""
        return max(self._fields, key=lambda name: getattr(self, name))

    @property
    def overlapped(self) -> float:
        """Seconds of a step that hides everything behind its slowest resource: no step is faster."""
        return max(self)

    @property
    def serial(self) -> float:
        """Seconds of a step that does one thing after the other, each at its peak."""
        return sum(self)


def roofline(work: Work, machines: Machines) -> Roofline:
    """``work`` is of one JAX device; a chip's devices share what it has."""
    chip, devices = machines.chip, machines.chip.devices_per_chip
    links = machines.links * chip.link_bandwidth
    return Roofline(
        compute=work.flops * devices / chip.flops,
        hbm=work.hbm_bytes * devices / chip.hbm_bandwidth,
        ici=work.ici_bytes * devices / links if links else 0.0,
        dcn=work.dcn_bytes * devices / chip.network_bandwidth if work.dcn_bytes else 0.0,
    )
