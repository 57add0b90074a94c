"""Runs with the tokenizers of SigLIP, SigLIP 2 and CLIPA: the vocabulary goes into the run's folder and stays there."""

import json
import shutil

import numpy as np
import pytest
from huggingface_hub import constants

import clip_jax
from clip_jax import commands
from clip_jax.config import load, resolve_preset
from clip_jax.data import tokenizers
from clip_jax.data.sources.tar import open_tar
from clip_jax.data.tokenizers import files
from clip_jax.errors import UserError
from clip_jax.training import loop
from clip_jax.training.tokenizer import _captions, prepare_tokenizer
from tests.data.shards import jpeg, write_shard, write_shards

RECIPE = '''"""A test."""
from clip_jax.config import defaults, evaluation


def get_config():
    config = defaults()
    config.steps = 3
    config.batch_size = 16
    config.data.train = "{train}"
    config.eval.held_out = evaluation(source="{train}")
    config.model.name = "{name}"
    config.optimizer.warmup_steps = 1
    for tower in (config.model.image, config.model.text):
        tower.width, tower.layers, tower.heads, tower.mlp_width = 32, 1, 2, 64
    config.model.embed_dim = 32
    config.model.image.image_size = 32
    config.model.text.vocab_size = {rows}
    config.objectives.contrastive.loss = "{loss}"
    return config
'''

BERT = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "picture", "number", *"0123456789", "##1", "##2"]


def recipe(folder, name, rows=64, loss="sigmoid"):
    path = folder / "recipe.py"
    path.write_text(RECIPE.format(train=write_shards(folder / "train", 32), name=name, rows=rows, loss=loss))
    return path


def in_the_cache(folder, repository, name, file):
    """The file as huggingface_hub keeps it."""
    snapshot = folder / f"models--{repository.replace('/', '--')}" / "snapshots" / "0123"
    snapshot.mkdir(parents=True)
    (snapshot.parents[1] / "refs").mkdir()
    (snapshot.parents[1] / "refs" / "main").write_text("0123")
    shutil.copy(file, snapshot / name)


@pytest.mark.slow
@pytest.mark.parametrize(("name", "version"), [("ViT-B/16-SigLIP", 1), ("ViT-B/16-SigLIP2", 2)])
def test_siglip_trains_with_its_tokenizer_and_the_run_carries_it(tmp_path, siglip_models, name, version):
    vocabulary = tmp_path / f"{version}.model"
    shutil.copy(siglip_models[version], vocabulary)
    workdir = tmp_path / "run"
    path = recipe(tmp_path, name)
    assert loop.run(workdir=str(workdir), recipe=str(path), overrides={"tokenizer.vocab": str(vocabulary)}) == 0
    vocabulary.unlink()  # the folder needs nothing else
    model = clip_jax.load(workdir)
    kind = "siglip" if version == 1 else "siglip2"
    assert (
        model.preset.tokenizer == kind and json.loads((workdir / "run.json").read_text())["tokenizer"]["kind"] == kind
    )
    expected = clip_jax.data.tokenizers.KINDS[kind](siglip_models[version], 64)
    np.testing.assert_array_equal(model.tokenize(["a red circle"]), expected(["a red circle"]))
    assert model.encode_text(["a red circle", "a blue square"]).shape == (2, 32)

    assert loop.run(workdir=str(workdir), recipe=None, overrides={}) == 0  # as a restart opens it
    to = tmp_path / "exported"
    assert commands.main(["export", f"--model={workdir}", "--format=huggingface", f"--to={to}"]) == 0
    assert (to / files.native_name(kind)).read_bytes() == siglip_models[version].read_bytes()


@pytest.mark.slow
def test_clipa_trains_with_words_of_bert_from_the_hugging_face_cache(tmp_path, monkeypatch):
    (tmp_path / "vocab.txt").write_text("\n".join(BERT) + "\n")
    in_the_cache(tmp_path / "cache", "bert-base-uncased", "vocab.txt", tmp_path / "vocab.txt")
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
    path, workdir = recipe(tmp_path, "ViT-L/14-CLIPA", loss="softmax"), tmp_path / "run"
    assert loop.run(workdir=str(workdir), recipe=str(path), overrides={"model.image.image_size": "28"}) == 0
    assert (workdir / "tokenizer" / "vocab.txt").read_text() == (tmp_path / "vocab.txt").read_text()
    assert clip_jax.load(workdir).tokenize(["Picture number 12"])[0, :6].tolist() == [2, 5, 6, 8, 18, 0]


