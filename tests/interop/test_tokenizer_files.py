"""A model keeps its own tokenizer, here and in other libraries, and no other one is taken in its place."""

import dataclasses
import json
import shutil

import numpy as np
import pytest
import tokenizers as rust

import clip_jax
from clip_jax import commands
from clip_jax.data import tokenizers
from clip_jax.errors import UserError
from clip_jax.interop import tokenizer_files, tokenizer_json
from clip_jax.models.text import TextTower
from tests.interop import folders_of
from tests.interop.folders_of import PRESET

TEXTS = [
    "a red circle",
    "A RED Circle  \t on the\nleft",
    "",
    "   ",
    "l’été “quoted” ‘so’, R&amp;amp;B &lt;b&gt; &quot;x&quot;&nbsp;y",
    "<s>not a token</s> <pad>",
    "ﬁne ﬂuß ẞ ｆｕｌｌ ½ ™ …",
    "Ελλάδα İstanbul Привет мир",
    "猫と犬 🐱 👩‍👩‍👧 한국어 \u1112\u1161\u11ab नमस्ते ไทย",
    "e\u0301te\u0301 \u200b zero\x00width \ufeff",
    "▁ underlined ▁▁",
    "long " * 100,
]


def framed(tokenizer, converted, text):
    """What Transformers makes of a text with padding to, and truncation at, the context length."""
    length = tokenizer.context_length
    converted.enable_truncation(length)
    converted.enable_padding(length=length, pad_id=tokenizer.pad_id)
    return converted.encode(text).ids


@pytest.mark.parametrize("layout", ["openclip", "huggingface"])
def test_an_export_carries_the_runs_own_tokenizer(small_run, tmp_path, layout):
    to = tmp_path / "out"
    assert commands.main(["export", f"--model={small_run}", f"--format={layout}", f"--to={to}"]) == 0
    model, again = clip_jax.load(small_run), clip_jax.load(to)
    assert again.preset.tokenizer == "sentencepiece"
    np.testing.assert_array_equal(again.tokenize(TEXTS), model.tokenize(TEXTS))
    np.testing.assert_allclose(again.encode_text(TEXTS), model.encode_text(TEXTS), atol=1e-6)

    converted = rust.Tokenizer.from_file(str(to / "tokenizer.json"))
    for text, row in zip(TEXTS, model.tokenize(TEXTS), strict=True):
        assert framed(model.tokenizer, converted, text) == row.tolist(), text
    config = json.loads((to / "tokenizer_config.json").read_text())
    ids = [converted.token_to_id(config[f"{kind}_token"]) for kind in ("pad", "unk", "bos", "eos")]
    size = model.tokenizer.vocab_size
    assert ids == [0, 1, size - 2, size - 1] and config["model_max_length"] == model.tokenizer.context_length
    # Without clip_jax's own file the conversion is read, as any other tokenizer.json.
    (to / "sentencepiece.model").unlink()
    np.testing.assert_array_equal(clip_jax.load(to).tokenize(TEXTS), model.tokenize(TEXTS))
    if layout == "openclip":
        assert json.loads((to / "open_clip_config.json").read_text())["model_cfg"]["text_cfg"]["hf_tokenizer_name"]


@pytest.mark.parametrize("version", [1, 2])
def test_vocabularies_like_siglips_are_converted_too(siglip_models, version):
    tokenizer = tokenizers.siglip(siglip_models[version], 16, version)
    converted = rust.Tokenizer.from_str(tokenizer_json.of_pieces(tokenizer)["tokenizer.json"])
    for text in ["A picture, of_number 12!", "", "a dog"]:
        assert framed(tokenizer, converted, text) == tokenizer([text])[0].tolist(), text


