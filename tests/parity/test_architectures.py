"""Embeddings equal OpenCLIP's for every family of models, and weights come back bit for bit.

Needs the environment of ``tests/peers/make_env.sh``: its python writes seeded random models, whose biases, norms and
position embeddings are perturbed (they start at zero or one, where a mistake would not show), and their embeddings.
"""

import dataclasses
from collections.abc import Mapping
from pathlib import Path
from types import MappingProxyType
from typing import NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.numpy import load_file

from clip_jax import presets
from clip_jax.errors import UserError
from clip_jax.interop import open_clip
from clip_jax.interop.merge import merge
from clip_jax.models.clip import CLIP, Architecture, unit
from clip_jax.models.resnet import ResNetTower
from clip_jax.models.text import TextTower
from clip_jax.models.vit import ImageTower
from tests.parity.peers import MARKS, relative, run

pytestmark = MARKS

PEER = """
import functools, json, sys
from pathlib import Path
import torchvision_ops_stub  # before open_clip
import open_clip
import timm
import torch
from open_clip.model import CLIP, CustomTextCLIP, resize_pos_embed, resize_text_pos_embed
from safetensors.torch import save_file

folder = Path(sys.argv[1])
create = timm.create_model
for name, job in json.loads((folder / "jobs.json").read_text()).items():
    torch.manual_seed(0)
    if "named" in job:
        job["config"] = json.loads((Path(open_clip.__file__).parent / f"model_configs/{job['named']}.json").read_text())
        job["custom_text"] = job["config"].pop("custom_text", False)
    timm.create_model = functools.partial(create, **job["timm"])  # OpenCLIP passes no sizes on
    model = (CustomTextCLIP if job["custom_text"] else CLIP)(**job["config"]).eval()
    if "named" not in job:
        save_file({k: v.clone().contiguous() for k, v in model.state_dict().items()}, folder / f"{name}.fresh")
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim == 1:
                parameter += 0.3 * torch.randn_like(parameter)
            elif parameter.ndim > 1:
                parameter += 0.02 * torch.randn_like(parameter)
        for key, buffer in model.named_buffers():
            if key.endswith("running_mean"):
                buffer += 0.2 * torch.randn_like(buffer)
            if key.endswith("running_var"):
                buffer *= 0.5 + torch.rand_like(buffer)
        size = job["config"]["vision_cfg"]["image_size"]
        text_cfg = job["config"]["text_cfg"]
        image = torch.randn(3, 3, size, size)
        text = torch.randint(1, text_cfg["vocab_size"], (3, text_cfg["context_length"]))
        tokens = {}
        if job["tokens"]:  # after the last block but one
            model.visual.transformer.resblocks[-2].register_forward_hook(lambda *a: tokens.update(image_tokens=a[2]))
            model.transformer.resblocks[-2].register_forward_hook(lambda *a: tokens.update(text_tokens=a[2]))
        result = {
            "image": image.permute(0, 2, 3, 1).contiguous(),
            "text": text,
            "image_embedding": model.encode_image(image),
            "text_embedding": model.encode_text(text),
            **tokens,
        }
        save_file({k: v.contiguous() for k, v in model.state_dict().items()}, folder / f"{name}.safetensors")
        if job["resize"]:  # the same weights in a model of other sizes, where OpenCLIP resamples them
            other = json.loads(json.dumps(job["config"]))
            other["vision_cfg"]["image_size"], other["text_cfg"]["context_length"] = job["resize"]
            state = model.state_dict()
            resized = CLIP(**other).eval()
            resize_pos_embed(state, resized)
            resize_text_pos_embed(state, resized)
            resized.load_state_dict(state)
            image = torch.randn(3, 3, job["resize"][0], job["resize"][0])
            text = torch.randint(1, text_cfg["vocab_size"], (3, job["resize"][1]))
            result["resized_image"] = image.permute(0, 2, 3, 1)
            result["resized_text"] = text
            result["resized_image_embedding"] = resized.encode_image(image)
            result["resized_text_embedding"] = resized.encode_text(text)
        if job["train"]:
            result["train_embedding"] = model.train().encode_image(image)
            statistics = {k: v for k, v in model.state_dict().items() if "running" in k}
            save_file(statistics, folder / f"{name}.statistics")
    save_file({k: v.detach().contiguous() for k, v in result.items()}, folder / f"{name}.results")
"""


class Model(NamedTuple):
    """The same small model, as OpenCLIP's configuration and as our architecture."""

    config: dict
    architecture: Architecture
    custom_text: bool = False
    timm: Mapping = MappingProxyType({})
    """Sizes that replace those of the named timm model."""


