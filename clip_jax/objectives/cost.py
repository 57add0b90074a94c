"""What an objective adds to the plan's estimate of a step, on one device."""

from typing import NamedTuple


class Transfer(NamedTuple):
    """Bytes received (and sent) by one device per step: within its slice (ICI) and from other slices (DCN)."""

    what: str
    ici_bytes: int
    dcn_bytes: int = 0


class Cost(NamedTuple):
    """The cost of an objective per step and device, in addition to the cost of encoding the pairs."""

    flops: int = 0
    activations: int = 0
    """Bytes saved for the backward pass of one micro-batch."""
    across: int = 0
    """Bytes that exist while the term across the batch is computed."""
    transfers: tuple[Transfer, ...] = ()


def crossing(size: int, members: int, slices: int) -> int:
    """Bytes that each member of a group receives from other slices when ``size`` bytes are gathered or summed.

    What comes from another slice crosses once, and then travels around within the slice.
    """
    slices = min(slices, members)  # a group of fewer devices than slices has at most one in each
    return size * (slices - 1) // slices // (members // slices)
