"""The contrastive objective outside a step: the held-out loss, and what it asks of the model."""

from types import SimpleNamespace

import jax
import numpy as np
import pytest

from clip_jax.config import defaults, resolve_preset
from clip_jax.devices.sharding import make_mesh
from clip_jax.losses import reference
from clip_jax.models.clip import CLIP
from clip_jax.objectives.contrastive import SPEC, make, make_held_out_loss
from clip_jax.presets import OPENAI
from clip_jax.training import initialize


@pytest.mark.parametrize("pairs", [30, 32])
@pytest.mark.parametrize("devices", [1, 8])
def test_the_held_out_loss_is_that_of_all_pairs_as_one_batch(pairs, devices):
    rng, mesh = np.random.default_rng(0), make_mesh(devices, devices=jax.devices()[:devices])
    image, text = (x / np.linalg.norm(x, axis=1, keepdims=True) for x in rng.normal(size=(2, pairs, 6)))
    image, text = image.astype(np.float32), text.astype(np.float32)
    params = {"logit_scale": np.float32(np.log(20)), "logit_bias": np.float32(-10), "image": {}}
    expected, _ = reference.softmax(image, text, np.float32(20))
    assert make_held_out_loss("softmax", mesh)(params, image, text) == pytest.approx(float(expected), rel=1e-6)
    expected, _ = reference.sigmoid(image, text, np.float32(20), np.float32(-10))
    assert make_held_out_loss("sigmoid", mesh)(params, image, text) == pytest.approx(float(expected), rel=1e-6)


def test_the_sigmoid_loss_gives_the_model_a_bias():
    config = defaults()
    assert resolve_preset(config).architecture.init_logit_bias is None
    config.objectives.contrastive.loss = "sigmoid"
    architecture = resolve_preset(config).architecture
    assert architecture.init_logit_bias == -10 and np.exp(architecture.init_logit_scale) == pytest.approx(10)


@pytest.mark.parametrize(("name", "after"), [("softmax", 100.0), ("sigmoid", 112.3)])
def test_the_scale_of_a_sigmoid_loss_has_no_limit(name, after):
    """Published SigLIP models exceed CLIP's limit of 100, which belongs to the softmax (Radford et al. 2021, 2.5)."""
    settings = {**SPEC.defaults, "loss": name}
    model = CLIP(resolve_preset(defaults()).architecture)
    params = make(settings, model, OPENAI, None).constrain({"logit_scale": np.float32(np.log(112.3))})
    assert float(np.exp(params["logit_scale"])) == pytest.approx(after, rel=1e-5)


@pytest.mark.parametrize(("scale", "said"), [(112.3, "112.3 in the weights, 100 from the first step on"), (99.0, "")])
def test_a_loaded_scale_that_the_first_step_would_change_is_said(scale, said):
    objective = make(SPEC.defaults, CLIP(resolve_preset(defaults()).architecture), OPENAI, None)
    learner = SimpleNamespace(objectives={"contrastive": objective})
    run = SimpleNamespace(phases=[SimpleNamespace(learner=learner)])
    assert said in initialize._limited_scale(run, {"logit_scale": np.float32(np.log(scale))})
    assert bool(said) == bool(initialize._limited_scale(run, {"logit_scale": np.float32(np.log(scale))}))
