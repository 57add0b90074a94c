"""``clip-jax import`` and ``clip-jax export``: weights travel unchanged, and each line printed is true."""

import json
import re

import flax.linen as nn
import jax
import numpy as np
import pytest

import clip_jax
from clip_jax import commands, presets
from clip_jax.interop import files, open_clip, openai
from clip_jax.interop.export import export
from clip_jax.interop.tensors import Entry, Tensors
from clip_jax.models.clip import CLIP, Architecture
from clip_jax.models.resnet import ResNetTower
from clip_jax.models.text import TextTower
from clip_jax.presets import Preset
from tests.interop import folders_of, pickles, test_memory
from tests.interop.folders_of import PRESET


def state():
    return open_clip.from_params(folders_of.parameters(), PRESET.architecture)


def torch_state(arrays):
    return {name: pickles.tensor(x) for name, x in arrays.items()}


def same(folder, arrays, name="open_clip_model.safetensors"):
    read = files.read(folder / name)
    assert set(read) == set(arrays)
    for name, array in arrays.items():
        assert read[name].tobytes() == array.tobytes() and read.shape(name) == array.shape


@pytest.mark.parametrize("layout", ["openclip", "huggingface"])
def test_export_and_load_give_the_same_weights_bit_for_bit(tmp_path, capsys, layout):
    folder, to = folders_of.open_clip_folder(tmp_path / "a model"), tmp_path / "out"
    assert commands.main(["export", f"--model={folder}", f"--format={layout}", f"--to={to}"]) == 0
    model = clip_jax.load(to)
    assert model.preset == PRESET
    jax.tree.map(np.testing.assert_array_equal, model.params, folders_of.parameters())
    card = (to / "README.md").read_text()
    assert "# a model" in card and "32 x 32 pixels" in card
    assert str(to) in capsys.readouterr().out


def test_export_says_what_the_format_cannot_hold(small_run, tmp_path, capsys):
    to = tmp_path / "out"
    assert commands.main(["export", f"--model={small_run}", "--format=openclip", f"--to={to}"]) == 0
    assert "hf_tokenizer_name" in capsys.readouterr().out
    assert commands.main(["export", f"--model={small_run}", "--format=bigvision", f"--to={tmp_path / 'bv'}"]) == 2
    error = capsys.readouterr().err
    assert "SigLIP" in error and not (tmp_path / "bv").exists()
    assert commands.main(["export", f"--model={small_run}", "--format=openclip", f"--to={to}"]) == 2
    assert "not empty" in capsys.readouterr().err


def test_export_says_where_other_libraries_will_see_other_images_or_texts(tmp_path):
    weights = {"name": "m", "params": folders_of.parameters(), "batch_stats": {}, "tokenizer": None, "source": tmp_path}
    turned = PRESET._replace(preprocess=PRESET.preprocess._replace(exif=True))
    siglip = PRESET._replace(tokenizer="siglip2")
    for number, (preset, expected) in enumerate(((PRESET, ""), (turned, "exif_orientation: "), (siglip, "texts: "))):
        said = export(tmp_path / str(number), "openclip", preset=preset, **weights)
        assert [line for line in said if line.startswith(("exif_orientation: ", "texts: "))] == [
            line for line in said if expected and line.startswith(expected)
        ]
        assert bool(expected) == any(expected and line.startswith(expected) for line in said)
    assert "Pixels: turned by their EXIF orientation, resized" in (tmp_path / "1" / "README.md").read_text()


def test_a_torchscript_archive_of_openai_becomes_a_folder_that_loads(tmp_path, capsys):
    arrays = {name: x.astype(np.float16) for name, x in state().items()}
    # Heads have 64 features in OpenAI's models; this one's text tower has 32 in all.
    arrays |= {"input_resolution": np.array(32, np.int64), "vocab_size": np.array(49408, np.int64)}
    path = pickles.write_torchscript(tmp_path / "ViT-B-32.pt", arrays)
    to = tmp_path / "out"
    assert commands.main(["import", str(path), f"--to={to}"]) == 0
    assert "an archive of OpenAI's" in capsys.readouterr().out
    same(to, {name: x for name, x in arrays.items() if name not in open_clip.IGNORED})
    config = json.loads((to / "open_clip_config.json").read_text())["model_cfg"]
    assert config["quick_gelu"] and config["vision_cfg"]["layers"] == 2 and config["vision_cfg"]["image_size"] == 32


