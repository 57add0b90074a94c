"""``hf://org/name``: found in the cache without a network, downloaded without its pickles, imported with them."""

import json
import shutil
from fnmatch import fnmatch

import jax
import numpy as np
import pytest
from huggingface_hub import constants

import clip_jax
from clip_jax import commands
from clip_jax.errors import UserError
from clip_jax.interop import files, folders
from tests import hub
from tests.interop import folders_of, pickles
from tests.interop.folders_of import PRESET


@pytest.fixture
def cache(tmp_path, monkeypatch):
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


def pickled(folder):
    """A Transformers folder whose weights are a .bin alone."""
    folders_of.hugging_face_folder(folder)
    state = dict(files.read(folder / "model.safetensors"))
    pickles.write(folder / "pytorch_model.bin", {name: pickles.tensor(x) for name, x in state.items()})
    (folder / "model.safetensors").unlink()
    return folder


@pytest.mark.parametrize("make", [folders_of.open_clip_folder, folders_of.hugging_face_folder])
def test_a_repository_in_the_cache_is_loaded_without_a_network(cache, tmp_path, make):
    hub.publish(cache, "somebody/a-model", make(tmp_path / "theirs"))
    model = clip_jax.load("hf://somebody/a-model")
    assert model.preset == PRESET
    jax.tree.map(np.testing.assert_array_equal, model.params, folders_of.parameters())


def test_a_repository_that_is_not_there_is_one_line_that_says_what_to_do(cache):
    with pytest.raises(UserError, match=r"^hf://somebody/a-model: not in the Hugging Face cache.*copy the folder") as e:
        clip_jax.load("hf://somebody/a-model")
    assert "\n" not in str(e.value)


def test_a_repository_of_pickles_names_the_command_which_imports_it(cache, tmp_path, capsys):
    hub.publish(cache, "somebody/a-model", pickled(tmp_path / "theirs"))
    with pytest.raises(UserError, match=r"`clip-jax import hf://somebody/a-model --to=DIR`"):
        clip_jax.load("hf://somebody/a-model")
    assert commands.main(["import", "hf://somebody/a-model", f"--to={tmp_path / 'out'}"]) == 0
    jax.tree.map(np.testing.assert_array_equal, clip_jax.load(tmp_path / "out").params, folders_of.parameters())


@pytest.mark.parametrize(
    ("there", "pickles_too", "weights"),
    [
        (("open_clip_config.json", "open_clip_model.safetensors"), False, {"open_clip_model.safetensors"}),
        ((), False, {"model.safetensors"}),
        (("open_clip_config.json",), False, {"model.safetensors"}),  # OpenCLIP's weights are a pickle there
        (("open_clip_config.json", "open_clip_model.safetensors"), True, {"pytorch_model.bin"}),
        (
            ("run.json", "checkpoints/12/d.bin"),
            False,
            {"model.safetensors", "pytorch_model.bin", "d.bin"},
        ),  # a run: all
    ],
)
def test_weights_are_downloaded_once_and_pickles_for_the_import_alone(
    monkeypatch, tmp_path, there, pickles_too, weights
):
    """LAION's repositories have OpenCLIP's and Transformers' files, each as safetensors and as a pickle."""
    repository = ["config.json", "merges.txt", "model.safetensors", "pytorch_model.bin", *there]

    def download(name, allow_patterns):
        for file in repository:
            if any(fnmatch(file, pattern) for pattern in allow_patterns):
                (tmp_path / file).parent.mkdir(parents=True, exist_ok=True)
                (tmp_path / file).touch()
        return str(tmp_path)

    monkeypatch.setattr("huggingface_hub.snapshot_download", download)
    assert folders.local("hf://somebody/a-model", pickles=pickles_too) == tmp_path
    found = {path.name for path in tmp_path.rglob("*")}
    assert {name for name in found if name.endswith((".safetensors", ".bin"))} == weights
    assert {"config.json", "merges.txt"} <= found


def test_shards_of_safetensors_are_a_folder_like_any_other(tmp_path):
    folder = folders_of.hugging_face_folder(tmp_path)
    state = dict(files.read(folder / "model.safetensors"))
    (folder / "model.safetensors").unlink()
    write_shards(folder, state, "model-{}.safetensors", files.write_safetensors)
    jax.tree.map(np.testing.assert_array_equal, clip_jax.load(folder).params, folders_of.parameters())


def test_shards_of_pickles_are_imported_into_one_file(tmp_path):
    folder = folders_of.hugging_face_folder(tmp_path / "theirs")
    state = dict(files.read(folder / "model.safetensors"))
    (folder / "model.safetensors").unlink()

    def write(path, arrays):
        pickles.write(path, {name: pickles.tensor(x) for name, x in arrays.items()})

    write_shards(folder, state, "pytorch_model-{}.bin", write)
    with pytest.raises(UserError, match=r"pytorch_model\.bin\.index\.json: a pickle.*clip-jax import"):
        clip_jax.load(folder)
    with pytest.raises(UserError, match="a pickle, which is never opened here"):
        clip_jax.load("ViT-B/32", weights=folder / "pytorch_model.bin.index.json")
    assert commands.main(["import", str(folder), f"--to={tmp_path / 'out'}"]) == 0
    jax.tree.map(np.testing.assert_array_equal, clip_jax.load(tmp_path / "out").params, folders_of.parameters())
    shutil.copy(folder / "pytorch_model-1.bin", folder / "pytorch_model-2.bin")
    assert commands.main(["import", str(folder), f"--to={tmp_path / 'again'}"]) == 2


def write_shards(folder, state, pattern, write):
    """Two files and their index."""
    names, file_of = sorted(state), {}
    for number, part in ((1, names[::2]), (2, names[1::2])):
        write(folder / pattern.format(number), {name: state[name] for name in part})
        file_of |= dict.fromkeys(part, pattern.format(number))
    index = pattern.replace("-{}", "") + files.INDEX
    (folder / index).write_text(json.dumps({"metadata": {}, "weight_map": file_of}))
