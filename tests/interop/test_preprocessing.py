"""Preprocessing that a foreign folder names: every key that changes a number is read or refused."""

import json

import numpy as np
import pytest

import clip_jax
from clip_jax.errors import UserError
from clip_jax.interop import huggingface_config, open_clip_config, preprocessing
from clip_jax.presets import OPENAI, SIGLIP, preset
from tests.interop import folders_of

CLIP_PROCESSOR = {
    "image_processor_type": "CLIPImageProcessor",
    "do_resize": True,
    "size": {"shortest_edge": 224},
    "resample": 3,
    "do_center_crop": True,
    "crop_size": {"height": 224, "width": 224},
    "do_rescale": True,
    "rescale_factor": 1 / 255,
    "do_normalize": True,
    "image_mean": list(OPENAI.mean),
    "image_std": list(OPENAI.std),
    "do_convert_rgb": True,
}


def read(settings, family="CLIP"):
    return preprocessing.from_transformers(settings, family, 224, "here")


def test_transformers_5_keeps_the_image_processor_inside_another_file(tmp_path):
    """Saved by Transformers 5 alone, or beside an older file that it no longer reads."""
    folder = folders_of.hugging_face_folder(tmp_path)
    size = {"height": 32, "width": 32}
    nested = CLIP_PROCESSOR | {"image_mean": [0.5] * 3, "image_std": [0.5] * 3, "size": size, "crop_size": size}
    (folder / "processor_config.json").write_text(json.dumps({"image_processor": nested}))
    expected = SIGLIP._replace(resize="squash")
    assert clip_jax.load(folder).preset.preprocess == expected
    (folder / "preprocessor_config.json").unlink()
    assert clip_jax.load(folder).preset.preprocess == expected
    (folder / "processor_config.json").write_text(json.dumps({"processor_class": "CLIPProcessor"}))
    assert clip_jax.load(folder).preset.preprocess == OPENAI


@pytest.mark.parametrize("settings", [None, {}, {"image_processor_type": "SiglipImageProcessor"}])
def test_what_a_siglip_does_not_say_is_siglips(settings):
    assert read(settings, "Siglip") == SIGLIP
    assert huggingface_config.to_preset({"model_type": "siglip"}, settings, "here").preprocess == SIGLIP


def test_what_a_clip_does_not_say_is_clips():
    assert read(None) == read({}) == read(CLIP_PROCESSOR) == OPENAI
    assert read({"feature_extractor_type": "CLIPFeatureExtractor", "size": 224, "crop_size": 224}) == OPENAI
    # The class that the file names decides, not that of the model.
    assert read({"image_processor_type": "SiglipImageProcessorFast"}) == SIGLIP


@pytest.mark.parametrize(
    "change",
    [
        {"do_normalize": False},
        {"do_rescale": False},
        {"do_normalize": False, "do_rescale": False},
        {"rescale_factor": 1 / 127.5},
        {"rescale_factor": 1 / 127.5, "do_normalize": False},
        {"image_mean": 0.5, "image_std": 0.25},
    ],
)
def test_any_factor_and_statistics_become_ours(change):
    settings = CLIP_PROCESSOR | change
    pixels = np.random.default_rng(0).integers(0, 256, (1, 2, 2, 3)).astype(np.uint8)
    expected = pixels.astype(np.float64)
    if settings["do_rescale"]:
        expected = expected * settings["rescale_factor"]
    if settings["do_normalize"]:
        expected = (expected - settings["image_mean"]) / settings["image_std"]
    np.testing.assert_allclose(read(settings).normalize(pixels), expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"do_resize": False}, "do_resize=False"),
        ({"do_center_crop": False}, "do_center_crop=False"),
        ({"size": {"shortest_edge": 256}}, r"size=.*256.*takes 224 pixels"),
        ({"size": {"height": 224, "width": 448}}, "size="),
        ({"size": {"shortest_edge": 224, "longest_edge": 300}}, "size="),
        ({"crop_size": {"height": 192, "width": 192}}, "crop_size="),
        ({"resample": 1}, "resample=1"),
        ({"resample": 0}, "resample=0"),
        ({"rescale_factor": 0}, "rescale_factor=0"),
        ({"image_std": [0.5, 0.0, 0.5]}, "image_std="),
        ({"image_mean": [0.5]}, "image_mean="),
        ({"image_mean": "imagenet"}, "image_mean="),
        ({"do_pad": True}, "do_pad=True"),
        ({"do_something_new": 3}, "do_something_new=3"),
        ({"image_processor_type": "Siglip2ImageProcessor"}, "Siglip2ImageProcessor is not supported"),
    ],
)
def test_what_cannot_be_read_is_refused_by_name(change, message):
    with pytest.raises(UserError, match=f"here: {message}"):
        read(CLIP_PROCESSOR | change)


