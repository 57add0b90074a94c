"""What is not a model says what it is, and the way out."""

import json
import re

import pytest

import clip_jax
from clip_jax import commands
from clip_jax.errors import UserError
from clip_jax.interop import files, huggingface_config, open_clip_config
from tests.interop import folders_of
from tests.interop.folders_of import PRESET


@pytest.mark.parametrize(
    ("made", "message"),
    [
        ({"adapter_config.json": '{"base_model_name_or_path": "org/clip"}'}, "a LoRA adapter for org/clip.*merge_and_"),
        ({".metadata": "", "__0_0.distcp": ""}, "a distributed checkpoint of PyTorch.*dcp_to_torch .*clip-jax import"),
        ({"model_index.json": "{}"}, "a pipeline of diffusers"),
        ({"config.json": "{}", "flax_model.msgpack": ""}, "weights for Flax alone"),
        ({"weights.safetensors": ""}, r"holds weights.safetensors, .*load\(\"ViT-B/32\", weights="),
        ({"notes.txt": ""}, "neither a run folder nor one of weights"),
    ],
)
def test_a_folder_that_is_no_model_says_what_it_is(tmp_path, made, message):
    for name, text in made.items():
        (tmp_path / name).write_text(text)
    with pytest.raises(UserError, match=message) as caught:
        clip_jax.load(tmp_path)
    assert "\n" not in str(caught.value)


def test_a_variant_of_the_weights_is_read_where_it_is_the_only_one(tmp_path):
    folder = folders_of.hugging_face_folder(tmp_path)
    (folder / "model.safetensors").rename(folder / "model.fp16.safetensors")
    assert clip_jax.load(folder).preset == PRESET


def test_a_repositorys_name_is_not_a_folder(tmp_path):
    with pytest.raises(UserError, match=re.escape("hf://openai/clip-vit-base-patch32")):
        clip_jax.load("openai/clip-vit-base-patch32")
    with pytest.raises(UserError, match=r"a web page; load its repository as hf://openai/clip-vit-base-patch32$"):
        clip_jax.load("https://huggingface.co/openai/clip-vit-base-patch32/tree/main")
    with pytest.raises(UserError, match=r"ViT-B/33: no such folder; .*nearest: ViT-B/32"):
        clip_jax.load("ViT-B/33")


@pytest.mark.parametrize("name", ["CLIPForImageClassification", "CLIPVisionModelWithProjection"])
def test_a_model_of_one_tower_is_called_by_its_name(name):
    with pytest.raises(UserError, match=f"here: {name} is not CLIPModel"):
        huggingface_config.to_preset({"model_type": "clip", "architectures": [name]}, None, "here")


@pytest.mark.parametrize("name", ["convnext_base", "swin_base_patch4_window7_224", "vitamin_base_224", "fastvit_mci0"])
def test_a_tower_of_timm_that_is_not_built_is_called_by_its_name(name):
    """ConvNeXt, Swin, ViTamin, MobileCLIP-S, with settings of their own that come first."""
    vision = {"timm_model_name": name, "timm_pool": "", "timm_proj": "linear", "timm_drop": 0.0, "image_size": 224}
    config = {"model_cfg": {"embed_dim": 512, "vision_cfg": vision, "text_cfg": {}}}
    with pytest.raises(UserError, match=f"the image tower is timm's {name}"):
        open_clip_config.to_preset(config, "here")
    config["model_cfg"] |= {"vision_cfg": {}, "text_cfg": {"hf_model_name": "xlm-roberta-base"}}
    with pytest.raises(UserError, match="the text tower is Transformers' xlm-roberta-base"):
        open_clip_config.to_preset(config, "here")


def test_names_that_fit_no_layout_are_shown(tmp_path):
    files.write_safetensors(tmp_path / "model.safetensors", {"encoder.weight": folders_of.parameters()["logit_scale"]})
    with pytest.raises(UserError, match=r"its tensors have neither .*; the first of 1: encoder\.weight"):
        clip_jax.load("ViT-B/32", weights=tmp_path / "model.safetensors")


def test_a_path_may_begin_with_the_home_folder(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.chdir(tmp_path)
    folders_of.hugging_face_folder(tmp_path / "theirs")
    assert clip_jax.load("~/theirs").preset == PRESET
    assert commands.main(["export", "--model=~/theirs", "--format=huggingface", "--to=~/ours"]) == 0
    assert json.loads((tmp_path / "ours" / "config.json").read_text())["model_type"] == "clip"
    assert not (tmp_path / "~").exists()
