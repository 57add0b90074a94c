"""Tokenizers: known ids, the frame around them, what training promises, and every way a file can be wrong.

The cleaning has its own file; that all tokens equal OpenCLIP's is checked in tests/parity/test_tokenizers.py.
"""

import gzip
import itertools
import json
import pickle
import re
from pathlib import Path

import ftfy
import numpy as np
import pytest
import sentencepiece as spm
from huggingface_hub import constants
from hypothesis import given, settings
from hypothesis import strategies as st

from clip_jax.data import tokenizers
from clip_jax.errors import UserError

VOCAB = Path(__file__).resolve().parents[3] / "shared" / "data" / "clip_bpe" / "bpe_simple_vocab_16e6.txt.gz"
needs_vocab = pytest.mark.skipif(not VOCAB.exists(), reason=f"no {VOCAB}")

CAPTIONS = [
    f"{article} {size} {color} {shape} {position} the {other}"
    for article, size, color, shape, position, other in itertools.product(
        ("a", "one"),
        ("small", "large"),
        ("red", "green", "blue"),
        ("circle", "square", "triangle"),
        ("above", "below"),
        ("star", "Café"),
    )
]


@pytest.fixture(scope="module")
def clip():
    return tokenizers.clip(VOCAB)


@pytest.fixture(scope="module")
def own_model(tmp_path_factory):
    file = tmp_path_factory.mktemp("own") / "tokenizer.model"
    tokenizers.train_sentencepiece(CAPTIONS, 340, file)
    return file


# --- CLIP -------------------------------------------------------------------------------------------------------------


@needs_vocab
@pytest.mark.parametrize(
    ("text", "ids"),
    [
        ("a photo of a cat", [320, 1125, 539, 320, 2368]),
        ("A  Photo\tof a DOG", [320, 1125, 539, 320, 1929]),
        ("hello world!", [3306, 1002, 256]),
        ("", []),
        ("   ", []),
        ("!", [256]),  # byte 33 is the first of the printable ones, at the end of a word
        ("10", [272, 271]),  # digits stand alone: 256 + (49 - 33), 256 + (48 - 33)
        ("<START_OF_TEXT> <end_of_text>", [49406, 49407]),  # as in OpenCLIP, a caption may spell them
    ],
)
def test_clip_ids_are_the_known_ones(clip, text, ids):
    row = clip([text])[0]
    assert row.tolist() == [49406, *ids, 49407] + [0] * (75 - len(ids))


@needs_vocab
def test_clip_has_the_shape_type_and_sizes_of_openai(clip):
    rows = clip(["a cat", "a dog"])
    assert (rows.shape, rows.dtype) == ((2, 77), np.int32)
    assert (clip.vocab_size, clip.pad_id, clip.context_length) == (49408, 0, 77)
    assert clip([]).shape == (0, 77)


@needs_vocab
@pytest.mark.parametrize("words", [74, 75, 76, 500])
def test_a_long_text_keeps_its_end_token(clip, words):
    row = clip([" ".join(["cat"] * words)])[0]
    kept = min(words, 75)
    assert row.tolist() == [49406, *[2368] * kept, 49407] + [0] * (75 - kept)


@needs_vocab
@pytest.mark.parametrize("context_length", [2, 3, 16, 100])
def test_another_context_length_cuts_the_same_ids(clip, context_length):
    texts = ["a photo of a cat", "cat " * 200, ""]
    rows = tokenizers.clip(VOCAB, context_length)(texts)
    assert rows.shape == (3, context_length)
    assert rows[1].tolist() == [49406, *[2368] * (context_length - 2), 49407]
    assert rows[2].tolist() == [49406, 49407] + [0] * (context_length - 2)
    if context_length > 7:
        assert rows[0, :7].tolist() == clip(texts[:1])[0, :7].tolist()


@needs_vocab
def test_a_text_has_the_same_ids_alone_in_a_batch_and_when_its_words_are_remembered_or_forgotten(clip, monkeypatch):
    texts = [*CAPTIONS, "漢字" * 40, "a" * 100, "été 🐱"]
    fresh = tokenizers.clip(VOCAB)
    monkeypatch.setattr(type(fresh.codec), "WORDS", 2)
    forgetful = np.concatenate([fresh([text]) for text in texts])
    assert np.array_equal(clip(texts), forgetful)
    assert np.array_equal(clip(texts), clip(texts))


