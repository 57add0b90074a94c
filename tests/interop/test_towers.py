"""Weights of one tower alone do what that tower can, and say what they lack."""

import json

import jax
import numpy as np
import pytest

import clip_jax
from clip_jax import commands, presets
from clip_jax.errors import UserError
from clip_jax.interop import files
from tests.interop import folders_of
from tests.interop.folders_of import PRESET

PIXELS = np.random.default_rng(0).normal(size=(2, 32, 32, 3)).astype(np.float32)
TOKENS = np.random.default_rng(0).integers(0, 49408, (3, 77)).astype(np.int32)


def transformers_tower(folder, tower, name):
    """What ``save_pretrained`` of a model of one tower writes: its tensors, and its part of the config."""
    whole = folders_of.hugging_face_folder(folder)
    state = dict(files.read(whole / "model.safetensors"))
    own = {"vision": ("vision_model.", "visual_projection."), "text": ("text_model.", "text_projection.")}[tower]
    files.write_safetensors(whole / "model.safetensors", {k: v for k, v in state.items() if k.startswith(own)})
    config = json.loads((whole / "config.json").read_text())[f"{tower}_config"]
    (whole / "config.json").write_text(json.dumps(config | {"architectures": [name]}))
    return whole


def test_an_image_tower_of_transformers_encodes_images(tmp_path):
    whole = clip_jax.load(folders_of.hugging_face_folder(tmp_path / "whole"))
    folder = transformers_tower(tmp_path / "half", "vision", "CLIPVisionModelWithProjection")
    model = clip_jax.load(folder)
    np.testing.assert_array_equal(model.encode_pixels(PIXELS), whole.encode_pixels(PIXELS))
    np.testing.assert_array_equal(
        model.encode_pixels(PIXELS, return_tokens=-2), whole.encode_pixels(PIXELS, return_tokens=-2)
    )
    for use in (lambda: model.encode_tokens(TOKENS), lambda: model.scale):
        with pytest.raises(UserError, match="these weights have no text tower"):
            use()
    assert commands.main(["export", f"--model={folder}", "--format=openclip", f"--to={tmp_path / 'out'}"]) == 2


def test_a_text_tower_of_transformers_encodes_texts(tmp_path):
    whole = clip_jax.load(folders_of.hugging_face_folder(tmp_path / "whole"))
    model = clip_jax.load(transformers_tower(tmp_path / "half", "text", "CLIPTextModelWithProjection"))
    np.testing.assert_array_equal(model.encode_tokens(TOKENS), whole.encode_tokens(TOKENS))
    with pytest.raises(UserError, match="these weights have no image tower"):
        model.encode_image(np.zeros((8, 8, 3), np.uint8))


@pytest.mark.parametrize("tower", ["vision", "text"])
def test_a_tower_without_its_projection_says_so(tmp_path, tower):
    name = {"vision": "CLIPVisionModel", "text": "CLIPTextModel"}[tower]
    with pytest.raises(UserError, match=f"{name} has no projection to embeddings; {name}WithProjection has"):
        clip_jax.load(transformers_tower(tmp_path, tower, name))


def test_the_visual_tensors_of_open_clip_encode_images(tmp_path, monkeypatch):
    monkeypatch.setitem(presets.PRESETS, "ViT-Test/16", PRESET)
    folder = folders_of.open_clip_folder(tmp_path)
    whole = clip_jax.load(folder)
    state = {k: v for k, v in files.read(folder / "open_clip_model.safetensors").items() if k.startswith("visual.")}
    files.write_safetensors(tmp_path / "visual.safetensors", state)
    model = clip_jax.load("ViT-Test/16", weights=tmp_path / "visual.safetensors")
    np.testing.assert_array_equal(model.encode_pixels(PIXELS), whole.encode_pixels(PIXELS))
    assert set(model.params) == {"image"}
    jax.tree.map(np.testing.assert_array_equal, model.params["image"], whole.params["image"])
    # A tower that lacks some of its tensors is no tower.
    del state["visual.proj"]
    files.write_safetensors(tmp_path / "visual.safetensors", state)
    with pytest.raises(UserError, match=r"visual\.proj: missing"):
        clip_jax.load("ViT-Test/16", weights=tmp_path / "visual.safetensors")


def test_stablehlo_gives_the_models_probabilities_for_any_number_of_rows(small_run, tmp_path, monkeypatch):
    """By the program that the export itself brings (``use.py``), which does not import clip_jax."""
    pytest.importorskip("flatbuffers")
    to = tmp_path / "out"
    assert commands.main(["export", f"--model={small_run}", "--format=stablehlo", f"--to={to}"]) == 0
    monkeypatch.chdir(to)
    model, labels = clip_jax.load(small_run), ["picture number 3", "something else"]
    images = np.random.default_rng(0).integers(0, 256, (3, 32, 32, 3)).astype(np.uint8)  # the model's size
    for rows in (1, 3):
        found = {"pixels": images[:rows], "tokens": model.tokenize(labels)}
        exec((to / "use.py").read_text(), found)
        np.testing.assert_allclose(found["probabilities"], model.classify(images[:rows], labels), atol=1e-5)
    assert json.loads((to / "config.json").read_text())["image_size"] == 32 and (to / "tokenizer.json").exists()