def towers(vision: dict, text: dict, embed_dim: int = 40, **more) -> dict:
    """An OpenCLIP configuration of a small model."""
    text = {"context_length": 12, "vocab_size": 100, "width": 48, "heads": 4, "layers": 2, **text}
    return {"embed_dim": embed_dim, "vision_cfg": {"image_size": 32, **vision}, "text_cfg": text, **more}


VISION = {"patch_size": 8, "width": 64, "head_width": 32, "layers": 3}
IMAGE, TEXT = ImageTower(32, 8, 64, 3, 2, 256), TextTower(12, 100, 48, 2, 4, 192)

SIGLIP_TEXT = {"no_causal_mask": True, "pool_type": "last", "proj_bias": True, "norm_kwargs": {"eps": 1e-6}}
OUR_SIGLIP_TEXT = {"causal": False, "pooling": "last", "projection_bias": True, "norm_epsilon": 1e-6}
EVA = {"timm_pool": "token", "timm_proj": None}


def siglip(name: str, size: int, patch: int, width: int, heads: int, mlp: int, image: str, text: str, **text_cfg):
    """SigLIP with the timm tower's own width and two of its layers."""
    text_cfg = {**SIGLIP_TEXT, "width": width, "heads": heads, "mlp_ratio": mlp / width, **text_cfg}
    if text == "gelu_tanh":
        text_cfg["act_kwargs"] = {"approximate": "tanh"}
    ours = presets.siglip_image(size, patch, width, 2, heads, mlp, image)
    tower = TextTower(12, 100, width, 2, heads, int(width * (mlp / width)), text, **OUR_SIGLIP_TEXT)
    if text_cfg.get("proj_type") == "none":
        tower = dataclasses.replace(tower, projection=False, projection_bias=False)
    config = {"timm_model_name": name, "timm_pool": "map", "timm_proj": "none", "image_size": size}
    architecture = Architecture(ours, tower, width, init_logit_bias=-10.0)
    return Model(towers(config, text_cfg, width, init_logit_bias=-10.0), architecture, True, {"depth": 2})


def eva(name: str, size: int, patch: int, width: int, mlp: int, **small):
    enormous = "enormous" in name
    ours = presets.eva_image(size, patch, width, 2, small["num_heads"], mlp, enormous=enormous)
    config = {**EVA, "timm_model_name": name, "image_size": size}
    return Model(towers(config, {}), Architecture(ours, TEXT, 40), True, {"depth": 2, "img_size": size, **small})


MODELS = {
    "vit": Model(towers(VISION, {}), Architecture(IMAGE, TEXT, 40)),
    "vit_quickgelu": Model(
        towers(VISION, {}, quick_gelu=True),
        Architecture(
            dataclasses.replace(IMAGE, activation="quick_gelu"),
            dataclasses.replace(TEXT, activation="quick_gelu"),
            40,
        ),
    ),
    "vit_g": Model(
        towers({**VISION, "head_width": 16, "mlp_ratio": 4.3637}, {"mlp_ratio": 4.3637}),
        Architecture(dataclasses.replace(IMAGE, heads=4, mlp_width=279), dataclasses.replace(TEXT, mlp_width=209), 40),
    ),
    "layer_scale": Model(
        towers({**VISION, "ls_init_value": 0.1}, {}),
        Architecture(dataclasses.replace(IMAGE, layer_scale=0.1), TEXT, 40),
    ),
    "clipa": Model(
        towers(
            {**VISION, "no_ln_pre": True, "pool_type": "avg", "final_ln_after_pool": True},
            {"pool_type": "last", "no_causal_mask": True},
        ),
        Architecture(
            dataclasses.replace(IMAGE, norm_pre=False, pooling="average"),
            dataclasses.replace(TEXT, causal=False, pooling="last"),
            40,
        ),
    ),
    "averaged": Model(
        towers({**VISION, "pool_type": "avg"}, {"pool_type": "eos", "eos_id": 7}),
        Architecture(
            dataclasses.replace(IMAGE, pooling="average", norm_before_pooling=True),
            dataclasses.replace(TEXT, pooling="eos", eos_id=7),
            40,
        ),
    ),
    "siglip_b32": siglip("vit_base_patch32_siglip_256", 256, 32, 768, 12, 3072, "gelu_tanh", "gelu_tanh"),
    "siglip_b16": siglip("vit_base_patch16_siglip_224", 224, 16, 768, 12, 3072, "gelu", "gelu"),
    "siglip_so400m": siglip("vit_so400m_patch14_siglip_224", 224, 14, 1152, 16, 4304, "gelu", "gelu_tanh"),
    "siglip_cut_off": siglip("vit_so400m_patch14_siglip_384", 384, 14, 1152, 16, 4304, "gelu", "gelu"),
    "siglip_i18n": siglip(
        "vit_so400m_patch16_siglip_256", 256, 16, 1152, 16, 4304, "gelu_tanh", "gelu", proj_type="none", proj_bias=False
    ),
    "rn": Model(
        towers({"layers": [2, 1, 3, 2], "width": 32, "image_size": 64}, {}),
        Architecture(ResNetTower(64, (2, 1, 3, 2), 32, 16), TEXT, 40),
    ),
    "eva_b16": eva("eva02_base_patch16_clip_224", 80, 16, 96, 256, embed_dim=96, num_heads=3),
    "eva_l14_336": eva("eva02_large_patch14_clip_336", 336, 14, 64, 170, embed_dim=64, num_heads=2),
    "eva_e14": eva("eva02_enormous_patch14_clip_224", 56, 14, 64, 548, embed_dim=64, num_heads=2),
}

