"""optax chains: AdamW as CLIP was trained, its decay mask, warm-up and cosine."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax

Schedule = Callable[[jax.Array], jax.Array]

DECAYED = (
    *("qkv", "out", "up", "down", "gate", "query", "key", "value", "key_value", "kernel"),
    *("patch_embedding", "token_embedding", "spatial_embedding", "projection"),
)
POSITIONS = ("position_embedding",)


def schedule(kind: str, learning_rate: float, warmup: int, steps: int) -> Schedule:
    """Linear warm-up to ``learning_rate``, then cosine to zero or constant; step 0 already learns (OpenCLIP's form).

    warm-up: lr * (step + 1) / warmup; cosine: lr/2 * (1 + cos(pi * (step - warmup) / (steps - warmup))).
    """

    def at(step):
        step = jnp.asarray(step, jnp.float32)
        warm = (step + 1) / max(warmup, 1)
        progress = (step - warmup) / max(steps - warmup, 1)
        after = 0.5 * (1 + jnp.cos(jnp.pi * jnp.clip(progress, 0, 1))) if kind == "cosine" else 1.0
        return learning_rate * jnp.where(step < warmup, warm, after)

    return at


def decay_mask(rule: str) -> Callable[[Any], Any]:
    """Which parameters decay: those of two dimensions or more, counted without the stacking axis of the blocks.

    ``matrices`` leaves position embeddings out (OpenCLIP 4), ``matrices_and_positions`` decays them (OpenCLIP 3).
    """
    names = DECAYED if rule == "matrices" else DECAYED + POSITIONS

    def decays(path, _) -> bool:
        # The last name in the dictionaries; a box around an array adds an attribute behind it.
        return [key.key for key in path if isinstance(key, jax.tree_util.DictKey)][-1] in names

    def mask(params):
        return jax.tree_util.tree_map_with_path(decays, params)

    return mask


def adamw(
    rate: Schedule, *, weight_decay: float, decay: str, beta1: float, beta2: float, eps: float, clip_norm: float
) -> optax.GradientTransformation:
    """Decoupled AdamW (Loshchilov and Hutter 2019), the gradient clipped by its global norm first where asked."""
    parts = [optax.clip_by_global_norm(clip_norm)] if clip_norm > 0 else []
    parts += [
        optax.scale_by_adam(b1=beta1, b2=beta2, eps=eps),
        optax.add_decayed_weights(weight_decay, mask=decay_mask(decay)),
        optax.scale_by_learning_rate(rate),
    ]
    return optax.chain(*parts)
