"""The part that all tokenizers share: start, end and padding around the ids of a text."""

import dataclasses
import hashlib
import json
from collections.abc import Sequence
from typing import Protocol

import numpy as np

from clip_jax.data.valid_text import valid
from clip_jax.errors import UserError


class Codec(Protocol):
    """One text to ids, without start, end and padding, and back."""

    def encode(self, text: str) -> Sequence[int]: ...

    def decode(self, ids: Sequence[int]) -> str: ...


@dataclasses.dataclass(frozen=True)
class Tokenizer:
    """``tokenizer(texts)`` is ``int32[n, context_length]``: start, the text's ids, end, padding.

    A text that is too long loses its last ids and keeps its end ("sticky" in big_vision). ``fingerprint`` names
    everything that a token depends on: the vocabulary, the context length, the rules and the versions of
    their libraries. It can be pickled, for worker processes.
    """

    codec: Codec
    context_length: int
    vocab_size: int
    start_id: int | None
    end_id: int
    pad_id: int
    fingerprint: str

    def __post_init__(self):
        least = 1 if self.start_id is None else 2
        if self.context_length < least:
            raise UserError(f"context_length={self.context_length}: a text needs at least {least} positions")

    def __call__(self, texts: Sequence[str]) -> np.ndarray:
        if isinstance(texts, str):  # A str is a sequence of str too: it would become one row per character.
            raise TypeError("a tokenizer takes a sequence of texts; for one text, pass [text]")
        rows = np.full((len(texts), self.context_length), self.pad_id, np.int32)
        start = [] if self.start_id is None else [self.start_id]
        for row, text in zip(rows, texts, strict=True):
            ids = [*start, *self.codec.encode(valid(text)), self.end_id][: self.context_length]
            ids[-1] = self.end_id
            row[: len(ids)] = ids
        return rows

    def length(self, text: str) -> int:
        """The tokens of a text before it is cut, with start and end."""
        return len(self.codec.encode(valid(text))) + (1 if self.start_id is None else 2)

    def decode(self, row: Sequence[int]) -> str:
        """The text of one row, up to its first end token."""
        ids = [int(i) for i in row]
        first = 0 if self.start_id is None or ids[:1] != [self.start_id] else 1
        last = ids.index(self.end_id, first) if self.end_id in ids[first:] else len(ids)
        return self.codec.decode(ids[first:last]).strip()


def fingerprint(kind: str, **facts: str | int) -> str:
    """``kind-`` and 16 hexadecimal digits that change with any of the facts."""
    digest = hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()
    return f"{kind}-{digest[:16]}"