@needs_vocab
@settings(deadline=None)
@given(st.text(st.characters(), max_size=300))
def test_every_text_is_start_ids_end_and_zeros_with_the_end_at_the_highest_id(clip, text):
    row = clip([text])[0]
    end = int(row.argmax())
    assert row[0] == 49406
    assert row[end] == 49407
    if "<end_of_text>" not in text.lower():
        assert not row[end + 1 :].any()
    assert row.min() >= 0


@needs_vocab
def test_decode_gives_the_cleaned_text_back(clip):
    assert clip.decode(clip(["A photo of  été 漢字 🐱"])[0]) == "a photo of été 漢字 🐱"
    assert clip.decode(clip(["cat " * 100])[0]) == " ".join(["cat"] * 75)


@needs_vocab
def test_hugging_face_files_hold_the_same_vocabulary(clip, tmp_path):
    lines = gzip.decompress(VOCAB.read_bytes()).decode().split("\n")[1:48895]
    (tmp_path / "merges.txt").write_text("#version: 0.2\n" + "\n".join(lines) + "\n")
    pairs, spaced = [line.split() for line in lines], lines
    for name, merges in (("pairs.json", pairs), ("spaced.json", spaced)):
        (tmp_path / name).write_text(json.dumps({"model": {"merges": merges}}))
    for name in ("merges.txt", "pairs.json", "spaced.json"):
        tokenizer = tokenizers.clip(tmp_path / name)
        assert tokenizer.fingerprint == clip.fingerprint
        assert np.array_equal(tokenizer(CAPTIONS), clip(CAPTIONS))


@needs_vocab
@pytest.mark.parametrize("name", ["merges.txt", "tokenizer.json"])
def test_without_a_path_the_vocabulary_comes_from_the_hugging_face_cache(name, tmp_path, monkeypatch):
    repository = tmp_path / "models--openai--clip-vit-base-patch32"
    snapshot = repository / "snapshots" / "0123"
    snapshot.mkdir(parents=True)
    (repository / "refs").mkdir()
    (repository / "refs" / "main").write_text("0123")
    text = gzip.decompress(VOCAB.read_bytes()).decode()
    if name.endswith(".json"):
        text = json.dumps({"model": {"merges": text.split("\n")[1:48895]}})
    (snapshot / name).write_text(text)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path))
    assert tokenizers.clip("")(["a photo of a cat"])[0, :4].tolist() == [49406, 320, 1125, 539]


def test_offline_and_without_a_cache_one_line_says_what_to_do(tmp_path, monkeypatch):
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    with pytest.raises(UserError, match=r"give the path of a bpe_simple_vocab_16e6\.txt\.gz") as caught:
        tokenizers.clip(None)
    assert "\n" not in str(caught.value)


# --- SentencePiece trained on captions --------------------------------------------------------------------------------


def test_own_tokenizer_frames_the_pieces_and_its_end_token_is_the_highest_id(own_model):
    tokenizer = tokenizers.sentencepiece(own_model, 12)
    pieces = spm.SentencePieceProcessor(model_file=str(own_model)).encode("a small red circle")
    assert tokenizer.vocab_size == 340
    assert tokenizer(["A small  RED circle"])[0].tolist() == [338, *pieces, 339] + [0] * (10 - len(pieces))
    assert tokenizer([""])[0].tolist() == [338, 339] + [0] * 10


def test_argmax_finds_the_end_of_every_text_even_of_a_cut_one(own_model):
    tokenizer = tokenizers.sentencepiece(own_model, 16)
    rows = tokenizer(["", "a star", "</s> <s> <pad>", "star " * 50, "漢字" * 30])
    ends = rows.argmax(axis=1)
    assert (rows[range(5), ends] == tokenizer.vocab_size - 1).all()
    assert (rows[:, 1:] != tokenizer.vocab_size - 2).all()  # a text cannot spell the start token
    assert ends[3] == ends[4] == 15


def test_characters_never_seen_in_training_are_spelled_in_bytes(own_model):
    tokenizer = tokenizers.sentencepiece(own_model, 64)
    rows = tokenizer(["a red 漢字 🐱 ñ"])
    assert tokenizer.decode(rows[0]) == "a red 漢字 🐱 ñ"
    assert 1 not in rows  # unknown


