"""The learning rate of every step."""

from collections.abc import Callable

import jax
import jax.numpy as jnp

Schedule = Callable[[jax.Array], jax.Array]


def schedule(
    kind: str,
    learning_rate: float,
    warmup: int,
    steps: int,
    *,
    timescale: int = 10_000,
    cooldown: int = 0,
    form: str = "linear",
) -> Schedule:
    """Linear warm-up to ``learning_rate``, then ``cosine`` to zero, ``rsqrt``, ``constant`` or ``wsd``; in steps.

    warm-up: lr * (step + 1) / warmup, so that step 0 already learns (OpenCLIP's form)
    cosine:  lr/2 * (1 + cos(pi * (step - warmup) / (steps - warmup)))
    rsqrt:   lr / sqrt(1 + (step - warmup) / timescale) (Zhai et al. 2022, section 3.5)

    wsd:     warm-up, stable, decay: constant with a cooldown (Hu et al. 2024)

    The last ``cooldown`` steps go to zero besides. With x from 0 to 1 in them, the factor of the ``form`` ``linear`` is
    1 - x, and that of ``1-sqrt`` is 1 - sqrt(x) (Hägele et al. 2024, section 3).
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
        if not cooldown:
            return rate
        left = jnp.clip((steps - step) / cooldown, 0, 1)
        return rate * (left if form == "linear" else 1 - jnp.sqrt(1 - left))

    return at
