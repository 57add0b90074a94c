"""Weights into another model's tree: every tensor is loaded, resized, initialized or ignored, and reported."""

import dataclasses

import flax.linen as nn
import jax
import numpy as np
import pytest

from clip_jax.errors import UserError
from clip_jax.interop.merge import UNSEEN, differences, merge
from clip_jax.models.clip import CLIP
from clip_jax.presets import SIGLIP
from tests.interop import folders_of
from tests.interop.folders_of import PRESET


def shapes(**changes):
    image = dataclasses.replace(PRESET.architecture.image, **changes.pop("image", {}))
    text = dataclasses.replace(PRESET.architecture.text, **changes.pop("text", {}))
    architecture = dataclasses.replace(PRESET.architecture, image=image, text=text, **changes)
    return nn.meta.unbox(jax.eval_shape(CLIP(architecture).init, jax.random.key(0)))


def test_the_same_model_is_loaded_completely():
    loaded = folders_of.parameters()
    params, report = merge(shapes(), loaded)
    jax.tree.map(np.testing.assert_array_equal, params, loaded)
    assert len(report.loaded) == len(jax.tree.leaves(loaded)) and report[1:] == ((), (), (), ())
    assert report.lines() == [f"{len(report.loaded)} tensors loaded"]


def test_another_image_size_and_text_length_resize_the_positions_and_nothing_else():
    loaded = folders_of.parameters()
    params, report = merge(shapes(image={"image_size": 64}, text={"context_length": 33}), loaded)
    assert report.resized == ("image/position_embedding", "text/position_embedding")
    assert params["image"]["position_embedding"].shape == (17, 64)
    assert params["text"]["position_embedding"].shape == (33, 32)
    class_token = loaded["image"]["position_embedding"][0]
    np.testing.assert_array_equal(params["image"]["position_embedding"][0], class_token)
    assert "resized image/position_embedding" in report.lines()


@pytest.mark.parametrize(
    ("changes", "message", "allow"),
    [
        ({"embed_dim": 8}, r"image/projection \(\[64, 24\] in the weights, \[64, 8\] in the model\)", ["*/projection"]),
        ({"text": {"vocab_size": 99}}, r"text/token_embedding", ["text/token_embedding"]),
        ({"init_logit_bias": -10.0}, r"logit_bias \(missing\)", ["logit_bias"]),
    ],
)
def test_what_does_not_fit_is_an_error_unless_allowed_by_name(changes, message, allow):
    loaded, target = folders_of.parameters(), shapes(**changes)
    with pytest.raises(UserError, match=message):
        merge(target, loaded)
    params, report = merge(target, loaded, allow)
    assert report.initialized and all(
        isinstance(_at(params, name), jax.ShapeDtypeStruct) for name in report.initialized
    )


def _at(tree, path):
    for name in path.split("/"):
        tree = tree[name]
    return tree


def test_what_the_model_lacks_is_ignored_only_by_name():
    loaded = folders_of.parameters() | {"logit_bias": np.float32(-10)}
    with pytest.raises(UserError, match=r"logit_bias \(not in the model\)"):
        merge(shapes(), loaded)
    assert merge(shapes(), loaded, ["logit_bias"])[1].ignored == ("logit_bias",)


def test_a_pattern_that_matches_nothing_is_a_typing_mistake():
    with pytest.raises(UserError, match=r"text/projektion: allowed, but .*nearest: text/projection"):
        merge(shapes(), folders_of.parameters(), ["text/projektion"])


OTHERWISE = {  # every field of the towers, with another value than PRESET's
    "image": {
        "image_size": 64, "patch_size": 8, "width": 32, "layers": 1, "heads": 4, "mlp_width": 128,
        "activation": "gelu", "class_token": False, "patch_bias": True, "norm_pre": False, "norm_epsilon": 1e-6,
        "pooling": "average", "norm_before_pooling": True, "projection": False, "projection_bias": True,
        "norm_last": True, "swiglu": True, "key_bias": False, "rotary_grid": 16,
        "layer_scale": 1e-4, "init": "timm", "queries": 3, "query_heads": 2,
    },
    "text": {
        "context_length": 16, "vocab_size": 300, "width": 64, "layers": 1, "heads": 2, "mlp_width": 64,
        "activation": "gelu", "causal": False, "pooling": "last", "eos_id": 7, "norm_epsilon": 1e-6,
        "projection": False, "projection_bias": True, "shifted_mask": True,
    },
}  # fmt: skip


@pytest.mark.parametrize("tower", OTHERWISE)
def test_every_setting_of_a_tower_shows_in_the_shapes_or_is_compared(tower):
    fields = {field.name for field in dataclasses.fields(getattr(PRESET.architecture, tower))}
    assert fields == OTHERWISE[tower].keys()
    unchanged, by_queries = jax.tree.map(np.shape, shapes()), {"pooling": "queries", "query_heads": 2}
    for name, value in OTHERWISE[tower].items():
        if name == "init":
            continue  # the initial values, which loaded weights replace
        if name in UNSEEN:
            changed = dataclasses.replace(getattr(PRESET.architecture, tower), **{name: value})
            other = PRESET._replace(architecture=dataclasses.replace(PRESET.architecture, **{tower: changed}))
            assert list(differences(PRESET, other)) == [f"{tower}/{name}"]
        elif name == "queries":  # there are none in another pooling
            few, many = (shapes(image={**by_queries, "queries": number}) for number in (value, 5))
            assert jax.tree.map(np.shape, few) != jax.tree.map(np.shape, many)
        else:
            assert jax.tree.map(np.shape, shapes(**{tower: {name: value}})) != unchanged


def test_weights_made_with_other_settings_are_an_error_unless_allowed_by_name():
    gelu = dataclasses.replace(PRESET.architecture.text, activation="gelu")
    model = PRESET._replace(
        architecture=dataclasses.replace(PRESET.architecture, text=gelu), preprocess=SIGLIP, tokenizer="siglip"
    )
    found = differences(model, PRESET)
    assert found["text/activation"] == "quick_gelu in the weights, gelu in the model"
    assert list(found) == ["text/activation", "preprocess/mean", "preprocess/std", "tokenizer"]
    with pytest.raises(UserError, match=r"text/activation \(quick_gelu in the weights, gelu in the model\)"):
        merge(shapes(), folders_of.parameters(), ["preprocess/*", "tokenizer"], found)
    report = merge(shapes(), folders_of.parameters(), ["*/activation", "preprocess/*", "tokenizer"], found)[1]
    assert report.differing == tuple(found) and "differing tokenizer" in report.lines()


def test_positions_of_an_attention_pooling_are_resized_too():
    pooling = {"image": {"attention_pooling": {"spatial_embedding": np.ones((50, 8), np.float32)}}}
    target = {"image": {"attention_pooling": {"spatial_embedding": np.zeros((82, 8), np.float32)}}}
    params, report = merge(target, pooling)
    assert report.resized == ("image/attention_pooling/spatial_embedding",)
    np.testing.assert_allclose(params["image"]["attention_pooling"]["spatial_embedding"], 1, atol=1e-6)