@pytest.mark.parametrize("kind", ["clip", "sentencepiece"])
def test_a_run_that_starts_from_weights_takes_the_tokenizer_beside_them(tmp_path, monkeypatch, shared_data, kind):
    """Neither the hub is asked for merges that lie in the folder, nor is a vocabulary trained that has other ids."""
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    weights, workdir = tmp_path / "weights", tmp_path / "run"
    folder = weights / "tokenizer" if kind == "sentencepiece" else weights  # a run's folder, and Transformers'
    folder.mkdir(parents=True)
    workdir.mkdir()
    if kind == "sentencepiece":
        tokenizers.train_sentencepiece(["a red circle", "a blue square"] * 3, 280, folder / "sentencepiece.model")
    else:
        shutil.copy(shared_data / "clip_bpe" / "bpe_simple_vocab_16e6.txt.gz", folder)
    overrides = {"model.init_from": str(weights), "tokenizer.kind": kind}
    config = load(str(recipe(tmp_path, "ViT-B/32", rows=-1, loss="softmax")), overrides)
    made = prepare_tokenizer(workdir, config, [])
    expected = tokenizers.KINDS[kind](tokenizers.files.find(folder, kind), 77)
    np.testing.assert_array_equal(made(["a red square"]), expected(["a red square"]))


def test_a_vocabulary_that_is_nowhere_is_one_line(tmp_path, monkeypatch):
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    path = recipe(tmp_path, "ViT-B/16-SigLIP")
    with pytest.raises(UserError, match=r"'siglip' is neither given.*timm/ViT-B-16-SigLIP.*config\.tokenizer\.vocab"):
        loop.run(workdir=str(tmp_path / "run"), recipe=str(path), overrides={})


def test_a_vocabulary_of_another_kind_is_refused(tmp_path, siglip_models):
    path = recipe(tmp_path, "ViT-B/16-SigLIP2")
    with pytest.raises(UserError, match="not a vocabulary of SigLIP 2"):
        overrides = {"tokenizer.vocab": str(siglip_models[1])}
        loop.run(workdir=str(tmp_path / "run"), recipe=str(path), overrides=overrides)


def test_a_tower_that_pools_the_highest_token_cannot_take_a_tokenizer_whose_end_is_another(tmp_path):
    path = recipe(tmp_path, "ViT-B/32", loss="softmax")
    with pytest.raises(UserError, match=r"tokenizer\.kind=siglip: ViT-B/32 pools a text at its highest token"):
        resolve_preset(load(str(path), {"tokenizer.kind": "siglip"}))


@pytest.mark.parametrize(
    ("name", "kind", "tokens", "rows"),
    [
        ("ViT-L/14-CLIPA", "", 30_522, 32_000),  # published: the rows that BERT leaves unused are kept
        ("ViT-B/16-SigLIP-i18n-256", "", 250_100, 250_100),
        ("ViT-B/16-SigLIP", "siglip2", 256_000, 256_000),  # another vocabulary than the preset's
        ("ViT-B/16-SigLIP", "sentencepiece", 500, 500),
    ],
)
def test_the_embedding_has_a_row_for_each_token(tmp_path, name, kind, tokens, rows):
    config = load(str(recipe(tmp_path, name, rows=-1)), {"tokenizer.kind": kind, "model.image.image_size": "112"})
    assert resolve_preset(config, tokens).architecture.text.vocab_size == rows


@pytest.mark.parametrize("recipe", ["siglip_b16", "siglip_so400m14"])
def test_siglips_recipes_train_with_the_papers_tokenizer(recipe):
    assert resolve_preset(load(f"configs/{recipe}.py")).tokenizer == "siglip"


def test_captions_that_are_all_bad_are_counted_by_reason(tmp_path):
    empty = [{"jpg": jpeg(i), "txt": b" " if i else b"\xff\xfe"} for i in range(3)]
    source = open_tar(str(write_shard(tmp_path / "0.tar", empty)))
    with pytest.raises(
        UserError, match=r"in 3 examples \(2 empty caption, 1 unreadable caption \(UnicodeDecodeError\)\)"
    ):
        list(_captions(source, 100))
