"""The contrastive objective outside a step: the held-out loss, and what it asks of the model."""

from types import SimpleNamespace

import jax
import numpy as np
import pytest

from clip_jax.config import defaults, resolve_preset
from clip_jax.data.sources.sample import Sample
from clip_jax.devices.sharding import make_mesh
from clip_jax.losses import reference
from clip_jax.models.clip import CLIP
from clip_jax.objectives.contrastive import SPEC, groups_of, make, make_held_out_loss, positive_groups, views
from clip_jax.presets import OPENAI
from clip_jax.training import initialize
from tests.models.test_clip import SMALL


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


def test_groups_are_equal_for_equal_captions_alone():
    rng = np.random.default_rng(0)
    tokens = rng.integers(0, 40_000, (4096, 12)).astype(np.int32)
    tokens[1::2] = tokens[::2]
    tokens[1::4, 3] += 1  # one token
    tokens[3::8] = tokens[3::8, ::-1]  # the order
    groups = np.asarray(groups_of(tokens))
    assert len(np.unique(groups, axis=0)) == len(np.unique(tokens, axis=0)) < 4096
    assert all((groups[:, 0] == word).sum() <= 2 for word in groups[:16, 0])


def test_an_example_without_a_label_is_a_positive_of_its_own_text_alone():
    label = np.asarray([3, -1, 3, -1], np.int32)[:, None]
    groups = np.asarray(positive_groups("labels", {"label": label, "row": np.arange(4)}))[:, 0]
    assert groups[0] == groups[2] and len(set(groups.tolist())) == 3


def test_the_views_give_the_examples_own_negatives_first_and_then_those_of_its_caption():
    def tokenizer(texts):
        return np.asarray([[len(text)] * 12 for text in texts], np.int32)

    settings = SPEC.defaults | {"positives": "labels", "negatives": 3}
    made = views(settings, CLIP(SMALL), tokenizer)
    caption, given = "a red circle and a blue square", "something else"

    def batch(**fields):
        arrays = {
            name: np.empty((1, *shape), dtype) for v in made.values() for name, (shape, dtype) in v.arrays.items()
        }
        for view in made.values():
            view.fill(
                Sample(None, (caption,), "k", **fields), np.random.default_rng(0), {n: a[0] for n, a in arrays.items()}
            )
        return arrays

    one = batch(label=5, extras={"negatives": (given,)})
    assert one["label"].tolist() == [[5]] and one["has_negative"].all()
    assert one["negatives"][0, :, 0].tolist() == [len(given), len(caption), len(caption)]
    other = batch()
    assert other["label"].tolist() == [[-1]] and other["has_negative"].tolist() == [[True, True, False]]
