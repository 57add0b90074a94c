"""SentencePiece (Kudo & Richardson 2018): the published vocabularies of SigLIP, and ones trained on your captions."""

import dataclasses
import hashlib
import io
import re
from collections.abc import Iterable, Sequence
from pathlib import Path

import sentencepiece as spm

from clip_jax.data.tokenizers import cleaning
from clip_jax.data.tokenizers.hugging_face import HuggingFace, from_json
from clip_jax.data.tokenizers.tokenizer import Tokenizer, fingerprint
from clip_jax.errors import UserError
from clip_jax.storage import atomic

# Version: name of the files, first pieces, pad id, cleaning.
_SIGLIP = {
    1: ("T5's c4_en or mc4", ["<pad>", "</s>", "<unk>"], 1, "canonicalize"),
    2: ("Gemma's", ["<pad>", "<eos>", "<bos>", "<unk>"], 0, "lower"),
}


@dataclasses.dataclass(frozen=True)
class Pieces:
    """A SentencePiece model, which never mistakes a text for its control symbols."""

    processor: spm.SentencePieceProcessor
    clean: str

    def encode(self, text: str) -> list[int]:
        return self.processor.encode(cleaning.CLEANERS[self.clean](text))

    def decode(self, ids: Sequence[int]) -> str:
        return self.processor.decode(list(ids))

    def piece(self, token_id: int) -> str | None:
        return self.processor.id_to_piece(token_id) if token_id < self.size else None

    @property
    def size(self) -> int:
        return self.processor.vocab_size()


def siglip(model_file: str | Path, context_length: int = 64, version: int = 1, clean: str = "") -> Tokenizer:
    """The tokenizer of SigLIP (Zhai et al. 2023) or, ``version=2``, SigLIP 2: no start token, 1 ends a text.

    Version 1 pads with the end token, version 2 with 0; both towers pool the last position, so that the context length
    belongs to the model. ``model_file`` is the SentencePiece ``.model``, which the original reads with the same
    library, or the ``tokenizer.json`` that OpenCLIP and Hugging Face read; the two agree except for rare compatibility
    characters.

    ``clean`` is a name of ``cleaning.CLEANERS``; empty means "canonicalize" for version 1, as in OpenCLIP and Hugging
    Face, and "lower" for 2, as in Hugging Face. The original lower-cases captions in both and canonicalizes only the
    prompts of zero-shot classification; OpenCLIP canonicalizes everything in both.
    """
    path = Path(model_file)
    if version not in _SIGLIP or (clean and clean not in cleaning.CLEANERS):
        raise UserError(
            f"siglip tokenizer: version={version!r}, clean={clean!r}: version is 1 or 2, "
            f"clean is empty or one of {', '.join(cleaning.CLEANERS)}"
        )
    name, first_pieces, pad_id, usual_clean = _SIGLIP[version]
    codec, digest = _read(path, clean or usual_clean)
    if [codec.piece(i) for i in range(len(first_pieces))] != first_pieces:
        raise UserError(
            f"{path}: not a vocabulary of SigLIP {version} (it should be {name}, beginning with "
            f"{' '.join(first_pieces)})"
        )
    return Tokenizer(
        codec=codec,
        context_length=context_length,
        vocab_size=codec.size,
        start_id=None,
        end_id=1,
        pad_id=pad_id,
        fingerprint=fingerprint(
            f"siglip{version}",
            model=digest,
            context_length=context_length,
            clean=codec.clean,
            **cleaning.versions(),
        ),
    )


def sentencepiece(model_file: str | Path, context_length: int) -> Tokenizer:
    """A tokenizer from ``train_sentencepiece``, framed like CLIP's: start, pieces, end, padded with 0.

    The end token has the highest id, where CLIP's text tower looks for it (argmax of the ids).
    """
    path = Path(model_file)
    codec, digest = _read(path, "lower")
    if not isinstance(codec, Pieces) or not _is_ours(codec.processor):
        raise UserError(f"{path}: not a tokenizer of ours (the two highest ids should be start and end, 0 padding)")
    return Tokenizer(
        codec=codec,
        context_length=context_length,
        vocab_size=codec.size,
        start_id=codec.size - 2,
        end_id=codec.size - 1,
        pad_id=0,
        fingerprint=fingerprint("sentencepiece", model=digest, context_length=context_length, **cleaning.versions()),
    )