def test_training_is_deterministic_and_silent(own_model, tmp_path, capfd):
    tokenizers.train_sentencepiece(iter(CAPTIONS), 340, tmp_path / "new folder" / "again.model")
    assert (tmp_path / "new folder" / "again.model").read_bytes() == own_model.read_bytes()
    assert capfd.readouterr() == ("", "")


def test_a_vocabulary_that_the_captions_cannot_fill_shrinks(tmp_path):
    tokenizers.train_sentencepiece(CAPTIONS, 32_000, tmp_path / "a.model")
    tokenizer = tokenizers.sentencepiece(tmp_path / "a.model", 16)
    assert 300 < tokenizer.vocab_size < 1000
    last = tokenizer.vocab_size - 1
    row = tokenizer(["a red star"])[0]
    assert (row[0], row.argmax(), row.max()) == (last - 1, 4, last)  # each word has become one piece


def test_the_smallest_vocabulary_that_an_error_names_can_be_trained(tmp_path):
    with pytest.raises(UserError, match=r"vocab_size=100 .* need \d+ at least") as caught:
        tokenizers.train_sentencepiece(CAPTIONS, 100, tmp_path / "a.model")
    least = int(re.search(r"need (\d+)", str(caught.value))[1])
    tokenizers.train_sentencepiece(CAPTIONS, least, tmp_path / "a.model")
    assert tokenizers.sentencepiece(tmp_path / "a.model", 8).vocab_size == least


@pytest.mark.parametrize("captions", [[], ["", " \n"]])
def test_training_without_captions_is_an_error_and_leaves_the_old_file(captions, tmp_path):
    (tmp_path / "a.model").write_bytes(b"old")
    with pytest.raises(UserError, match="no captions"):
        tokenizers.train_sentencepiece(captions, 300, tmp_path / "a.model")
    assert [(file.name, file.read_bytes()) for file in tmp_path.iterdir()] == [("a.model", b"old")]


# --- SigLIP and CLIPA -------------------------------------------------------------------------------------------------


def test_siglip_pads_with_its_end_token_and_siglip_2_with_zero(siglip_models):
    for version, pad, text in ((1, 1, "a red star"), (2, 0, "a red star")):
        pieces = spm.SentencePieceProcessor(model_file=str(siglip_models[version])).encode(text)
        tokenizer = tokenizers.siglip(siglip_models[version], version=version)
        row = tokenizer(["A red STAR"])[0]
        assert row.tolist() == [*pieces, 1] + [pad] * (63 - len(pieces))
        assert tokenizer([""])[0].tolist() == [1] + [pad] * 63
        assert tokenizer(["star " * 100])[0, -1] == 1  # sticky
        assert tokenizer.pad_id == pad


def test_siglip_drops_punctuation_and_siglip_2_keeps_it_unless_told(siglip_models):
    texts, plain = ["A photo_of: a red star!"], ["a photo of a red star"]

    def same(version: int, clean: str = "") -> bool:
        tokenizer = tokenizers.siglip(siglip_models[version], version=version, clean=clean)
        return np.array_equal(tokenizer(texts), tokenizer(plain))

    assert same(1)
    assert same(2, clean="canonicalize")
    assert not same(2)
    assert not same(1, clean="lower")


def test_wordpiece_is_berts_with_the_separator_overwritten(tmp_path):
    words = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "a", "photo", "of", "cat", "##s", "!"]
    (tmp_path / "vocab.txt").write_text("\n".join(words) + "\n")
    tokenizer = tokenizers.wordpiece(tmp_path / "vocab.txt", context_length=10)
    assert tokenizer.vocab_size == 11
    rows = tokenizer(["A phötö of CATS!", "a dog", "cat [SEP] cat", "", "cat " * 20])
    assert rows.tolist() == [
        [2, 5, 6, 7, 8, 9, 10, 0, 0, 0],
        [2, 5, 1, 0, 0, 0, 0, 0, 0, 0],
        [2, 8, 0, 8, 0, 0, 0, 0, 0, 0],
        [2, 0, 0, 0, 0, 0, 0, 0, 0, 0],
        [2, 8, 8, 8, 8, 8, 8, 8, 8, 0],
    ]
    assert tokenizer.decode(rows[0]) == "a photo of cats!"
    tokenizer.codec.inner.tokenizer.save(str(tmp_path / "tokenizer.json"))
    assert np.array_equal(tokenizers.wordpiece(tmp_path / "tokenizer.json", 10)(CAPTIONS), tokenizer(CAPTIONS))


# --- all of them ------------------------------------------------------------------------------------------------------


