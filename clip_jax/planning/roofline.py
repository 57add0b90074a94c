"""A lower bound on the time of a step: its work divided by the peak rates of the hardware."""

from typing import NamedTuple

from clip_jax.devices.hardware import Machines
from clip_jax.planning.work import Work


class Roofline(NamedTuple):
    """Seconds that a step needs of each resource, used at its peak rate."""

    compute: float
    hbm: float
    ici: float
    dcn: float

    @property
    def bound(self) -> str:
        """The resource that limits a step in which all resources overlap."""
        return max(self._fields, key=lambda name: getattr(self, name))

    @property
    def overlapped(self) -> float:
        """Seconds of a step in which all resources overlap perfectly: no step is faster."""
        return max(self)

    @property
    def serial(self) -> float:
        """Seconds of a step in which nothing overlaps, each resource at its peak rate."""
        return sum(self)


def roofline(work: Work, machines: Machines) -> Roofline:
    """``work`` is per JAX device; the devices of a chip share its resources."""
    chip, devices = machines.chip, machines.chip.devices_per_chip
    links = machines.links * chip.link_bandwidth
    return Roofline(
        compute=work.flops * devices / chip.flops,
        hbm=work.hbm_bytes * devices / chip.hbm_bandwidth,
        ici=work.ici_bytes * devices / links if links else 0.0,
        dcn=work.dcn_bytes * devices / chip.network_bandwidth if work.dcn_bytes else 0.0,
    )