def test_unused_keys_as_null_change_nothing():
    unused = {"do_pad": None, "pad_size": None, "data_format": "channels_first", "do_flip": False}
    size = {"shortest_edge": 224, "height": None, "width": None, "longest_edge": None}
    assert read(CLIP_PROCESSOR | unused | {"size": size}) == OPENAI


def through_open_clip(name, change, vision=None, model=None):
    config = open_clip_config.from_preset(preset(name))
    config["preprocess_cfg"] = change
    config["model_cfg"] |= model or {}
    config["model_cfg"]["vision_cfg"] |= vision or {}
    return open_clip_config.to_preset(config, "here")


@pytest.mark.parametrize("change", [None, {}, {"mean": None}])
def test_what_open_clips_config_does_not_say_is_the_familys(change):
    for name in ("ViT-B/32", "ViT-B/16-SigLIP", "ViT-B/16-SigLIP2", "ViT-L/14-CLIPA"):
        assert through_open_clip(name, change).preprocess == preset(name).preprocess


def test_a_random_filter_of_training_is_bicubic_in_evaluation():
    assert through_open_clip("ViT-B/32", {"interpolation": "random"}).preprocess == OPENAI


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"interpolation": "lanczos"}, "interpolation='lanczos'"),
        ({"resize_mode": "longest"}, "resize_mode='longest'"),
        ({"mode": "L"}, "mode='L'"),
        ({"std": [1, 2]}, r"std=\[1, 2\]"),
    ],
)
def test_preprocessing_of_open_clip_that_is_not_built_is_refused_by_name(change, message):
    with pytest.raises(UserError, match=f"preprocess_cfg.{message}"):
        through_open_clip("ViT-B/32", change)


def test_other_parts_of_open_clips_model_are_refused_by_name():
    with pytest.raises(UserError, match="multimodal_cfg"):
        through_open_clip("ViT-B/32", {}, model={"multimodal_cfg": {"layers": 12}})
    config = open_clip_config.from_preset(preset("ViT-B/32"))
    config["model_cfg"]["text_cfg"]["tokenizer_kwargs"] = {"clean": "whitespace"}
    with pytest.raises(UserError, match="tokenizer_kwargs"):
        open_clip_config.to_preset(config, "here")


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        ({}, ("argmax", None)),  # Transformers' default, 49407
        ({"eos_token_id": 2}, ("argmax", None)),  # as OpenAI's configs have it
        ({"eos_token_id": 49407, "vocab_size": 49500}, ("eos", 49407)),  # tokens were added after the end token
        ({"eos_token_id": 1, "vocab_size": 300}, ("eos", 1)),
    ],
)
def test_a_text_is_pooled_at_the_end_token_of_the_config(given, expected):
    found = huggingface_config.to_preset({"model_type": "clip", "text_config": given}, None, "here")
    text = found.architecture.text
    assert (text.pooling, text.eos_id) == expected
    config, _ = huggingface_config.from_preset(found)
    again = huggingface_config.to_preset(config, None, "here")
    assert again.architecture.text == text


@pytest.mark.parametrize("given", [{"vocab_size": 300}, {"eos_token_id": 49408}, {"eos_token_id": [1, 2]}])
def test_an_end_token_that_no_text_can_have_is_refused(given):
    with pytest.raises(UserError, match="eos_token_id"):
        huggingface_config.to_preset({"model_type": "clip", "text_config": given}, None, "here")
