"""A few real training steps of a small model, for tests of the step."""

from dataclasses import replace

import numpy as np

from clip_jax import presets
from clip_jax.data.views import pair_views
from clip_jax.devices.sharding import to_devices
from clip_jax.models.clip import CLIP
from clip_jax.objectives import contrastive
from clip_jax.objectives.objective import Ema
from clip_jax.training.learner import Learner
from clip_jax.training.optimizer import adamw
from clip_jax.training.schedule import schedule
from clip_jax.training.state import EMA
from tests.models.test_clip import SMALL

MESHES = [(d, f, 8 // (d * f)) for d in (1, 2, 4, 8) for f in (1, 2, 4, 8) if d * f <= 8]
"""All shapes of a mesh of eight devices: data, fsdp, tensor."""


def batches(steps, pairs=16):
    """The same random pairs for every test."""
    rng = np.random.default_rng(0)
    for _ in range(steps):
        image = rng.integers(0, 256, (pairs, 32, 32, 3), np.uint8)
        yield {"image": image, "text": rng.integers(0, 100, (pairs, 12)).astype(np.int32)}


def learner_of(
    mesh,
    *,
    architecture=SMALL,
    model=None,
    optimizer=None,
    rate=1e-2,
    loss="softmax",
    preprocess=presets.HALF,
    max_logit_scale=100.0,
    ema_decay=0.0,
    objectives=None,
    weights=None,
    **options,
):
    """A learner with the contrastive objective, without a config."""
    model = model or CLIP(architecture)
    model = replace(model, compute=model.compute._replace(mesh=mesh))
    rates = schedule("constant", rate, 0, 100)
    if optimizer is None:
        optimizer = adamw(rates, weight_decay=0.1, decay="matrices", beta1=0.9, beta2=0.98, eps=1e-6, clip_norm=1.0)
    if objectives is None:
        settings = contrastive.SPEC.defaults | {"loss": loss, "max_logit_scale": max_logit_scale}
        objectives = {"contrastive": contrastive.make(settings, model, preprocess, None)}
    views = pair_views(
        image_size=model.architecture.image.image_size,
        context_length=model.architecture.text.context_length,
        tokenizer=None,
        crop_scale=(1.0, 1.0),
        crop_ratio=(1.0, 1.0),
        interpolation="bicubic",
    )
    return Learner(
        model=model,
        preprocess=preprocess,
        views=views,
        objectives=objectives,
        weights=weights or dict.fromkeys(objectives, 1.0),
        optimizer=optimizer,
        rate=rates,
        mesh=mesh,
        run_emas={EMA: Ema(ema_decay)} if ema_decay else {},
        **options,
    )


def train(mesh, *, steps=4, pairs=16, **options):
    """The metrics of a few steps, as numbers, and the last state."""
    learner = learner_of(mesh, **options)
    step, state, seen = learner.step(), learner.create_state(), []
    for batch in batches(steps, pairs):
        state, metrics = step(state, to_devices(batch, mesh, pairs), {})
        seen.append({name: float(value) for name, value in metrics.items()})
    return seen, state
