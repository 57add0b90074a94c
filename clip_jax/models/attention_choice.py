"""Selects the implementation of attention: ``config.model.attention``, where ``auto`` depends on the platform."""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.sharding import AbstractMesh, Mesh

from clip_jax.devices.sharding import platform_of
from clip_jax.errors import UserError
from clip_jax.models.attention import Attend, cudnn, xla
from clip_jax.models.attention_tpu import TPUAttention
from clip_jax.models.clip import Architecture

AUTO = {"gpu": "cudnn"}
"""The kernel that ``auto`` selects, by platform. Not the TPU kernel, because XLA still copies arrays around it."""
LARGEST_HEAD = {"cudnn": 128, "tpu": 256}
"""The largest head, in features: cuDNN's limit before Hopper; two columns of lanes on a TPU."""


class Choice(NamedTuple):
    """An implementation of attention and why it was selected."""

    name: str
    reason: str

    def attend(self, mesh: Mesh | AbstractMesh | None) -> Attend:
        return {"xla": xla, "cudnn": cudnn, "tpu": TPUAttention(mesh)}[self.name]


def choose_attention(
    setting: str, dtype: jnp.dtype, architecture: Architecture, mesh: Mesh | AbstractMesh | None
) -> Choice:
    """The implementation for a setting; ``auto`` selects the fused kernel of the mesh's platform if it can be used.

    Raises UserError if the setting is ``tpu`` and the TPU kernel cannot compute the model.
    """
    if setting == "tpu":
        _check_heads(architecture, 1 if mesh is None else mesh.shape["tensor"])
    if setting != "auto":
        return Choice(setting, "as set")
    platform = jax.default_backend() if mesh is None else platform_of(mesh)
    kernel = AUTO.get(platform)
    if kernel is None:
        return Choice("xla", f"auto, on {platform or 'an unknown platform'}")
    dims = {tower.width // tower.heads for tower in architecture.transformers}
    reason = None
    if dtype != jnp.bfloat16:
        reason = "cudnn needs model.dtype=bfloat16"
    elif max(dims, default=0) > LARGEST_HEAD[kernel]:
        reason = f"heads of {max(dims)} features are too large for {kernel}"
    elif any(dim % 8 for dim in dims):
        reason = "cudnn needs heads of a multiple of 8 features"
    return Choice(kernel, f"auto, on {platform}") if reason is None else Choice("xla", f"auto, {reason}")


def _check_heads(architecture: Architecture, tensor: int) -> None:
    for tower in architecture.transformers:
        if tower.heads % tensor:
            raise UserError(f"config.model.attention=tpu: mesh.tensor={tensor} does not divide {tower.heads} heads")
        if tower.width // tower.heads > LARGEST_HEAD["tpu"]:
            raise UserError(
                f"config.model.attention=tpu takes heads of at most {LARGEST_HEAD['tpu']} features, "
                f"not {tower.width // tower.heads}: set model.attention=xla"
            )
