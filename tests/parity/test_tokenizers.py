"""Every token equals OpenCLIP's, for real captions in 12 languages and for strings made to tell the two apart.

Needs the environment of ``tests/peers/make_env.sh``: its python writes OpenCLIP's tokens, this process compares.
"""

import html.entities
import json
import os
import random
import subprocess
import tarfile
import unicodedata
from pathlib import Path

import numpy as np
import pytest
import sentencepiece as spm
import tokenizers as hf_tokenizers
from ftfy.badness import MOJIBAKE_CATEGORIES

from clip_jax.data import tokenizers

ROOT = Path(__file__).resolve().parents[2]
DATA = ROOT.parent / "shared" / "data"
PEERS = Path(os.environ.get("CLIP_JAX_PEERS") or ROOT / ".venv-peers")
VOCAB = DATA / "clip_bpe" / "bpe_simple_vocab_16e6.txt.gz"

pytestmark = [
    pytest.mark.parity,
    pytest.mark.skipif(
        not (PEERS / ".complete").exists(),
        reason=f"no peers at {PEERS}: run tests/peers/make_env.sh DIR and set CLIP_JAX_PEERS=DIR",
    ),
    pytest.mark.skipif(not VOCAB.exists(), reason=f"no test data at {DATA}"),
]

# Texts travel as code points: JSON would join two lone surrogates into the character that they were not.
OPEN_CLIP = """
import json, sys
from pathlib import Path
import torchvision_ops_stub  # before open_clip
import numpy as np
from open_clip.tokenizer import HFTokenizer, SimpleTokenizer

folder = Path(sys.argv[1])
texts = ["".join(map(chr, codes)) for codes in json.loads((folder / "texts.json").read_text())]
for name, (kind, kwargs) in json.loads((folder / "jobs.json").read_text()).items():
    if kind == "SimpleTokenizer":
        tokenizer = SimpleTokenizer(**kwargs)
    else:
        tokenizer = HFTokenizer(str(folder / kind), **kwargs)
        tokenizer.tokenizer.save_pretrained(folder / kind / "saved")
    np.save(folder / f"{name}.npy", tokenizer(texts).numpy())
"""

JOBS = {
    "clip_77": ("SimpleTokenizer", {}),
    "clip_16": ("SimpleTokenizer", {"context_length": 16}),
    "siglip_canonical": ("t5", {"context_length": 64, "clean": "canonicalize"}),
    "siglip_lower": ("t5", {"context_length": 16, "clean": "lower"}),
    "siglip2_canonical": ("gemma", {"context_length": 64, "clean": "canonicalize"}),
    "siglip2_lower": ("gemma", {"context_length": 64, "clean": "lower"}),
    "clipa": ("bert", {"context_length": 32, "strip_sep_token": True}),
}

# How Hugging Face configures the published tokenizers.
CONFIGS = {
    "t5": {"tokenizer_class": "T5Tokenizer", "extra_ids": 0, "pad_token": "</s>"},
    "gemma": {
        "tokenizer_class": "GemmaTokenizer",
        "padding_side": "right",
        "add_bos_token": False,
        "add_eos_token": True,
    },
    "bert": {"tokenizer_class": "BertTokenizer", "do_lower_case": True},
}

# Hugging Face's tokenizers read special tokens that a text spells out; SentencePiece does not.
SPELLED = ["[SEP] a [CLS] [MASK] [unk] <pad> </s> <eos> <bos> <unk>", "<0x41> <mask>"]


def real_captions() -> list[str]:
    captions = []
    for shard in sorted((DATA / "emoji").glob("*.tar")):
        with tarfile.open(shard) as tar:
            names = [name for name in tar.getnames() if name.endswith(".json")]
            for name in names:
                captions += json.load(tar.extractfile(name))["captions"].values()
    return captions


