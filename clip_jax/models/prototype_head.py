"""The projection head of self-distillation: an MLP to a bottleneck of unit length, and prototypes of unit length.

As in DINO (Caron et al. 2021, appendix C): three layers with GELU, a bottleneck of 256 features,
and a last layer that is normalized by weight, with a constant norm of one.
"""

from dataclasses import dataclass

import flax.linen as nn
import jax.numpy as jnp
from jaxtyping import Array, Float

from clip_jax.devices.sharding import split_rows
from clip_jax.models import flops
from clip_jax.models.compute import Compute
from clip_jax.models.transformer import normal


@dataclass(frozen=True)
class HeadShape:
    """Widths in features."""

    width: int
    hidden: int
    bottleneck: int
    prototypes: int

    def forward_flops(self) -> int:
        """FLOPs of one vector's forward pass without the prototypes."""
        return flops.product(self.width + self.hidden, self.hidden) + flops.product(self.hidden, self.bottleneck)

    def prototype_flops(self) -> int:
        return flops.product(self.bottleneck, self.prototypes)


class PrototypeHead(nn.Module):
    """(features [..., width]) -> (bottleneck [..., bottleneck] of unit length, prototypes [bottleneck, prototypes])"""

    shape: HeadShape
    compute: Compute

    @nn.compact
    def __call__(
        self, x: Float[Array, "batch *items width"]
    ) -> tuple[Float[Array, "batch *items bottleneck"], Float[Array, "bottleneck prototypes"]]:
        shape, dtype, mesh = self.shape, self.compute.dtype, self.compute.mesh
        x = x.astype(dtype)
        layers = (
            (shape.hidden, ("embed", "mlp")),
            (shape.hidden, ("mlp", "embed")),
            (shape.bottleneck, ("embed", None)),
        )
        for number, (width, axes) in enumerate(layers, start=1):
            layer = nn.Dense(
                width,
                dtype=dtype,
                kernel_init=nn.with_logical_partitioning(normal(0.02), axes),
                bias_init=nn.with_logical_partitioning(nn.initializers.zeros, axes[1:]),
                name=f"layer_{number}",
            )
            x = split_rows(layer(x), mesh)
            x = nn.gelu(x, approximate=False) if number < len(layers) else x
        init = nn.with_logical_partitioning(normal(1.0), ("embed", "vocab"))
        prototypes = self.param("prototypes", init, (shape.bottleneck, shape.prototypes))
        return _unit(x, axis=-1).astype(dtype), _unit(prototypes, axis=0)


def _unit(x: Array, axis: int) -> Array:
    """x / |x| in float32; zero stays zero."""
    x = x.astype(jnp.float32)
    return x / jnp.sqrt(jnp.sum(x * x, axis=axis, keepdims=True) + 1e-12)
