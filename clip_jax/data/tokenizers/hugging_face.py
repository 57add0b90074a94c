"""A Hugging Face ``tokenizer.json``, run by the Rust library that wrote it."""

import dataclasses
from collections.abc import Sequence

import tokenizers

from clip_jax.data.tokenizers import cleaning


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
