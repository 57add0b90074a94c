"""What an objective adds to the plan's estimate of a step, on one device."""

from collections.abc import Callable
from dataclasses import replace
from typing import Any, NamedTuple

import jax

from clip_jax.models.attention import Queries, xla
from clip_jax.models.clip import CLIP


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
    working: int = 0
    """Bytes that exist while the local term is computed, beside the activations."""
    transfers: tuple[Transfer, ...] = ()


def crossing(size: int, members: int, slices: int) -> int:
    """Bytes that each member of a group receives from other slices when ``size`` bytes are gathered or summed.

    What comes from another slice crosses once, and then travels around within the slice.
    """
    slices = min(slices, members)  # a group of fewer devices than slices has at most one in each
    return size * (slices - 1) // slices // (members // slices)


def saved_bytes(function: Callable[[Any, int], Any], params: Any, rows: int) -> int:
    """Bytes that ``function(params, rows)`` saves for its backward pass, by JAX's own differentiation.

    What does not grow with the rows is the parameters, or what is cast from them once. ``params`` has shapes only.
    """

    def residuals(rows: int) -> int:
        backward = jax.eval_shape(lambda p: jax.vjp(lambda p: function(p, rows), p)[1], params)
        return sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(backward))

    return residuals(2 * rows) - residuals(rows)


def traceable(model: CLIP) -> CLIP:
    """The same model without a mesh and without kernels or memory that this machine may lack, for ``saved_bytes``."""
    compute = model.compute._replace(mesh=None)
    if compute.remat == "offload":  # the blocks' inputs stay on the device, as with full
        compute = compute._replace(remat="full")
    return replace(model, compute=compute if compute.attend is xla else compute._replace(attend=_fused))


def _fused(query: Queries, key: Queries, value: Queries, *, causal: bool = False, mask: Any = None) -> Queries:
    """Saves no logits, as a fused kernel does not."""
    return jax.checkpoint(lambda *inputs: xla(*inputs, causal=causal, mask=mask))(query, key, value)
