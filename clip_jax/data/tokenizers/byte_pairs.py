"""CLIP's byte-pair encoding (Radford et al. 2021, section 2.4), token for token the same as OpenCLIP's SimpleTokenizer.

Words are split in Python, with OpenCLIP's pattern; the Rust library merges each new word once.
"""

import gzip
import hashlib
import json
import zlib
from collections.abc import Sequence
from importlib.metadata import version
from pathlib import Path

import regex
from tokenizers.models import BPE

from clip_jax.data.tokenizers import cleaning, hub
from clip_jax.data.tokenizers.files import OPENAI_MERGES
from clip_jax.data.tokenizers.tokenizer import Tokenizer, fingerprint
from clip_jax.errors import UserError

Merges = list[tuple[str, str]]

MERGES = 49152 - 256 - 2  # The file has 262,144; CLIP uses the first ones.
MERGES_SHA256 = "f61f2adf497e6f5357c347aeb4646fabe82f341e946de5bdec5d2858e41bef4a"  # of the lines that CLIP uses
START, END = "<start_of_text>", "<end_of_text>"

# Captions spell the special tokens in any case; "'ſ" is "'s" to IGNORECASE. Digits stand alone.
WORD = regex.compile(
    rf"{START}|{END}|'s|'t|'re|'ve|'m|'ll|'d|[\p{{L}}]+|[\p{{N}}]|[^\s\p{{L}}\p{{N}}]+", regex.IGNORECASE
)


def clip(vocab: str | Path | None, context_length: int = 77) -> Tokenizer:
    """CLIP's tokenizer: 49,408 tokens, lower case, end token highest, padded with 0 (which is also the token of "!").

    ``vocab`` is a ``bpe_simple_vocab_16e6.txt.gz``, or the ``merges.txt`` or ``tokenizer.json`` of a Hugging Face CLIP
    folder; empty: that of ``openai/clip-vit-base-patch32`` from the Hugging Face cache or hub. UserError when the file
    is missing or is not CLIP's.
    """
    path = Path(vocab) if vocab else hub.download("clip")
    merges = _read_merges(path)
    if hashlib.sha256("\n".join(" ".join(pair) for pair in merges).encode()).hexdigest() != MERGES_SHA256:
        raise UserError(
            f"{path}: not CLIP's vocabulary; give OpenAI's {OPENAI_MERGES}, or leave the setting empty "
            f"to take that of {hub.REPOSITORIES['clip']} from the Hugging Face hub"
        )
    codec = BytePairs(merges)
    return Tokenizer(
        codec=codec,
        context_length=context_length,
        vocab_size=len(codec.symbols),
        start_id=codec.ids[START],
        end_id=codec.ids[END],
        pad_id=0,
        fingerprint=fingerprint(
            "clip",
            merges=MERGES_SHA256,
            context_length=context_length,
            regex=version("regex"),  # its tables say what a letter is
            **cleaning.versions(),
        ),
    )


class BytePairs:
    """Byte-pair encoding of lower-cased words; caches short words, which makes it fast."""

    WORDS = 1 << 17  # Cached at most (about 40 MB); then the cache is emptied, and frequent words are soon back.
    LONGEST = 32  # Characters of a cached word. A Chinese caption is one "word", and rarely repeats.

    def __init__(self, merges: Merges):
        self.merges = merges
        letters = list(_BYTES.values())
        self.symbols = [*letters, *(b + "</w>" for b in letters), *("".join(pair) for pair in merges), START, END]
        self.ids = {symbol: i for i, symbol in enumerate(self.symbols)}
        self.bpe = BPE(self.ids, merges, end_of_word_suffix="</w>")
        self.words: dict[str, list[int]] = {}

    def __reduce__(self):
        return BytePairs, (self.merges,)  # Without the cache.

    def encode(self, text: str) -> list[int]:
        known = self.words.get
        ids = []
        # The pattern never crosses white space, so that the ids of a caption are those of its words, joined.
        for word in cleaning.lower(text).split():
            cached = known(word)
            ids += self._encode_word(word) if cached is None else cached
        return ids

    def _encode_word(self, word: str) -> list[int]:
        ids = []
        for part in WORD.findall(word):
            if part in (START, END):
                ids.append(self.ids[part])
            else:
                symbols = part.encode().decode("latin-1").translate(_BYTES)
                ids += [token.id for token in self.bpe.tokenize(symbols)]
        if len(word) <= self.LONGEST:
            if len(self.words) >= self.WORDS:
                self.words.clear()
            self.words[word] = ids
        return ids

    def decode(self, ids: Sequence[int]) -> str:
        symbols = "".join(self.symbols[i] for i in ids)
        return bytes(_LETTERS[symbol] for symbol in symbols).decode(errors="replace").replace("</w>", " ")


def _byte_symbols() -> dict[int, str]:
    """GPT-2's letter for each byte: itself when it can be printed, else one from U+0100 on; the order makes the ids."""
    printable = [*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1), *range(ord("®"), ord("ÿ") + 1)]
    others = [b for b in range(256) if b not in printable]
    return {b: chr(b) for b in printable} | {b: chr(256 + n) for n, b in enumerate(others)}


_BYTES = _byte_symbols()
_LETTERS = {symbol: byte for byte, symbol in _BYTES.items()}


def _read_merges(path: Path) -> Merges:
    try:
        raw = path.read_bytes()
        if path.suffix == ".json":
            merges = json.loads(raw)["model"]["merges"][:MERGES]
            return [tuple(pair.split(" ") if isinstance(pair, str) else pair) for pair in merges]
        text = (gzip.decompress(raw) if raw[:2] == b"\x1f\x8b" else raw).decode()
        return [tuple(line.split()) for line in text.split("\n")[1 : MERGES + 1]]  # The first line is a title.
    except FileNotFoundError:
        raise UserError(f"{path}: no such file; the vocabulary of CLIP is {OPENAI_MERGES}") from None
    except (OSError, EOFError, zlib.error, ValueError, KeyError, TypeError) as error:
        raise UserError(f"{path}: cannot be read as CLIP's vocabulary ({error})") from error
