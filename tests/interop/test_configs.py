"""Every preset can be written as the config of a library that has it, and comes back as it was."""

import dataclasses
import json

import pytest

from clip_jax import presets
from clip_jax.errors import UserError
from clip_jax.interop import huggingface_config, open_clip_config

NAMES = [name for name, preset in presets.PRESETS.items() if preset.tokenizer != "sentencepiece"]


@pytest.mark.parametrize("name", NAMES)
def test_open_clips_config_holds_every_preset(name):
    preset = presets.preset(name)
    config = json.loads(json.dumps(open_clip_config.from_preset(preset)))
    assert open_clip_config.to_preset(config, "here") == preset


@pytest.mark.parametrize("name", NAMES)
def test_transformers_config_holds_the_presets_that_it_builds(name):
    preset = presets.preset(name)
    if name.startswith(("ViT-B/32", "ViT-L/14", "ViT-H/14", "ViT-B/16-SigLIP", "ViT-gopt")) and "CLIPA" not in name:
        config, preprocessor = json.loads(json.dumps(huggingface_config.from_preset(preset)))
        back = huggingface_config.to_preset(config, preprocessor, "here")
        assert back == preset
    elif name.startswith(("RN", "EVA")) or "CLIPA" in name or "SO400M/16-SigLIP-i18n" in name:
        with pytest.raises(UserError, match="neither Transformers"):
            huggingface_config.from_preset(preset)


def test_a_tower_of_timm_that_open_clip_does_not_have_is_refused():
    preset = presets.preset("ViT-B/16-SigLIP")
    image = dataclasses.replace(preset.architecture.image, activation="gelu_tanh")
    changed = preset._replace(architecture=dataclasses.replace(preset.architecture, image=image))
    with pytest.raises(UserError, match="vit_base_patch16_siglip_224 differs"):
        open_clip_config.from_preset(changed)
