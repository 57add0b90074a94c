"""``clip_jax.load``: anybody's folder, or a name with weights, becomes a model that says what it read."""

import json
import shutil

import jax
import numpy as np
import pytest

import clip_jax
from clip_jax import presets
from clip_jax.devices import sharding
from clip_jax.errors import UserError
from clip_jax.interop import files
from tests.interop import folders_of, pickles
from tests.interop.folders_of import PRESET


def tokens():
    return np.random.default_rng(0).integers(0, 49408, (3, 77)).astype(np.int32)


def same_params(model, seed=0):
    expected = folders_of.parameters(PRESET, seed)
    assert jax.tree.structure(model.params) == jax.tree.structure(expected)
    jax.tree.map(np.testing.assert_array_equal, model.params, expected)


@pytest.mark.parametrize("make", [folders_of.open_clip_folder, folders_of.hugging_face_folder])
def test_a_folder_says_which_model_it_is(tmp_path, make):
    model = clip_jax.load(make(tmp_path / "a model"))
    assert model.preset == PRESET
    assert model.name == "a model" and model.step == 0
    same_params(model)
    assert model.encode_tokens(tokens()).shape == (3, 24)
    assert model.encode_image([np.zeros((40, 50, 3), np.uint8)]).shape == (1, 24)


def test_a_name_with_weights_takes_a_file_or_a_folder_of_any_layout(tmp_path, monkeypatch):
    monkeypatch.setitem(presets.PRESETS, "ViT-Test/16", PRESET)
    theirs, ours = (
        make(tmp_path / make.__name__) for make in (folders_of.hugging_face_folder, folders_of.open_clip_folder)
    )
    for weights in (theirs, theirs / "model.safetensors", ours, str(ours / "open_clip_model.safetensors")):
        same_params(clip_jax.load("ViT-Test-16", weights=weights))


def test_open_clips_files_win_over_transformers_and_a_line_says_so(tmp_path, caplog):
    folders_of.hugging_face_folder(tmp_path, seed=1)
    folders_of.open_clip_folder(tmp_path, seed=2)
    same_params(clip_jax.load(tmp_path), seed=2)
    assert "reading open_clip_model.safetensors (openclip); not read: model.safetensors" in caplog.text


def test_a_pickle_beside_safetensors_is_not_read(tmp_path):
    folders_of.hugging_face_folder(tmp_path)
    (tmp_path / "pytorch_model.bin").write_bytes(b"cos\nsystem\n(S'touch canary'\ntR.")
    (tmp_path / "open_clip_pytorch_model.bin").write_bytes(b"cos\nsystem\n(S'touch canary'\ntR.")
    (tmp_path / "open_clip_config.json").write_text("{}")
    same_params(clip_jax.load(tmp_path))


def test_a_folder_with_a_pickle_alone_names_the_command(tmp_path):
    folders_of.hugging_face_folder(tmp_path)
    (tmp_path / "model.safetensors").unlink()
    pickles.write(tmp_path / "pytorch_model.bin", {})
    with pytest.raises(UserError, match=r"clip-jax import .* --to=DIR"):
        clip_jax.load(tmp_path)


def test_each_shard_lies_where_it_belongs_on_a_mesh(tmp_path):
    folder = folders_of.open_clip_folder(tmp_path)
    mesh = sharding.make_mesh(data=2, fsdp=2, tensor=2)
    model = clip_jax.load(folder, mesh=mesh)
    up = model.params["image"]["transformer"]["blocks"]["mlp"]["up"]
    assert up.addressable_shards[0].data.shape == (2, 32, 128) and len(up.sharding.device_set) == 8
    single = clip_jax.load(folder)
    np.testing.assert_allclose(model.encode_tokens(tokens()), single.encode_tokens(tokens()), atol=2e-6)