@needs_vocab
def test_a_tokenizer_survives_pickling(clip, own_model, siglip_models):
    for tokenizer in (clip, tokenizers.sentencepiece(own_model, 12), tokenizers.siglip(siglip_models[1])):
        again = pickle.loads(pickle.dumps(tokenizer))
        assert np.array_equal(again(CAPTIONS), tokenizer(CAPTIONS))
        assert again.fingerprint == tokenizer.fingerprint


@needs_vocab
def test_the_fingerprint_changes_with_whatever_can_change_a_token(own_model, siglip_models, tmp_path, monkeypatch):
    tokenizers.train_sentencepiece(CAPTIONS, 330, tmp_path / "other.model")

    def fingerprints() -> list[str]:
        return [
            tokenizers.clip(VOCAB).fingerprint,
            tokenizers.clip(VOCAB, 76).fingerprint,
            tokenizers.sentencepiece(own_model, 16).fingerprint,
            tokenizers.sentencepiece(own_model, 17).fingerprint,
            tokenizers.sentencepiece(tmp_path / "other.model", 16).fingerprint,
            tokenizers.siglip(siglip_models[1]).fingerprint,
            tokenizers.siglip(siglip_models[1], clean="lower").fingerprint,
            tokenizers.siglip(siglip_models[2], version=2).fingerprint,
        ]

    before = fingerprints()
    assert before == fingerprints()
    monkeypatch.setattr(ftfy, "__version__", "7.0")
    assert len({*before, *fingerprints()}) == 2 * len(before)


@needs_vocab
def test_one_text_instead_of_a_list_is_refused(clip):
    with pytest.raises(TypeError, match=r"\[text\]"):
        clip("a cat")


def wrong_calls(folder: Path, models: dict[int, Path], own: Path) -> dict:
    (folder / "text").write_text("hello\n" * 9)
    (folder / "cut.gz").write_bytes(gzip.compress(b"hello" * 999)[:20])
    (folder / "list.json").write_text("[1]")
    (folder / "broken.json").write_text('{"model": ')
    return {
        "text: not CLIP's vocabulary": lambda: tokenizers.clip(folder / "text"),
        "cut.gz: cannot be read": lambda: tokenizers.clip(folder / "cut.gz"),
        "list.json: cannot be read": lambda: tokenizers.clip(folder / "list.json"),
        "nothing: no such file": lambda: tokenizers.clip(folder / "nothing"),
        f"{folder.name}: cannot be read": lambda: tokenizers.clip(folder),
        "text: cannot be read as a SentencePiece": lambda: tokenizers.siglip(folder / "text"),
        "broken.json: cannot be read": lambda: tokenizers.siglip(folder / "broken.json"),
        "nothing: cannot be read": lambda: tokenizers.sentencepiece(folder / "nothing", 16),
        "1.model: not a vocabulary of SigLIP 2": lambda: tokenizers.siglip(models[1], version=2),
        "2.model: not a vocabulary of SigLIP 1": lambda: tokenizers.siglip(models[2]),
        "version=3": lambda: tokenizers.siglip(models[1], version=3),
        "clean='upper'": lambda: tokenizers.siglip(models[1], clean="upper"),
        "1.model: not a tokenizer of ours": lambda: tokenizers.sentencepiece(models[1], 16),
        "text: not a vocabulary of BERT": lambda: tokenizers.wordpiece(folder / "text"),
        "list.json: cannot be read as a WordPiece": lambda: tokenizers.wordpiece(folder / "list.json"),
        "context_length=1: ": lambda: tokenizers.sentencepiece(own, 1),
        "context_length=0: ": lambda: tokenizers.siglip(models[1], 0),
    }


def test_a_wrong_file_or_setting_is_one_line_that_names_it(tmp_path, siglip_models, own_model):
    for message, call in wrong_calls(tmp_path, siglip_models, own_model).items():
        with pytest.raises(UserError, match=re.escape(message)) as caught:
            call()
        assert "\n" not in str(caught.value)


def test_text_that_is_not_valid_unicode_has_the_ids_of_its_replacement(siglip_models):
    tokenizer = tokenizers.siglip(siglip_models[1], 16)
    broken = ["caf\udce9", "\ud83d alone", "a pair \ud83d\ude00"]
    np.testing.assert_array_equal(tokenizer(broken), tokenizer(["caf\ufffd", "\ufffd alone", "a pair \U0001f600"]))
