"""Embeddings equal OpenCLIP's for every family of models, and weights come back bit for bit.

Needs the environment of ``tests/peers/make_env.sh``: its python writes seeded random models, whose biases, norms and
position embeddings are perturbed (they start at zero or one, where a mistake would not show), and their embeddings.
"""

import json
import os
import subprocess
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.numpy import load_file

from clip_jax.errors import UserError
from clip_jax.interop import open_clip
from clip_jax.models.clip import CLIP, Architecture
from clip_jax.models.text import TextTower
from clip_jax.models.vit import ImageTower

ROOT = Path(__file__).resolve().parents[2]
PEERS = Path(os.environ.get("CLIP_JAX_PEERS") or ROOT / ".venv-peers")

pytestmark = [
    pytest.mark.parity,
    pytest.mark.skipif(
        not (PEERS / ".complete").exists(),
        reason=f"no peers at {PEERS}: run tests/peers/make_env.sh DIR and set CLIP_JAX_PEERS=DIR",
    ),
]

PEER = """
import json, sys
from pathlib import Path
import torchvision_ops_stub  # before open_clip
import torch
from open_clip.model import CLIP, CustomTextCLIP
from safetensors.torch import save_file

folder = Path(sys.argv[1])
for name, cfg in json.loads((folder / "jobs.json").read_text()).items():
    torch.manual_seed(0)
    cfg = dict(cfg)
    model = (CustomTextCLIP if cfg.pop("custom_text", False) else CLIP)(**cfg).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim == 1:
                parameter += 0.3 * torch.randn_like(parameter)
            elif parameter.ndim > 1:
                parameter += 0.02 * torch.randn_like(parameter)
        size = cfg["vision_cfg"]["image_size"]
        image = torch.randn(3, 3, size, size)
        text = torch.randint(1, cfg["text_cfg"]["vocab_size"], (3, cfg["text_cfg"]["context_length"]))
        result = {
            "image": image.permute(0, 2, 3, 1).contiguous(),
            "text": text,
            "image_embedding": model.encode_image(image),
            "text_embedding": model.encode_text(text),
        }
    save_file(result, folder / f"{name}.results")
    save_file({k: v.contiguous() for k, v in model.state_dict().items()}, folder / f"{name}.safetensors")
"""


def towers(vision: dict, text: dict, embed_dim: int = 40, **more) -> dict:
    """An OpenCLIP configuration of a small model."""
    vision = {"image_size": 32, "patch_size": 8, "width": 64, "head_width": 32, "layers": 3, **vision}
    text = {"context_length": 12, "vocab_size": 100, "width": 48, "heads": 4, "layers": 2, **text}
    return {"embed_dim": embed_dim, "vision_cfg": vision, "text_cfg": text, **more}


IMAGE, TEXT = ImageTower(32, 8, 64, 3, 2, 256), TextTower(12, 100, 48, 2, 4, 192)

MODELS = {
    "vit": (towers({}, {}), Architecture(IMAGE, TEXT, 40)),
}


@pytest.fixture(scope="module")
def peers(tmp_path_factory) -> Path:
    """A folder with the weights, inputs and embeddings of every model."""
    folder = tmp_path_factory.mktemp("peers")
    (folder / "jobs.json").write_text(json.dumps({name: cfg for name, (cfg, _) in MODELS.items()}))
    command = [PEERS / "bin" / "python", "-c", PEER, folder]
    done = subprocess.run(command, capture_output=True, text=True, env=os.environ | {"HF_HUB_OFFLINE": "1"})
    assert done.returncode == 0, done.stderr[-3000:]
    return folder


def relative(ours, theirs) -> float:
    """The largest distance of two embeddings, relative to their norm."""
    difference = np.linalg.norm(np.asarray(ours) - theirs, axis=-1)
    return float(np.max(difference / np.linalg.norm(theirs, axis=-1)))


@pytest.mark.parametrize("name", MODELS)
def test_embeddings_equal_open_clip(name, peers):
    architecture = MODELS[name][1]
    given = load_file(peers / f"{name}.results")
    params = open_clip.to_params(load_file(peers / f"{name}.safetensors"), architecture)
    clip = CLIP(architecture)
    with jax.default_matmul_precision("highest"):
        image = clip.encode_image(params, jnp.asarray(given["image"]))
        text = clip.encode_text(params, jnp.asarray(given["text"], jnp.int32))
    assert relative(image, given["image_embedding"]) < 1e-5
    assert relative(text, given["text_embedding"]) < 1e-5


@pytest.mark.parametrize("name", MODELS)
def test_weights_come_back_bit_for_bit(name, peers):
    architecture = MODELS[name][1]
    state = load_file(peers / f"{name}.safetensors")
    back = open_clip.from_params(open_clip.to_params(state, architecture), architecture)
    assert back.keys() == state.keys()
    for tensor, value in state.items():
        assert back[tensor].dtype == value.dtype and back[tensor].shape == value.shape, tensor
        assert back[tensor].tobytes() == value.tobytes(), tensor


def test_every_tensor_is_accounted_for(peers):
    architecture = MODELS["vit"][1]
    state = load_file(peers / "vit.safetensors")
    with pytest.raises(UserError, match=r"^ln_final\.bias: missing from the weights"):
        open_clip.to_params({k: v for k, v in state.items() if k != "ln_final.bias"}, architecture)
    with pytest.raises(UserError, match=r"resblocks\.3\.ln_1\.bias: in the weights, but not"):
        open_clip.to_params(state | {"transformer.resblocks.3.ln_1.bias": np.zeros(48)}, architecture)
    wrong = state | {"visual.proj": state["visual.proj"].T}
    with pytest.raises(UserError, match=r"visual\.proj: has the shape \[40, 64\], this model's is \[64, 40\]"):
        open_clip.to_params(wrong, architecture)


def test_text_tensors_may_be_named_below_text(peers):
    architecture = MODELS["vit"][1]
    state = load_file(peers / "vit.safetensors")
    text = ("transformer.", "token_embedding.", "positional_embedding", "ln_final.", "text_projection")
    custom = {f"text.{k}" if k.startswith(text) else k: v for k, v in state.items()}
    jax.tree.map(
        np.testing.assert_array_equal,
        open_clip.to_params(custom, architecture),
        open_clip.to_params(state, architecture),
    )
