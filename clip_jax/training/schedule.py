"""The learning rate of every step."""

from collections.abc import Callable

import jax
import jax.numpy as jnp

Schedule = Callable[[jax.Array], jax.Array]


def schedule(
    kind: str, learning_rate: float, warmup: int, steps: int, *, timescale: int = 10_000, cooldown: int = 0
) -> Schedule:
    """Linear warm-up to ``learning_rate``, then ``cosine`` to zero, ``rsqrt`` or ``constant``; lengths in steps.

    warm-up: lr * (step + 1) / warmup, so that step 0 already learns (OpenCLIP's form)
    cosine:  lr/2 * (1 + cos(pi * (step - warmup) / (steps - warmup)))
    rsqrt:   lr / sqrt(1 + (step - warmup) / timescale) (Zhai et al. 2022, section 3.5)

    The last ``cooldown`` steps go linearly to zero besides, as (steps - step) / cooldown.
    """

    def at(step):
        step = jnp.asarray(step, jnp.float32)
        warm = (step + 1) / max(warmup, 1)
        if kind == "cosine":
            progress = (step - warmup) / max(steps - warmup, 1)
            after = 0.5 * (1 + jnp.cos(jnp.pi * jnp.clip(progress, 0, 1)))
        elif kind == "rsqrt":
            after = jax.lax.rsqrt(1 + jnp.maximum(step - warmup, 0) / timescale)
        else:
            after = jnp.ones(())
        rate = learning_rate * jnp.where(step < warmup, warm, after)
        return rate * jnp.clip((steps - step) / cooldown, 0, 1) if cooldown else rate

    return at
