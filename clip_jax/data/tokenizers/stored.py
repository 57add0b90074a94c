"""The tokenizer that a run folder carries in ``tokenizer/``, so that the folder needs nothing else."""

from pathlib import Path

from clip_jax.data.tokenizers import KINDS, Tokenizer, files
from clip_jax.errors import UserError
from clip_jax.storage import atomic

FOLDER = "tokenizer"


def tokenizer_file(folder: Path, kind: str) -> Path | None:
    """The tokenizer's file in a run folder; None if it has none yet."""
    return files.find(folder / FOLDER, kind)


def write_tokenizer(folder: Path, kind: str, data: bytes) -> None:
    """Writes the tokenizer's file, under the name of the format that ``data`` is in."""
    is_json = data[:1] == b"{"
    file = folder / FOLDER / (files.JSON if is_json else files.native_name(kind))
    file.parent.mkdir(parents=True, exist_ok=True)
    atomic.write_bytes(file, data)


def open_tokenizer(folder: Path, kind: str, context_length: int) -> Tokenizer:
    """The tokenizer of a run folder; UserError if its file is missing."""
    file = tokenizer_file(folder, kind)
    if file is None:
        raise UserError(f"{folder / FOLDER / files.native_name(kind)}: missing; restore the run's folder as it was")
    return KINDS[kind](file, context_length)