def test_clips_tokenizer_is_exported_with_the_repairs_of_its_training(tmp_path, shared_data):
    """Transformers' own class for CLIP keeps curly quotes, entities, ligatures and full-width letters."""
    folder = folders_of.open_clip_folder(tmp_path / "model")
    shutil.copy(shared_data / "clip_bpe" / "bpe_simple_vocab_16e6.txt.gz", folder)
    to = tmp_path / "out"
    assert commands.main(["export", f"--model={folder}", "--format=huggingface", f"--to={to}"]) == 0
    tokenizer = clip_jax.load(to).tokenizer
    converted = rust.Tokenizer.from_file(str(to / "tokenizer.json"))
    assert converted.decode(converted.encode("a photo of a cat").ids) == "a photo of a cat"
    end = tokenizer.end_id
    for text in [*TEXTS, "they're 12,5 dogs'", "ＡＢＣ，カタ ｶﾀ　ĳ"]:
        row = tokenizer([text])[0].tolist()
        found = framed(tokenizer, converted, text)
        assert found[: found.index(end) + 1] == row[: row.index(end) + 1], text
    assert json.loads((to / "vocab.json").read_text())["<|endoftext|>"] == end


@pytest.mark.parametrize("clean", ["canonicalize", "lower"])
def test_texts_of_a_siglip_2_are_cleaned_as_open_clips_config_says_and_exported_so(tmp_path, siglip_models, clean):
    """OpenCLIP's own config drops punctuation, which Transformers keeps."""
    expected = tokenizers.siglip(siglip_models[2], 16, 2, clean)(["A small, Red_circle!"])
    preset = small(tmp_path, 60, pooling="last", context_length=16)._replace(tokenizer="siglip2")
    folder = folders_of.open_clip_folder(tmp_path / "model", preset)
    config = json.loads((folder / "open_clip_config.json").read_text())
    config["model_cfg"]["text_cfg"]["tokenizer_kwargs"] = {"clean": clean}
    (folder / "open_clip_config.json").write_text(json.dumps(config))
    shutil.copy(siglip_models[2], folder / "tokenizer.model")
    np.testing.assert_array_equal(clip_jax.load(folder).tokenize("A small, Red_circle!"), expected)
    assert commands.main(["export", f"--model={folder}", "--format=openclip", f"--to={tmp_path / 'out'}"]) == 0
    np.testing.assert_array_equal(clip_jax.load(tmp_path / "out").tokenize("A small, Red_circle!"), expected)


def sentencepiece(folder, size=300):
    file = folder / "mine.model"
    tokenizers.train_sentencepiece(["a red circle", "a blue square", "two green dogs"] * 3, size, file)
    return file


def small(folder, size, **text):
    """A folder whose text tower has the given vocabulary."""
    tower = dataclasses.replace(PRESET.architecture.text, vocab_size=size, **text)
    return PRESET._replace(architecture=dataclasses.replace(PRESET.architecture, text=tower))


@pytest.mark.parametrize("make", [folders_of.open_clip_folder, folders_of.hugging_face_folder])
def test_a_vocabulary_of_another_size_than_the_towers_is_refused(tmp_path, shared_data, make):
    merges = shared_data / "clip_bpe" / "bpe_simple_vocab_16e6.txt.gz"
    folder = make(tmp_path / "model", small(tmp_path, 300))
    shutil.copy(merges, folder)
    with pytest.raises(
        UserError, match=r"a vocabulary of 49408 tokens, but the model's text tower has 300.*tokenizer="
    ):
        clip_jax.load(folder).encode_text(["a cat"])  # ids beyond the tower are NaN
    with pytest.raises(UserError, match="a vocabulary of 49408 tokens"):
        clip_jax.load(folder, tokenizer=merges)
    with pytest.raises(UserError, match="a vocabulary of 300 tokens, but the model's text tower has 49408"):
        clip_jax.load(make(tmp_path / "large"), tokenizer=sentencepiece(tmp_path))


