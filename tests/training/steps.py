"""A few real training steps of a small model, for tests of the step."""

import numpy as np

from clip_jax import presets
from clip_jax.models.clip import CLIP
from clip_jax.sharding import to_devices
from clip_jax.training.optimizer import adamw
from clip_jax.training.schedule import schedule
from clip_jax.training.state import create_state
from clip_jax.training.step import make_train_step
from tests.models.test_clip import SMALL


def batches(steps, pairs=16):
    """The same random pairs for everybody."""
    rng = np.random.default_rng(0)
    for _ in range(steps):
        image = rng.integers(0, 256, (pairs, 32, 32, 3), np.uint8)
        yield {"image": image, "text": rng.integers(0, 100, (pairs, 12)).astype(np.int32)}


def train(mesh, *, architecture=SMALL, optimizer=None, model=None, steps=4, pairs=16, rate=1e-2, **options):
    """The metrics of a few steps, as numbers, and the last state."""
    clip, rates = model or CLIP(architecture), schedule("constant", rate, 0, steps)
    if optimizer is None:
        optimizer = adamw(rates, weight_decay=0.1, decay="matrices", beta1=0.9, beta2=0.98, eps=1e-6, clip_norm=1.0)
    options = {"max_logit_scale": 100.0} | options
    step = make_train_step(clip, presets.HALF, optimizer, rates, mesh, **options)
    state, seen = create_state(clip, optimizer, mesh, 0, average=options.get("average_decay", 0) > 0), []
    for batch in batches(steps, pairs):
        state, metrics = step(state, to_devices(batch, mesh, pairs))
        seen.append({name: float(value) for name, value in metrics.items()})
    return seen, state