# Models that are also loaded at another image size and text length.
RESIZED = {"vit": (56, 20), "clipa": (24, 8)}


@pytest.fixture(scope="module")
def peers(tmp_path_factory) -> Path:
    """A folder with the weights, inputs and embeddings of every model."""
    return run(
        PEER,
        tmp_path_factory.mktemp("peers"),
        {
            name: {"config": m.config, "custom_text": m.custom_text, "timm": dict(m.timm), "train": name == "rn"}
            | {"resize": RESIZED.get(name), "tokens": name == "vit"}
            for name, m in MODELS.items()
        },
    )


@pytest.mark.parametrize("name", MODELS)
def test_embeddings_equal_open_clip(name, peers):
    compare(name, MODELS[name].architecture, peers)


def compare(name: str, architecture: Architecture, folder: Path) -> None:
    given = load_file(folder / f"{name}.results")
    state = load_file(folder / f"{name}.safetensors")
    params, batch_stats = open_clip.to_params(state, architecture), open_clip.to_batch_stats(state, architecture)
    clip = CLIP(architecture)
    image = clip.encode_image(params, jnp.asarray(given["image"]), batch_stats)
    text = clip.encode_text(params, jnp.asarray(given["text"], jnp.int32))
    assert relative(image, given["image_embedding"]) < 1e-5
    assert relative(text, given["text_embedding"]) < 1e-5


OTHERS = ("ViT-L-14-CLIPA", "ViT-B-16-SigLIP", "ViT-B-32-SigLIP2-256", "RN50", "EVA02-B-16")
"""Their layers are those of the others; ``test_embeddings_equal_open_clip`` compares what is their own."""


@pytest.mark.slow
@pytest.mark.parametrize(
    "name",
    ["ViT-B-32", *(pytest.param(name, marks=pytest.mark.exhaustive) for name in OTHERS)],
)
def test_a_whole_model_by_name_equals_open_clip(name, tmp_path):
    """One of each family at its full depth and width, built from the name alone on both sides."""
    job = {"named": name, "timm": {}, "train": False, "resize": None, "tokens": False}
    folder = run(PEER, tmp_path, {name: job})
    compare(name, presets.preset(name).architecture, folder)


@pytest.mark.parametrize("name", MODELS)
def test_weights_come_back_bit_for_bit(name, peers):
    architecture = MODELS[name].architecture
    state = load_file(peers / f"{name}.safetensors")
    params, batch_stats = open_clip.to_params(state, architecture), open_clip.to_batch_stats(state, architecture)
    back = open_clip.from_params(params, architecture, batch_stats)
    assert back.keys() == state.keys()
    for tensor, value in state.items():
        assert back[tensor].dtype == value.dtype and back[tensor].shape == value.shape, tensor
        assert back[tensor].tobytes() == value.tobytes(), tensor


@pytest.mark.parametrize(
    "name",
    [
        *("vit", "layer_scale", "clipa", "siglip_b16"),
        *(pytest.param(name, marks=pytest.mark.exhaustive) for name in ("rn", "eva_b16", "eva_e14", "siglip_so400m")),
    ],
)
def test_a_fresh_model_is_distributed_as_open_clips(name, peers):
    """Mean, deviation and range of every tensor, within five standard errors of a sample of its size."""
    clip = CLIP(MODELS[name].architecture)
    params = nn.meta.unbox(clip.init(jax.random.key(0)))
    ours = open_clip.from_params(params, clip.architecture, clip.init_batch_stats())
    for tensor, theirs in load_file(peers / f"{name}.fresh").items():
        fresh, size, deviation = ours[tensor], theirs.size, np.std(theirs)
        if deviation == 0:
            np.testing.assert_array_equal(fresh, theirs, err_msg=tensor)
            continue
        assert abs(np.mean(fresh) - np.mean(theirs)) < 5 * deviation * (2 / size) ** 0.5, tensor
        assert np.std(fresh) == pytest.approx(deviation, rel=max(0.01, 5 / size**0.5)), tensor
        if size > 1000:
            # In this quantile uniform and normal samples differ by a half. Not the largest value: PyTorch's truncated
            # normal turns a uniform sample of exactly one into its cut-off, 2, once in some million.
            ours_far, theirs_far = (np.quantile(np.abs(sample), 0.995) for sample in (fresh, theirs))
            assert ours_far == pytest.approx(theirs_far, rel=0.25), tensor


