"""How a model is computed, as opposed to what it computes: types, loops, rematerialization, attention, mesh."""

from typing import Literal, NamedTuple

import jax
import jax.numpy as jnp
from jax.sharding import AbstractMesh, Mesh

from clip_jax.models.attention import Attend, xla

Remat = Literal["none", "dots", "named", "offload", "full"]

SAVED = ("qkv", "mixed")
"""What ``named`` and ``offload`` save per block: with queries, keys, values and the output of the attention, no weight
product of the attention runs twice except the last; the larger activations of the MLP are recomputed."""

KERNEL_SAVED = ("kernel_qkv", "kernel_mixed")
"""The same arrays where one kernel computes the attention. ``dots`` saves these too: a kernel is no product to JAX, and
its backward pass needs queries, keys and values with their biases."""

_NAMES = (*SAVED, *KERNEL_SAVED)
REMAT_POLICIES = {
    "dots": jax.checkpoint_policies.save_from_both_policies(
        jax.checkpoint_policies.dots_with_no_batch_dims_saveable,
        jax.checkpoint_policies.save_only_these_names(*KERNEL_SAVED),
    ),
    "named": jax.checkpoint_policies.save_only_these_names(*_NAMES),
    "offload": jax.checkpoint_policies.save_and_offload_only_these_names(
        names_which_can_be_saved=(),
        names_which_can_be_offloaded=_NAMES,
        offload_src="device",
        offload_dst="pinned_host",
    ),
    "full": None,
}


class Compute(NamedTuple):
    """How a model is computed. A restart may change every field but ``dtype``: the numbers stay, up to rounding."""

    dtype: jnp.dtype = jnp.float32
    """Matrix products, and sums of norms on TPUs; parameters, norms, softmax and embeddings are float32."""
    scan: bool = True
    """Loop over the blocks, so that one block is compiled whatever the depth; False unrolls them."""
    remat: Remat = "none"
    attend: Attend = xla
    """One of ``models.attention``'s functions, or ``models.attention_tpu.TPUAttention``."""
    mesh: Mesh | AbstractMesh | None = None
    """The mesh over which activations are split; None leaves them to the partitioner."""
    cache: int = 0
    """Tokens whose keys and values are kept while a text is generated one token at a time; 0: no cache."""


DEFAULT = Compute()
"""A computation in float32 on one device."""