def test_load_takes_a_tokenizer_as_a_file_a_folder_or_itself(tmp_path, small_run):
    file = sentencepiece(tmp_path)
    mine = tokenizers.sentencepiece(file, 77)
    folder = folders_of.open_clip_folder(tmp_path / "model", small(tmp_path, mine.vocab_size))
    with pytest.raises(UserError, match=r"tokenizer=PATH|neither given"):
        clip_jax.load(folder).tokenize("a cat")
    (tmp_path / "other").mkdir()
    shutil.copy(file, tmp_path / "other" / "sentencepiece.model")
    for given in (file, str(file), tmp_path / "other", mine):
        model = clip_jax.load(folder, tokenizer=given)
        np.testing.assert_array_equal(model.tokenize(TEXTS), mine(TEXTS))
    own = clip_jax.load(small_run)
    given = clip_jax.load(small_run, tokenizer=small_run / "tokenizer")
    np.testing.assert_array_equal(given.tokenize(TEXTS), own.tokenize(TEXTS))
    for source in (folder, small_run):
        with pytest.raises(UserError, match="no tokenizer is there"):
            clip_jax.load(source, tokenizer=tmp_path / "model")
        with pytest.raises(UserError, match="nowhere: no such file or folder"):
            clip_jax.load(source, tokenizer=tmp_path / "nowhere")


WORDS = {"[PAD]": 0, "[UNK]": 1, "[START]": 2, "[END]": 3, "a": 4, "cat": 5, "dog": 6}


def word_level(folder, *, end=True):
    """A ``tokenizer.json`` of someone's own words, whose end token is not the highest."""
    made = rust.Tokenizer(rust.models.WordLevel(WORDS, unk_token="[UNK]"))
    made.pre_tokenizer = rust.pre_tokenizers.Whitespace()
    template, special = ("[START] $A [END]", [("[START]", 2), ("[END]", 3)]) if end else ("$A", [])
    made.post_processor = rust.processors.TemplateProcessing(single=template, special_tokens=special)
    made.save(str(folder / "tokenizer.json"))
    (folder / "tokenizer_config.json").write_text(json.dumps({"pad_token": {"content": "[PAD]"}}))


def test_a_folders_own_tokenizer_json_is_read_as_it_says(tmp_path):
    folder = folders_of.hugging_face_folder(tmp_path, small(tmp_path, 7, pooling="eos", eos_id=3, context_length=6))
    word_level(folder)
    model = clip_jax.load(folder)
    assert model.tokenize(["a cat", "dog a zebra a cat a"]).tolist() == [[2, 4, 5, 3, 0, 0], [2, 6, 4, 1, 4, 3]]
    assert model.encode_text(["a cat"]).shape == (1, 24)


def test_a_tokenizer_that_ends_texts_elsewhere_than_the_model_pools_them_is_refused(tmp_path):
    folder = folders_of.hugging_face_folder(tmp_path, small(tmp_path, 7))
    word_level(folder)
    with pytest.raises(UserError, match="ends a text with the token 3, but the model pools it at 6"):
        clip_jax.load(folder).tokenize("a cat")
    word_level(folder, end=False)
    with pytest.raises(UserError, match="does not end a text with one token"):
        clip_jax.load(folder).tokenize("a cat")


@pytest.mark.parametrize(
    ("kind", "tokens", "rows", "fits"),
    [
        ("clipa", 30_522, 32_000, True),
        ("siglip", 250_100, 250_000, True),  # mT5's extra tokens
        ("siglip2", 256_000, 256_000, True),
        ("clip", 49_408, 49_408, True),
        ("clip", 49_409, 49_408, False),
        ("huggingface", 1000, 1024, True),  # padded for the device
        ("huggingface", 1000, 1200, False),
        ("siglip", 32_101, 32_000, False),
    ],
)
def test_published_towers_may_be_larger_than_their_vocabulary(kind, tokens, rows, fits):
    tower = TextTower(8, rows, 32, 1, 1, 64, pooling="last", causal=False)
    tokenizer = tokenizers.Tokenizer(None, 8, tokens, None, 1, 0, "")
    if fits:
        assert tokenizer_files.fitting(tokenizer, kind, tower, "here") is tokenizer
    else:
        with pytest.raises(UserError, match="here: a vocabulary of"):
            tokenizer_files.fitting(tokenizer, kind, tower, "here")


def test_a_checkpoint_of_another_step(small_run):
    assert clip_jax.load(small_run, step=12).step == 12
    with pytest.raises(UserError, match=r"no checkpoint of step 7; it keeps .*12"):
        clip_jax.load(small_run, step=7)
