"""A teacher's weights are loaded onto the devices, and what does not fit is one line before the run starts."""

import types

import flax.linen as nn
import jax
import numpy as np
import pytest

from clip_jax import presets
from clip_jax.config import load
from clip_jax.devices.sharding import make_mesh
from clip_jax.errors import UserError
from clip_jax.models.clip import CLIP
from clip_jax.training import teacher
from clip_jax.training.run import check_labels
from clip_jax.training.setup import make_learner

NAME = "ViT-Shapes/16"
TAUGHT = {
    "objectives.distillation.weight": "1",
    "objectives.distillation.teacher": NAME,
    "objectives.distillation.teacher_weights": "hf://some/model",
    "model.text.vocab_size": "-1",
}


def learner(overrides):
    return make_learner(load("configs/demo.py", TAUGHT | overrides), make_mesh(2, 4), steps=10, examples=1000)


def loads(monkeypatch, architecture):
    params = jax.jit(lambda key: nn.meta.unbox(CLIP(architecture).init(key)))(jax.random.key(5))
    found = types.SimpleNamespace(params=params, batch_stats={})
    monkeypatch.setattr(teacher, "load", lambda source: {"hf://some/model": found}[source])
    return params


def test_a_teachers_weights_are_loaded_sharded_and_identified(monkeypatch):
    params = loads(monkeypatch, presets.preset(NAME).architecture)
    made = learner({})
    constants = made.load_constants()["distillation"]["0"]
    jax.tree.map(np.testing.assert_array_equal, constants["params"]["image"], params["image"])
    kernel = constants["params"]["image"]["patch_embedding"]
    assert kernel.addressable_shards[0].data.shape[1] == kernel.shape[1] // 4
    assert "distillation" not in made.abstract_state().aux


def test_what_does_not_fit_the_student_or_the_teacher_is_one_line(monkeypatch):
    smaller = presets.preset("ViT-B/32").architecture
    for overrides, message in (
        ({"objectives.distillation.teacher": ""}, "teacher is a model's name"),
        ({"objectives.distillation.teacher_weights": ""}, "teacher_weights its weights"),
        ({"model.image.image_size": "96"}, "its image size is 64, and that of config.model 96"),
        ({"model.text.context_length": "9"}, "its context length is"),
        ({"model.text.vocab_size": "77"}, "its vocabulary is"),
    ):
        with pytest.raises(UserError, match=message):
            learner(overrides)
    made = learner({})
    monkeypatch.setattr(teacher, "load", lambda source: types.SimpleNamespace(params=tiny(smaller), batch_stats={}))
    with pytest.raises(UserError, match="not the weights of a ViT-Shapes/16"):
        made.load_constants()


def tiny(architecture):
    """Shapes of a model, without its memory."""
    params = nn.meta.unbox(jax.eval_shape(CLIP(architecture).init, jax.random.key(0)))
    return jax.tree.map(lambda leaf: np.broadcast_to(np.float32(0), leaf.shape), params)


def test_labels_as_positives_need_a_source_with_labels():
    config = load("configs/demo.py", {"objectives.contrastive.positives": "labels"})
    check_labels(config, types.SimpleNamespace(name="folder:pets", class_names=("cat", "dog")))
    with pytest.raises(UserError, match="the examples of folder:photos have no labels"):
        check_labels(config, types.SimpleNamespace(name="folder:photos", class_names=()))
