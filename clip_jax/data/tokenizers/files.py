"""The files that hold a tokenizer: one table, for run folders, foreign folders and the Hugging Face hub."""

from pathlib import Path

JSON = "tokenizer.json"
"""Hugging Face's format, in which any of the published tokenizers may be stored."""

OPENAI_MERGES = "bpe_simple_vocab_16e6.txt.gz"
"""CLIP's merges as OpenAI and OpenCLIP distribute them."""

FILES = {
    "clip": ("merges.txt", JSON, OPENAI_MERGES),
    "clipa": ("vocab.txt", JSON),
    "siglip": (JSON, "spiece.model"),
    "siglip2": (JSON, "tokenizer.model"),
    "sentencepiece": ("sentencepiece.model",),
}
"""By kind, the files that its tokenizer can be built from, each enough by itself; the most reliable first."""


def find(folder: Path, kind: str) -> Path | None:
    """The file in a folder from which a tokenizer of this kind is built; None if there is none."""
    return next((folder / name for name in FILES[kind] if (folder / name).is_file()), None)


def native_name(kind: str) -> str:
    """The name of the file in the format of the tokenizer's own library, which is not JSON."""
    return next(name for name in FILES[kind] if name != JSON)