def broken(folder, change):
    file = folder / "open_clip_model.safetensors"
    state = {name: np.array(x) for name, x in files.read(file).items()}
    change(state)
    files.write_safetensors(file, state)
    return folder


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda state: state.pop("visual.proj"), "visual.proj: missing"),
        (lambda state: state.update(extra=np.zeros(3)), "extra: in the weights, but not"),
        (lambda state: state.update({"visual.proj": np.zeros((64, 25), np.float32)}), r"visual.proj: .*\[64, 25\]"),
    ],
)
def test_missing_extra_and_misshapen_tensors_are_one_error_each(tmp_path, change, message):
    folder = broken(folders_of.open_clip_folder(tmp_path), change)
    with pytest.raises(UserError, match=message) as caught:
        clip_jax.load(folder)
    assert str(folder) in str(caught.value)


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("text_projection.weight", "text_projection.weight: missing"),
        ("text_model.encoder.layers.1.self_attn.k_proj.bias", "k_proj.bias: missing"),
    ],
)
def test_missing_tensors_of_transformers_are_called_by_transformers_names(tmp_path, name, message):
    folder = folders_of.hugging_face_folder(tmp_path)
    state = dict(files.read(folder / "model.safetensors"))
    state["vision_model.embeddings.position_ids"] = np.arange(5)[None]
    files.write_safetensors(folder / "model.safetensors", state)
    clip_jax.load(folder)  # Positions of old versions are no weights.
    del state[name]
    files.write_safetensors(folder / "model.safetensors", state)
    with pytest.raises(UserError, match=message):
        clip_jax.load(folder)


def test_a_setting_of_open_clip_that_is_not_built_is_named(tmp_path):
    folder = folders_of.open_clip_folder(tmp_path)
    config = json.loads((folder / "open_clip_config.json").read_text())
    config["model_cfg"]["vision_cfg"]["qk_norm"] = True
    (folder / "open_clip_config.json").write_text(json.dumps(config))
    with pytest.raises(UserError, match=r"vision_cfg\.qk_norm=True is not supported"):
        clip_jax.load(folder)


def test_what_is_not_a_model_is_one_clear_error(tmp_path):
    for source, message in [
        (tmp_path, "nor one of weights"),
        (tmp_path / "nothing", "no such folder"),
        ("ViT-B/32", "weights="),
        ("hf://nobody/nothing", "not in the Hugging Face cache"),
    ]:
        with pytest.raises(UserError, match=message):
            clip_jax.load(source)
    with pytest.raises(UserError, match="ViT-X/32: not a model"):
        clip_jax.load("ViT-X/32", weights=tmp_path)


def test_the_tokenizer_is_the_folders(tmp_path, shared_data):
    folder = folders_of.open_clip_folder(tmp_path)
    shutil.copy(shared_data / "clip_bpe" / "bpe_simple_vocab_16e6.txt.gz", folder)
    model = clip_jax.load(folder)
    assert model.tokenize("a cat")[0, :4].tolist() == [49406, 320, 2368, 49407]
    assert model.encode_text(["a cat", "a dog"]).shape == (2, 24)


def test_other_sizes_resize_the_positions_and_a_line_says_so(tmp_path, caplog):
    model = clip_jax.load(folders_of.open_clip_folder(tmp_path), image_size=64, context_length=20)
    assert "image/position_embedding: resized from 5 to 17 positions" in caplog.text
    assert "text/position_embedding: resized from 77 to 20 positions" in caplog.text
    assert model.image_size == 64 and model.params["image"]["position_embedding"].shape == (17, 64)
    assert model.encode_tokens(tokens()[:, :20]).shape == (3, 24)
    assert model.encode_image([np.zeros((40, 50, 3), np.uint8)]).shape == (1, 24)
    with pytest.raises(UserError, match="image_size=50: not a multiple"):
        clip_jax.load(tmp_path, image_size=50)


def test_tokens_of_any_block_of_either_tower(tmp_path):
    model = clip_jax.load(folders_of.open_clip_folder(tmp_path))
    image = np.zeros((40, 50, 3), np.uint8)
    last, first = (model.encode_image([image, image], return_tokens=layer) for layer in (-1, 1))
    assert last.shape == first.shape == (2, 5, 64)
    np.testing.assert_array_equal(first, model.encode_image([image, image], return_tokens=-2))  # of two blocks
    assert np.abs(last - first).max() > 1e-3
    assert model.encode_tokens(tokens(), return_tokens=-2).shape == (3, 77, 32)
    with pytest.raises(UserError, match="layer=3"):
        model.encode_tokens(tokens(), return_tokens=3)