def train_sentencepiece(captions: Iterable[str], vocab_size: int, model_file: str | Path) -> None:
    """Train a byte-pair vocabulary on captions, the same bytes every time, and write it.

    Ids: 0 padding, 1 unknown, 256 bytes (what the pieces cannot spell is spelled in bytes), the pieces, start, end.
    The vocabulary is smaller than ``vocab_size`` where the captions do not hold that many pieces. All captions are
    in memory; a million of them are enough. UserError when there are none, or ``vocab_size`` is too small for
    their characters.
    """
    # Longer lines than 4192 bytes would be left out; any tower truncates a caption well before that.
    lines = [line[:1000] for line in map(cleaning.lower, captions) if line]
    if not lines:
        raise UserError(f"{model_file}: no captions to train a tokenizer on")
    try:
        model = _train(lines, vocab_size, start_id=vocab_size - 2)
    except RuntimeError as error:
        if too_small := re.search(r"smaller than required_chars\. \d+ vs (\d+)", str(error)):
            raise UserError(
                f"vocab_size={vocab_size} is too small for these captions: they need {too_small[1]} at least "
                "(256 bytes, their characters, and 4 special tokens)"
            ) from error
        # The captions do not fill it, and the trainer wants the highest ids to be those of the full size. Without
        # start and end it shrinks by itself: its size is the one that can be filled.
        filled = spm.SentencePieceProcessor(model_proto=_train(lines, vocab_size, start_id=None)).vocab_size() + 2
        model = _train(lines, filled, start_id=filled - 2)
    _write(model, Path(model_file))


def _train(lines: list[str], vocab_size: int, start_id: int | None) -> bytes:
    model = io.BytesIO()
    spm.SentencePieceTrainer.train(
        sentence_iterator=iter(lines),
        model_writer=model,
        # Unigram's pieces must occur in several different words: where there are few words it ends in letters.
        model_type="bpe",
        vocab_size=vocab_size,
        hard_vocab_limit=False,
        pad_id=0,
        unk_id=1,
        bos_id=-1 if start_id is None else start_id,
        eos_id=-1 if start_id is None else start_id + 1,
        byte_fallback=True,
        character_coverage=0.9995,  # the rarest characters go to bytes; SentencePiece's advice for large scripts
        normalization_rule_name="nmt_nfkc_cf",  # compatibility characters and case are folded in the file itself
        num_threads=4,  # a fixed number: it is written into the file
        minloglevel=2,  # errors only
    )
    return model.getvalue()


def _write(model: bytes, path: Path) -> None:
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        atomic.write_bytes(path, model)
    except OSError as error:
        raise UserError(f"{path}: cannot be written ({error.strerror})") from error


def _read(path: Path, clean: str) -> tuple[Pieces | HuggingFace, str]:
    """The codec of a ``.model`` or ``.json`` file, and the file's sha256."""
    try:
        raw = path.read_bytes()
        if path.suffix == ".json":
            codec = from_json(raw.decode(), clean)
        else:
            codec = Pieces(spm.SentencePieceProcessor(model_proto=raw), clean)
    except (OSError, ValueError, RuntimeError) as error:
        raise UserError(f"{path}: cannot be read as a SentencePiece model ({error})") from error
    return codec, hashlib.sha256(raw).hexdigest()


def _is_ours(processor: spm.SentencePieceProcessor) -> bool:
    size = processor.vocab_size()
    return (processor.pad_id(), processor.bos_id(), processor.eos_id()) == (0, size - 2, size - 1)