def trees(preset):
    """Parameters and running statistics, all different numbers."""
    clip = CLIP(preset.architecture)
    shapes = jax.eval_shape(lambda: (nn.meta.unbox(clip.init(jax.random.key(0))), clip.init_batch_stats()))
    return jax.tree.map(lambda x: np.arange(x.size, dtype=np.float32).reshape(x.shape), shapes)


def test_an_archive_of_openais_resnets_says_which_model_it_is(tmp_path, capsys):
    image, text = ResNetTower(64, (1, 2, 1, 3), 16, 8), TextTower(77, 300, 64, 2, 1, 256, activation="quick_gelu")
    preset = Preset(Architecture(image, text, 24), presets.OPENAI, "clip")
    params, statistics = trees(preset)
    arrays = open_clip.from_params(params, preset.architecture, statistics)
    path, to = pickles.write_torchscript(tmp_path / "RN.pt", arrays), tmp_path / "out"
    assert commands.main(["import", str(path), f"--to={to}"]) == 0
    assert "by its shapes a ResNet of [1, 2, 1, 3] blocks" in capsys.readouterr().out
    model = clip_jax.load(to)
    assert model.preset == preset
    jax.tree.map(np.testing.assert_array_equal, (model.params, model.batch_stats), (params, statistics))


@pytest.mark.parametrize("name", ["RN50-quickgelu", "ViT-B/32-quickgelu", "ViT-L/14-336-quickgelu"])
def test_openais_models_are_known_by_their_shapes(name):
    preset = presets.preset(name)
    if name.startswith("RN"):
        params, statistics = trees(preset)
        shapes = {key: x.shape for key, x in open_clip.from_params(params, preset.architecture, statistics).items()}
    else:
        shapes = test_memory.tensors(preset)
    state = Tensors("here", {key: Entry(shape, np.dtype(np.float32), None) for key, shape in shapes.items()})
    assert openai.preset(state) == preset


def test_a_bin_beside_its_config_is_imported_with_the_folder(tmp_path):
    folder, to = folders_of.hugging_face_folder(tmp_path / "theirs"), tmp_path / "out"
    arrays = dict(files.read(folder / "model.safetensors"))
    pickles.write(folder / "pytorch_model.bin", torch_state(arrays))
    (folder / "model.safetensors").unlink()
    assert commands.main(["import", str(folder), f"--to={to}"]) == 0
    same(to, arrays, "model.safetensors")
    assert clip_jax.load(to).preset == PRESET


def test_a_file_that_does_not_say_its_model_needs_the_name(tmp_path, capsys, monkeypatch):
    path, to = pickles.write(tmp_path / "epoch_1.pt", {"state_dict": torch_state(state())}), tmp_path / "out"
    assert commands.main(["import", str(path), f"--to={to}"]) == 2
    assert "--model=NAME" in capsys.readouterr().err and not to.exists()
    monkeypatch.setitem(clip_jax.presets.PRESETS, "ViT-Test/16", PRESET)
    assert commands.main(["import", str(path), f"--to={to}", "--model=ViT-Test/16"]) == 0
    same(to, state())
    assert clip_jax.load(to).preset == PRESET


def test_import_of_a_pickle_that_would_run_code_ends_in_one_line(tmp_path, capsys):
    canary = tmp_path / "canary"
    path = pickles.write(tmp_path / "model.pt", {"a": pickles.Call("os", "system", f"touch '{canary}'")})
    assert commands.main(["import", str(path), f"--to={tmp_path / 'out'}"]) == 2
    error = capsys.readouterr().err
    assert re.search(r"refused.*os\.system", error) and error.count("\n") == 1
    assert not canary.exists() and not (tmp_path / "out").exists()
