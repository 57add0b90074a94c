"""Every preset as a config of OpenCLIP and Transformers: it comes back equal, loses one known field, or is refused."""

import dataclasses
import json

import pytest

from clip_jax import presets
from clip_jax.errors import UserError
from clip_jax.interop import huggingface_config, open_clip, open_clip_config
from clip_jax.models.vit import ImageTower
from clip_jax.presets import HALF, OPENAI, SIGLIP

# Batch norm, averaged patches, layer scale, a decoder, EVA-02's blocks, or a SigLIP text tower without a projection.
NOT_IN_TRANSFORMERS = {
    name
    for name in presets.PRESETS
    if name.startswith(("RN", "EVA02", "coca"))
    or "CLIPA" in name
    or name in ("ViT-M/16-alt", "ViT-SO400M/16-SigLIP-i18n-256")
}


def through_open_clip(preset):
    return open_clip_config.to_preset(json.loads(json.dumps(open_clip_config.from_preset(preset))), "here")


def through_transformers(preset):
    config, preprocessor = json.loads(json.dumps(huggingface_config.from_preset(preset)))
    return huggingface_config.to_preset(config, preprocessor, "here")


def without_a_trained_tokenizer(preset):
    """Transformers' config names no tokenizer: its files say which one it is, beside the config."""
    return preset._replace(tokenizer="clip") if preset.tokenizer == "sentencepiece" else preset


@pytest.mark.parametrize("name", presets.PRESETS)
def test_a_preset_comes_back_equal_from_open_clips_config(name):
    preset = presets.preset(name)
    assert through_open_clip(preset) == preset


@pytest.mark.parametrize("name", sorted(presets.PRESETS.keys() - NOT_IN_TRANSFORMERS))
def test_a_preset_comes_back_equal_from_transformers_config(name):
    preset = presets.preset(name)
    assert through_transformers(preset) == without_a_trained_tokenizer(preset)


@pytest.mark.parametrize("name", sorted(NOT_IN_TRANSFORMERS))
def test_a_model_that_transformers_does_not_have_is_refused(name):
    with pytest.raises(UserError, match="neither Transformers' CLIPModel nor its SiglipModel"):
        huggingface_config.from_preset(presets.preset(name))


@pytest.mark.parametrize("name", presets.PRESETS)
def test_open_clip_takes_the_towers_of_siglip_and_eva_from_timm(name):
    image = presets.preset(name).architecture.image
    assert open_clip.is_timm(image) == ("SigLIP" in name or name.startswith("EVA02"))
    assert ("timm_model_name" in open_clip_config.from_preset(presets.preset(name))["model_cfg"]["vision_cfg"]) == (
        isinstance(image, ImageTower) and image.init != "clip"
    )


@pytest.mark.parametrize("through", [through_open_clip, through_transformers])
def test_the_initial_logit_scale_of_a_config_is_the_default(through):
    """It is a parameter of any saved model: the value in the weights replaces it."""
    preset = presets.preset("ViT-B/32")
    changed = preset._replace(architecture=dataclasses.replace(preset.architecture, init_logit_scale=2.0))
    assert through(changed) == preset


def test_published_configs_of_transformers_are_the_presets_of_their_names():
    """openai/clip-vit-large-patch14 and google/siglip-base-patch16-224, reduced to the fields that are not defaults."""
    text = {"hidden_size": 768, "intermediate_size": 3072, "num_attention_heads": 12, "projection_dim": 768}
    vision = {"hidden_size": 1024, "intermediate_size": 4096, "num_attention_heads": 16, "num_hidden_layers": 24}
    config = {
        "model_type": "clip",
        "projection_dim": 768,
        "text_config": text,
        "vision_config": {**vision, "patch_size": 14},
    }
    large = huggingface_config.to_preset(config, {"size": 224, "resample": 3}, "here")
    assert large == presets.preset("ViT-L/14-quickgelu") and large.preprocess == OPENAI

    preprocessor = {"size": {"height": 224, "width": 224}, "image_mean": HALF.mean, "image_std": HALF.std}
    siglip = huggingface_config.to_preset({"model_type": "siglip"}, {**preprocessor, "resample": 3}, "here")
    expected = presets.preset("ViT-B/16-SigLIP")
    # Transformers computes GELU by its tanh approximation, as the model was trained; OpenCLIP computes it exactly.
    towers = {
        name: dataclasses.replace(getattr(expected.architecture, name), activation="gelu_tanh")
        for name in ("image", "text")
    }
    assert siglip.architecture == dataclasses.replace(expected.architecture, **towers)
    assert siglip.preprocess == SIGLIP and siglip.tokenizer == "siglip"


def test_a_tower_of_timm_that_open_clip_does_not_have_is_refused():
    preset = presets.preset("ViT-B/16-SigLIP")
    image = dataclasses.replace(preset.architecture.image, activation="gelu_tanh")
    changed = preset._replace(architecture=dataclasses.replace(preset.architecture, image=image))
    with pytest.raises(UserError, match="vit_base_patch16_siglip_224 differs"):
        open_clip_config.from_preset(changed)