def test_every_tensor_is_accounted_for(peers):
    architecture = MODELS["vit"].architecture
    state = load_file(peers / "vit.safetensors")
    with pytest.raises(UserError, match=r"^ln_final\.bias: missing from the weights"):
        open_clip.to_params({k: v for k, v in state.items() if k != "ln_final.bias"}, architecture)
    with pytest.raises(UserError, match=r"resblocks\.3\.ln_1\.bias: in the weights, but not"):
        open_clip.to_params(state | {"transformer.resblocks.3.ln_1.bias": np.zeros(48)}, architecture)
    wrong = state | {"visual.proj": state["visual.proj"].T}
    with pytest.raises(UserError, match=r"visual\.proj: has the shape \[40, 64\], this model's is \[64, 40\]"):
        open_clip.to_params(wrong, architecture)


def test_text_tensors_may_be_named_below_text(peers):
    architecture = MODELS["vit"].architecture
    state = load_file(peers / "vit.safetensors")
    text = ("transformer.", "token_embedding.", "positional_embedding", "ln_final.", "text_projection")
    custom = {f"text.{k}" if k.startswith(text) else k: v for k, v in state.items()}
    jax.tree.map(
        np.testing.assert_array_equal,
        open_clip.to_params(custom, architecture),
        open_clip.to_params(state, architecture),
    )


def test_batch_norm_in_training_equals_open_clip(peers):
    """The embedding of one batch, and the running statistics after it."""
    architecture = MODELS["rn"].architecture
    state, given = load_file(peers / "rn.safetensors"), load_file(peers / "rn.results")
    params, batch_stats = open_clip.to_params(state, architecture), open_clip.to_batch_stats(state, architecture)
    image, text = jnp.asarray(given["image"]), jnp.asarray(given["text"], jnp.int32)
    outputs = CLIP(architecture).forward(params, batch_stats, {"image": image, "text": text}, train=True)
    assert relative(outputs.image, np.asarray(unit(given["train_embedding"]))) < 1e-5
    expected = load_file(peers / "rn.statistics")
    back = open_clip.from_params(params, architecture, outputs.batch_stats)
    for name, value in expected.items():
        np.testing.assert_allclose(back[name], value, rtol=1e-4, atol=1e-5, err_msg=name)
        assert not np.allclose(value, state[name], rtol=1e-3), name


@pytest.mark.parametrize("name", RESIZED)
def test_other_sizes_equal_open_clip(name, peers):
    """Larger and smaller: position embeddings are resampled as OpenCLIP resamples them on loading."""
    given = load_file(peers / f"{name}.results")
    architecture = MODELS[name].architecture
    params = open_clip.to_params(load_file(peers / f"{name}.safetensors"), architecture)
    size, length = RESIZED[name]
    clip = CLIP(
        dataclasses.replace(
            architecture,
            image=dataclasses.replace(architecture.image, image_size=size),
            text=dataclasses.replace(architecture.text, context_length=length),
        )
    )
    params, report = merge(nn.meta.unbox(jax.eval_shape(clip.init, jax.random.key(0))), params)
    assert report.resized == ("image/position_embedding", "text/position_embedding")
    image = clip.encode_image(params, jnp.asarray(given["resized_image"]))
    text = clip.encode_text(params, jnp.asarray(given["resized_text"], jnp.int32))
    assert relative(image, given["resized_image_embedding"]) < 1e-5
    assert relative(text, given["resized_text_embedding"]) < 1e-5


def test_tokens_of_the_last_block_but_one_equal_open_clip(peers):
    given, architecture = load_file(peers / "vit.results"), MODELS["vit"].architecture
    params = open_clip.to_params(load_file(peers / "vit.safetensors"), architecture)
    image = CLIP(architecture).image_tokens(params, jnp.asarray(given["image"]), -2)
    text = CLIP(architecture).text_tokens(params, jnp.asarray(given["text"], jnp.int32), -2)
    assert relative(image, given["image_tokens"]) < 1e-5
    assert relative(text, given["text_tokens"]) < 1e-5
