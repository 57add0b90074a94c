"""big_vision's npz of SigLIP, with one array per block or one for all: export and import change no bit."""

import dataclasses

import jax
import numpy as np
import pytest

import clip_jax
from clip_jax import commands, presets
from clip_jax.errors import UserError
from clip_jax.interop import files
from clip_jax.models.clip import Architecture
from clip_jax.models.text import TextTower
from clip_jax.presets import SIGLIP, Preset, siglip_image
from tests.interop import folders_of

TEXT = TextTower(
    8, 300, 48, 3, 4, 96, "gelu_tanh", causal=False, pooling="last", norm_epsilon=1e-6, projection_bias=True
)
PRESET = Preset(
    Architecture(siglip_image(32, 16, 64, 2, 2, 160, "gelu_tanh"), TEXT, 64, init_logit_bias=-10.0), SIGLIP, "siglip"
)


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """A SiglipModel folder exported to big_vision's format."""
    erf = dataclasses.replace(PRESET.architecture, text=dataclasses.replace(TEXT, activation="gelu"))
    monkeypatch.setitem(presets.PRESETS, "SigLIP-Test", PRESET._replace(architecture=erf))
    source = folders_of.hugging_face_folder(tmp_path / "theirs", PRESET)
    assert commands.main(["export", f"--model={source}", "--format=bigvision", f"--to={tmp_path / 'out'}"]) == 0
    return tmp_path / "out"


def test_names_and_shapes_are_big_visions(folder):
    state = files.read(folder / "model.npz")
    assert state.shape("params/img/embedding/kernel") == (16, 16, 3, 64)
    attention = "params/txt/Encoder_0/encoderblock_2/MultiHeadDotProductAttention_0"
    assert state.shape(f"{attention}/query/kernel") == (48, 4, 12)
    assert state.shape(f"{attention}/out/kernel") == (4, 12, 48)
    assert state.shape("params/img/MAPHead_0/probe") == (1, 1, 64) and state.shape("params/t") == (1,)


def test_export_and_import_change_nothing_with_big_visions_activation(folder):
    model = clip_jax.load("SigLIP-Test", weights=folder)
    assert model.preset.architecture == PRESET.architecture
    jax.tree.map(np.testing.assert_array_equal, model.params, folders_of.parameters(PRESET))


def test_blocks_may_be_stacked_next_to_the_state_of_an_optimizer(folder, tmp_path):
    state, stacked = dict(files.read(folder / "model.npz")), {"opt/0": np.zeros(3)}
    for name in state:
        if "encoderblock_0/" in name:
            count = 2 if "/img/" in name else 3
            every = [state[name.replace("block_0/", f"block_{i}/")] for i in range(count)]
            stacked[name.replace("encoderblock_0/", "encoderblock/")] = np.stack(every)
        elif "encoderblock_" not in name:
            stacked[name] = state[name]
    np.savez(tmp_path / "stacked.npz", **stacked)
    model = clip_jax.load("SigLIP-Test", weights=tmp_path / "stacked.npz")
    jax.tree.map(np.testing.assert_array_equal, model.params, folders_of.parameters(PRESET))


def test_a_folder_with_npz_alone_needs_a_name(folder):
    with pytest.raises(UserError, match="does not say which model it is"):
        clip_jax.load(folder)
