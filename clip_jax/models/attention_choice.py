"""Selects the implementation of attention: ``config.model.attention``, where ``auto`` depends on the platform."""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.sharding import AbstractMesh, Mesh

from clip_jax.devices import hardware
from clip_jax.devices.sharding import platform_of
from clip_jax.errors import UserError
from clip_jax.models.attention import Attend, cudnn, xla
from clip_jax.models.attention_tpu import VMEM, TPUAttention
from clip_jax.models.clip import Architecture

AUTO = {"gpu": "cudnn", "tpu": "tpu"}
"""The kernel that ``auto`` selects, by platform."""
LARGEST_HEAD = {"cudnn": 128, "tpu": 256}
"""The largest head, in features: cuDNN's limit before Hopper; two columns of lanes on a TPU."""
MOST_TOKENS = 1152
"""The longest tower for the TPU kernel: all keys of a head must fit in fast memory (compiled for 16 to 1,100).

A mask of queries x keys takes more: at 1,100 tokens the kernel does not compile for a v4 with one."""


class Choice(NamedTuple):
    """An implementation of attention and why it was selected."""

    name: str
    reason: str

    def attend(self, mesh: Mesh | AbstractMesh | None) -> Attend:
        return {"xla": xla, "cudnn": cudnn, "tpu": TPUAttention(mesh, vmem=_vmem(mesh))}[self.name]

    def __str__(self) -> str:
        return f"{self.name} ({self.reason})"


def choose_attention(
    setting: str, dtype: jnp.dtype, architecture: Architecture, mesh: Mesh | AbstractMesh | None
) -> Choice:
    """The implementation for a setting; ``auto`` selects the fused kernel of the mesh's platform if it can be used.

    Raises UserError if the setting is ``tpu`` and the TPU kernel cannot compute the model.
    """
    tensor = 1 if mesh is None else mesh.shape["tensor"]
    if setting == "tpu" and (reason := _obstacle_tpu(architecture, tensor)):
        raise UserError(f"config.model.attention=tpu: {reason}; set model.attention=auto")
    if setting != "auto":
        return Choice(setting, "as set")
    platform = jax.default_backend() if mesh is None else platform_of(mesh)
    kernel = AUTO.get(platform)
    if kernel is None:
        return Choice("xla", f"auto, on {platform or 'an unknown platform'}")
    reason = _obstacle_tpu(architecture, tensor) if kernel == "tpu" else _obstacle_cudnn(architecture, dtype)
    return Choice(kernel, f"auto, on {platform}") if reason is None else Choice("xla", f"auto, {reason}")


def _vmem(mesh: Mesh | AbstractMesh | None) -> int:
    """Fast memory that the kernel may use: half of a chip that has more than a kernel gets by default."""
    kind = mesh.devices.flat[0].device_kind if isinstance(mesh, Mesh) else ""
    chip = hardware.chip_of(kind)
    return VMEM if chip is None else max(VMEM, chip.vmem // 2)


def _obstacle_cudnn(architecture: Architecture, dtype: jnp.dtype) -> str | None:
    dims = {tower.width // tower.heads for tower in architecture.transformers}
    if dtype != jnp.bfloat16:
        return "cudnn needs model.dtype=bfloat16"
    if max(dims, default=0) > LARGEST_HEAD["cudnn"]:
        return f"heads of {max(dims)} features are too large for cudnn"
    if any(dim % 8 for dim in dims):
        return "cudnn needs heads of a multiple of 8 features"
    return None


def _obstacle_tpu(architecture: Architecture, tensor: int) -> str | None:
    for tower in architecture.transformers:
        if tower.heads % tensor:
            return f"mesh.tensor={tensor} does not divide {tower.heads} heads"
        if (dim := tower.width // tower.heads) > LARGEST_HEAD["tpu"]:
            return f"the TPU kernel takes heads of at most {LARGEST_HEAD['tpu']} features, not {dim}"
        if tower.tokens > MOST_TOKENS:
            return f"the TPU kernel takes at most {MOST_TOKENS:,} tokens, not {tower.tokens:,}"
    return None
