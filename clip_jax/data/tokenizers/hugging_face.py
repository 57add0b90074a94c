"""A Hugging Face ``tokenizer.json``, run by the Rust library that wrote it."""

import dataclasses
import hashlib
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import tokenizers

from clip_jax.data.tokenizers import cleaning
from clip_jax.data.tokenizers.tokenizer import Tokenizer, fingerprint
from clip_jax.errors import UserError


@dataclasses.dataclass(frozen=True)
class HuggingFace:
    """The ids of a cleaned text; unlike in SentencePiece, special tokens spelled in a text count as such."""

    tokenizer: tokenizers.Tokenizer
    clean: str

    def encode(self, text: str) -> list[int]:
        return self.tokenizer.encode(cleaning.CLEANERS[self.clean](text), add_special_tokens=False).ids

    def decode(self, ids: Sequence[int]) -> str:
        return self.tokenizer.decode(ids)

    def piece(self, token_id: int) -> str | None:
        return self.tokenizer.id_to_token(token_id)

    @property
    def size(self) -> int:
        return self.tokenizer.get_vocab_size()


def from_json(text: str, clean: str) -> HuggingFace:
    """ValueError when ``text`` is not a tokenizer.json."""
    try:
        tokenizer = tokenizers.Tokenizer.from_str(text)
    except Exception as error:  # The library raises plain Exception.
        raise ValueError(str(error)) from error
    # Both are often saved in the file, and would apply before the end token is added.
    tokenizer.no_truncation()
    tokenizer.no_padding()
    return HuggingFace(tokenizer, clean)


def from_file(file: Path, context_length: int, clean: str = "none") -> Tokenizer:
    """Any ``tokenizer.json`` that ends a text with one token, and starts it with one or none. Raises UserError.

    The padding token is in the ``tokenizer_config.json`` beside it, where Transformers looks for it.
    """
    config = file.parent / "tokenizer_config.json"
    try:
        text = file.read_text(encoding="utf-8")
        codec = from_json(text, clean)
        settings = json.loads(config.read_text(encoding="utf-8")) if config.is_file() else {}
    except (OSError, ValueError) as error:
        raise UserError(f"{file}: cannot be read as a tokenizer.json ({error})") from error
    if settings.get("padding_side", "right") != "right":
        raise UserError(f"{config}: padding_side={settings['padding_side']!r} is not supported")
    bare, framed = (codec.tokenizer.encode("a", add_special_tokens=special).ids for special in (False, True))
    started = framed[: len(framed) - len(bare) - 1]
    if len(started) > 1 or framed != [*started, *bare, *framed[-1:]] or len(framed) == len(bare):
        raise UserError(f"{file}: does not end a text with one token, as CLIP's do")
    return Tokenizer(
        codec=codec,
        context_length=context_length,
        vocab_size=1 + max(codec.tokenizer.get_vocab(with_added_tokens=True).values()),
        start_id=started[0] if started else None,
        end_id=framed[-1],
        pad_id=_padding(codec.tokenizer, settings, text, default=framed[-1]),
        fingerprint=fingerprint(
            "huggingface",
            model=hashlib.sha256(text.encode()).hexdigest(),
            context_length=context_length,
            clean=clean,
            **cleaning.versions(),
        ),
    )


def _padding(tokenizer: tokenizers.Tokenizer, settings: dict[str, Any], text: str, default: int) -> int:
    token = settings.get("pad_token")
    token = token.get("content") if isinstance(token, dict) else token  # with its properties, or by its name alone
    found = tokenizer.token_to_id(token) if token else None
    return (json.loads(text).get("padding") or {}).get("pad_id", default) if found is None else found