def hard_texts(captions: list[str], seed: int = 0) -> list[str]:
    """Strings where tokenizers part ways: entities, wrong encodings, control characters, case, length, any Unicode."""
    rng = random.Random(seed)
    texts = ["", " ", "\n", "\0", "!", "a", "<start_of_text>", "a <END_OF_TEXT> b<end_of_text>c", "<ſtart_of_text>"]
    texts += ["it's IT'S it'ſ they'Re we'LL 'dd ''", "½ ² ① ١٢٣ 12345 x2", "İ ı ẞ ß ǅ ŉ ΑΣ ΑΣ. Σ ὈΔΥΣΣΕΎΣ ﬁ ＬＯＵＤ"]
    texts += [*SPELLED, "</w> a</w> Ġ ▁ a▁b"]
    texts += [
        "<b>R&amp;B</b>",
        "R&amp;B",
        "R&amp;amp;lt;B &amp;lt;p&amp;gt; &notit; &not &#x41;&#65 &#xd800; &#0;&#128;",
    ]
    texts += [
        "\x1b[31mred\x1b[0m",
        "a\r\nb\rc\u2028d\u2029e\x85f\x1cg\x1fh\u200bi\ufeffj\xa0k\u3000l\u180em",
        "\ud83d\ude00\udc00",
    ]
    texts += ["a" * 3000, "ab " * 5000, "漢" * 500, "1 " * 200, "🐱" * 100, "\u0301" * 50, "x" + "\u0301\u0327" * 20]
    texts += [" ".join(["cat"] * n) for n in range(60, 90)]
    entities = [*html.entities.html5, "#39;", "#x27;", "#xffff;", "#1114112;", "AMP;", "NBSP;", "EACUTE;", "amp;amp;"]
    mojibake = [c for cs in MOJIBAKE_CATEGORIES.values() for c in cs if c != "-"]
    everyday = list("aAzZ019 .,'-_&;<>#%!?\"()\n\t’‘“”–—…\xa0éàñüßÉÎœŒжЖЂЩλΣ漢あア한ا")
    blocks = [(0, 0x250), (0, 0x2100), (0x2000, 0x3100), (0xFB00, 0x10000), (0x1F000, 0x1FB00), (0, 0x110000)]

    def characters(alphabet: list[str], longest: int = 12) -> str:
        return "".join(rng.choices(alphabet, k=rng.randint(1, longest)))

    for caption in rng.sample(captions, 3000):
        other = rng.choice(captions)
        texts.append(caption.upper() if rng.random() < 0.5 else caption.title())
        texts.append(f"{caption}{rng.choice(everyday)}{other} &{rng.choice(entities)}{caption[:3]}")
        wrong = caption.encode().decode(rng.choice(["latin-1", "cp1252", "cp1251", "mac_roman"]), errors="replace")
        texts.append(rng.choice([wrong, f"{wrong} {other}", f"{other} {wrong[:9]}"]))
        texts.append(characters(mojibake + everyday))
        texts.append(characters(everyday, 30))
        texts.append(characters(everyday) + "".join(chr(rng.randrange(*rng.choice(blocks))) for _ in range(8)))
    return texts


