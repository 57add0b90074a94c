"""WordPiece (Devlin et al. 2019): the tokenizer of CLIPA, bert-base-uncased without its separator."""

import dataclasses
import hashlib
from collections.abc import Sequence
from pathlib import Path

import tokenizers
from tokenizers import decoders, models, normalizers, pre_tokenizers

from clip_jax.data.tokenizers import cleaning
from clip_jax.data.tokenizers.hugging_face import HuggingFace, from_json
from clip_jax.data.tokenizers.tokenizer import Tokenizer, fingerprint
from clip_jax.errors import UserError

SPECIAL = ("[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]")


def wordpiece(vocab_file: str | Path, context_length: int = 32) -> Tokenizer:
    """CLIPA's tokenizer (Li et al. 2023): [CLS], the text's ids, then zeros; a long text ends in a zero.

    ``vocab_file`` is BERT's ``vocab.txt``, or a ``tokenizer.json``. CLIPA pools the last position and overwrites [SEP]
    with 0, which is [PAD] (OpenCLIP: ``strip_sep_token``). Its text towers have 32,000 embeddings; BERT fills 30,522.
    """
    path = Path(vocab_file)
    try:
        text = path.read_bytes().decode()
        inner = from_json(text, "whitespace") if path.suffix == ".json" else _from_vocabulary(text)
    except (OSError, ValueError) as error:
        raise UserError(f"{path}: cannot be read as a WordPiece vocabulary ({error})") from error
    ids = {token: inner.tokenizer.token_to_id(token) for token in SPECIAL[:4]}
    if ids["[PAD]"] != 0 or None in ids.values():
        raise UserError(f"{path}: not a vocabulary of BERT: it should begin with [PAD] and hold {', '.join(SPECIAL)}")
    return Tokenizer(
        codec=WordPieces(inner, separator=ids["[SEP]"]),
        context_length=context_length,
        vocab_size=inner.size,
        start_id=ids["[CLS]"],
        end_id=0,
        pad_id=0,
        fingerprint=fingerprint(
            "wordpiece",
            vocabulary=hashlib.sha256(text.encode()).hexdigest(),
            context_length=context_length,
            **cleaning.versions(),
        ),
    )


@dataclasses.dataclass(frozen=True)
class WordPieces:
    """BERT's pieces; a separator spelled in a caption is overwritten like the one at the end."""

    inner: HuggingFace
    separator: int

    def encode(self, text: str) -> list[int]:
        return [0 if i == self.separator else i for i in self.inner.encode(text)]

    def decode(self, ids: Sequence[int]) -> str:
        return self.inner.decode(ids)


def _from_vocabulary(text: str) -> HuggingFace:
    tokens = text.rstrip("\n").split("\n")
    vocabulary = {token.rstrip("\r"): i for i, token in enumerate(tokens)}
    tokenizer = tokenizers.Tokenizer(models.WordPiece(vocabulary, unk_token="[UNK]"))
    tokenizer.normalizer = normalizers.BertNormalizer(lowercase=True)  # with accents stripped: BERT's "uncased"
    tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    tokenizer.decoder = decoders.WordPiece()
    tokenizer.add_special_tokens([token for token in SPECIAL if token in vocabulary])
    return HuggingFace(tokenizer, "whitespace")
