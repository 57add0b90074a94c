"""The tokenizer that a foreign folder or the user gives, checked against the text tower that it feeds."""

from pathlib import Path

from clip_jax.data.tokenizers import KINDS, Tokenizer, files, hub, siglip
from clip_jax.data.tokenizers.hugging_face import from_file
from clip_jax.errors import UserError
from clip_jax.interop import folders
from clip_jax.models.text import TextTower

# A table of embeddings may be padded to a multiple of 128; CLIPA's keeps 32,000 rows for BERT's 30,522 tokens.
UNUSED_ROWS = {"clipa": 32_000 - 30_522}
# T5's and mT5's files name a hundred extra tokens after the last row of SigLIP's towers; no caption spells them.
EXTRA_TOKENS = {"siglip": 100}
VERSIONS = {"siglip": 1, "siglip2": 2}


def find(folder: Path, kind: str) -> list[Path]:
    """The files that may hold the tokenizer of a folder of weights or of a run, the most reliable first.

    A ``sentencepiece.model`` is clip_jax's own, beside its conversion for other libraries.
    """
    names = dict.fromkeys((*files.FILES["sentencepiece"], *files.FILES.get(kind, ()), files.JSON))
    return [parent / name for parent in (folder, folder / "tokenizer") for name in names if (parent / name).is_file()]


def open_tokenizer(where: Path, kind: str, tower: TextTower, clean: str = "none") -> Tokenizer | None:
    """The tokenizer in a file or folder that fits the tower; None if a folder holds none.

    It is of the given kind, or what a ``tokenizer.json`` describes; ``clean`` is what the model's library does with a
    text before such a file, or SigLIP's of any format, reads it. Raises UserError if all files are of another model.
    """
    problems = []
    if not where.exists():
        raise UserError(f"{where}: no such file or folder")
    for file in [where] if where.is_file() else find(where, kind):
        try:
            return fitting(_open(file, kind, tower.context_length, clean), kind, tower, str(file))
        except UserError as error:
            problems.append(error)
    if problems:
        raise problems[0]
    return None


def given(tokenizer: str | Path | Tokenizer, kind: str, tower: TextTower, clean: str = "none") -> Tokenizer:
    """The user's tokenizer, or the one in a file or folder (``hf://`` too). Raises UserError if it does not fit."""
    if isinstance(tokenizer, Tokenizer):
        return fitting(tokenizer, kind, tower, "tokenizer")
    found = open_tokenizer(folders.local(tokenizer), kind, tower, clean)
    if found is None:
        raise UserError(f"{tokenizer}: no tokenizer is there; give a tokenizer.json or a folder that holds it")
    return found


def published(kind: str, tower: TextTower, clean: str = "none") -> Tokenizer:
    """The published vocabulary of a kind, from the cache or the hub. Raises UserError."""
    file = hub.download(kind, tower.vocab_size)
    return fitting(_of_kind(kind, file, tower.context_length, clean), kind, tower, str(file))


def fitting(tokenizer: Tokenizer, kind: str, tower: TextTower, origin: str) -> Tokenizer:
    """The tokenizer. Raises UserError if its ids or its end token are not those that the tower was trained on."""
    tokens, rows = tokenizer.vocab_size, tower.vocab_size
    if tokens - rows > EXTRA_TOKENS.get(kind, 0) or rows - tokens > UNUSED_ROWS.get(kind, 127):
        raise UserError(
            f"{origin}: a vocabulary of {tokens} tokens, but the model's text tower has {rows}; give the tokenizer "
            "that it was trained with: load(..., tokenizer=PATH)"
        )
    end = {"argmax": tokens - 1, "eos": tower.eos_id}.get(tower.pooling, tokenizer.end_id)
    if tokenizer.end_id != end:
        raise UserError(
            f"{origin}: ends a text with the token {tokenizer.end_id}, but the model pools it at {end}; give the "
            "tokenizer that it was trained with: load(..., tokenizer=PATH)"
        )
    return tokenizer


def _open(file: Path, kind: str, context_length: int, clean: str) -> Tokenizer:
    if file.suffix == ".model" and kind not in ("siglip", "siglip2"):
        return KINDS["sentencepiece"](file, context_length)
    if kind in KINDS:
        try:
            return _of_kind(kind, file, context_length, clean)
        except UserError:
            if file.suffix != ".json":
                raise
    return from_file(file, context_length, clean)


def _of_kind(kind: str, file: Path, context_length: int, clean: str) -> Tokenizer:
    # OpenCLIP's config says how a SigLIP's texts are cleaned; for SigLIP 2 otherwise than in Transformers.
    if kind in VERSIONS and clean != "none":
        return siglip(file, context_length, VERSIONS[kind], clean)
    return KINDS[kind](file, context_length)