def train_vocabularies(folder: Path, captions: list[str]) -> None:
    """Small vocabularies with the settings of the published ones, in the folders that OpenCLIP will open."""
    captions = captions[:: len(captions) // 8000]
    for name, config in CONFIGS.items():
        (folder / name).mkdir()
        (folder / name / "tokenizer_config.json").write_text(json.dumps(config))
    common = {"vocab_size": 4000, "pad_id": 0, "eos_id": 1, "minloglevel": 2}
    spm.SentencePieceTrainer.train(
        sentence_iterator=iter(captions), model_prefix=str(folder / "t5" / "spiece"), unk_id=2, bos_id=-1, **common
    )
    spm.SentencePieceTrainer.train(
        sentence_iterator=(caption.lower() for caption in captions),
        model_prefix=str(folder / "gemma" / "tokenizer"),
        model_type="bpe",
        byte_fallback=True,
        split_digits=True,
        normalization_rule_name="identity",
        add_dummy_prefix=False,
        remove_extra_whitespaces=False,
        bos_id=2,
        unk_id=3,
        bos_piece="<bos>",
        eos_piece="<eos>",
        **common,
    )
    bert = hf_tokenizers.BertWordPieceTokenizer(lowercase=True)
    bert.train_from_iterator(captions, vocab_size=4000, show_progress=False)
    bert.save_model(str(folder / "bert"))


@pytest.fixture(scope="module")
def peers(tmp_path_factory):
    """The texts, and a folder with OpenCLIP's tokens of them for each of ``JOBS``."""
    folder = tmp_path_factory.mktemp("peers")
    captions = real_captions()
    texts = captions + hard_texts(captions)
    train_vocabularies(folder, captions)
    (folder / "texts.json").write_text(json.dumps([list(map(ord, text)) for text in texts]))
    (folder / "jobs.json").write_text(json.dumps(JOBS))
    command = [PEERS / "bin" / "python", "-c", OPEN_CLIP, folder]
    done = subprocess.run(command, capture_output=True, text=True, env=os.environ | {"HF_HUB_OFFLINE": "1"})
    assert done.returncode == 0, done.stderr[-3000:]
    return texts, folder


def differing(tokenizer, job: str, peers) -> list[str]:
    """The texts whose tokens differ from OpenCLIP's."""
    texts, folder = peers
    ours, theirs = tokenizer(texts), np.load(folder / f"{job}.npy")
    assert ours.shape == theirs.shape
    assert len(texts) > 10_000
    return [text for text, differs in zip(texts, (ours != theirs).any(axis=1), strict=True) if differs]


@pytest.mark.parametrize(("context_length", "job"), [(77, "clip_77"), (16, "clip_16")])
def test_clip_equals_open_clip_on_every_text(context_length, job, peers):
    assert differing(tokenizers.clip(VOCAB, context_length), job, peers) == []


@pytest.mark.parametrize(
    ("folder", "version", "context_length", "clean"),
    [
        ("t5", 1, 64, "canonicalize"),
        ("t5", 1, 16, "lower"),
        ("gemma", 2, 64, "canonicalize"),
        ("gemma", 2, 64, "lower"),
    ],
)
def test_siglip_from_tokenizer_json_equals_open_clip_on_every_text(folder, version, context_length, clean, peers):
    file = peers[1] / folder / "saved" / "tokenizer.json"
    job = f"siglip{'' if version == 1 else 2}_{'canonical' if clean == 'canonicalize' else clean}"
    assert differing(tokenizers.siglip(file, context_length, version, clean), job, peers) == []


def test_siglip_from_sentencepiece_differs_from_open_clip_only_where_rust_normalizes_otherwise(peers):
    """Rust looks compatibility characters up by grapheme, SentencePiece by character."""
    tokenizer = tokenizers.siglip(peers[1] / "t5" / "spiece.model")
    texts = differing(tokenizer, "siglip_canonical", peers)
    assert len(texts) <= 5
    assert not any(unicodedata.is_normalized("NFKC", text) for text in texts)


def test_siglip2_from_sentencepiece_differs_from_open_clip_only_where_a_text_spells_special_tokens(peers):
    tokenizer = tokenizers.siglip(peers[1] / "gemma" / "tokenizer.model", version=2)
    assert differing(tokenizer, "siglip2_lower", peers) == [text for text in SPELLED if text in peers[0]]
    tokenizer = tokenizers.siglip(peers[1] / "gemma" / "tokenizer.model", version=2, clean="canonicalize")
    assert differing(tokenizer, "siglip2_canonical", peers) == []


@pytest.mark.parametrize("file", ["vocab.txt", "saved/tokenizer.json"])
def test_wordpiece_equals_open_clip_on_every_text(file, peers):
    assert differing(tokenizers.wordpiece(peers[1] / "bert" / file), "clipa", peers) == []
