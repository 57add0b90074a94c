"""A SentencePiece model -> the ``tokenizer.json`` and ``tokenizer_config.json`` of Transformers and OpenCLIP.

The file holds the pieces, the normalization that SentencePiece compiled into its model, and as much of
``data/tokenizers/cleaning.py`` as a JSON file can: quotes, the usual HTML entities, case, punctuation, white space. It
cannot repair wrongly decoded text as ftfy does; OpenCLIP does that itself, Transformers does not.
"""

import re
import string
from typing import Any

import tokenizers
from sentencepiece import sentencepiece_model_pb2
from tokenizers import AddedToken, Regex, decoders, models, normalizers, pre_tokenizers, processors

from clip_jax.data.tokenizers import Tokenizer

FRAMED = {"pad": "<|pad|>", "unk": "<|unknown|>", "bos": "<|startoftext|>", "eos": "<|endoftext|>"}
"""The special tokens of clip_jax's own vocabularies. In a text SentencePiece reads "<s>" (HTML) as letters, and
``tokenizers`` always as the special token of that name: hence names that no caption has."""

UNIGRAM, BPE = 1, 2  # TrainerSpec.ModelType
NORMAL, USER_DEFINED = 1, 4  # ModelProto.SentencePiece.Type

# What ftfy removes and straightens, and what html.unescape resolves most; "&amp;" twice, for "&amp;lt;" is common.
REPAIRS = (
    (r"[\x{0}-\x{8}\x{B}\x{E}-\x{1F}\x{7F}\x{206A}-\x{206F}\x{FEFF}\x{FFF9}-\x{FFFC}]", ""),
    ("[\u02bc\u2018-\u201b]", "'"),
    ("[\u201c-\u201f]", '"'),
    ("&amp;", "&"),
    ("&amp;", "&"),
    ("&lt;", "<"),
    ("&gt;", ">"),
    ("&quot;", '"'),
    ("&#0?39;|&apos;", "'"),
    ("&nbsp;", " "),
)


def files(tokenizer: Tokenizer) -> dict[str, dict[str, Any] | str]:
    """The two files by name: JSON text, and plain values. The tokenizer's codec holds a SentencePiece model."""
    model = sentencepiece_model_pb2.ModelProto()
    model.ParseFromString(tokenizer.codec.processor.serialized_model_proto())
    if tokenizer.start_id is None:
        ids = {"pad": tokenizer.pad_id, "eos": tokenizer.end_id, "unk": model.trainer_spec.unk_id}
        special = {kind: model.pieces[i].piece for kind, i in ids.items()}
    else:
        ids = {"pad": 0, "unk": model.trainer_spec.unk_id, "bos": tokenizer.start_id, "eos": tokenizer.end_id}
        special = FRAMED
        for kind, name in special.items():
            model.pieces[ids[kind]].piece = name
    config = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        **{f"{kind}_token": name for kind, name in special.items()},
        "model_max_length": tokenizer.context_length,
        "padding_side": "right",
        "truncation_side": "right",
        "clean_up_tokenization_spaces": False,
    }
    converted = _converted(model, tokenizer.codec.clean, special, ids)
    return {"tokenizer.json": converted.to_str(pretty=True), "tokenizer_config.json": config}


def _converted(model: Any, clean: str, special: dict[str, str], ids: dict[str, int]) -> tokenizers.Tokenizer:
    converted = tokenizers.Tokenizer(_model(model, special["unk"]))
    spec = model.normalizer_spec
    converted.normalizer = _normalizer(spec.precompiled_charsmap, clean)
    converted.pre_tokenizer = pre_tokenizers.Metaspace(
        prepend_scheme="always" if spec.add_dummy_prefix else "never", split=model.trainer_spec.split_by_whitespace
    )
    converted.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    framed = [kind for kind in ("bos", "eos") if kind in special]
    template = f"{special['bos']} $A {special['eos']}" if "bos" in special else f"$A {special['eos']}"
    converted.post_processor = processors.TemplateProcessing(
        single=template, special_tokens=[(special[kind], ids[kind]) for kind in framed]
    )
    converted.add_special_tokens([AddedToken(name, normalized=False, special=True) for name in special.values()])
    converted.add_tokens([AddedToken(x.piece, normalized=False) for x in model.pieces if x.type == USER_DEFINED])
    return converted


def _model(model: Any, unknown: str) -> models.Model:
    pieces, fallback = model.pieces, model.trainer_spec.byte_fallback
    if model.trainer_spec.model_type == UNIGRAM:
        scores = [(x.piece, x.score) for x in pieces]
        return models.Unigram(scores, unk_id=model.trainer_spec.unk_id, byte_fallback=fallback)
    vocabulary = {x.piece: i for i, x in enumerate(pieces)}
    # SentencePiece joins the neighbors whose joint piece has the best score; here each pair of parts has a rank.
    merges = [
        (-x.score, vocabulary[x.piece[:k]], vocabulary[x.piece[k:]])
        for x in pieces
        if x.type == NORMAL
        for k in range(1, len(x.piece))
        if x.piece[:k] in vocabulary and x.piece[k:] in vocabulary
    ]
    pairs = [(pieces[left].piece, pieces[right].piece) for _, left, right in sorted(merges)]
    return models.BPE(vocabulary, pairs, unk_token=unknown, byte_fallback=fallback, fuse_unk=True)


def _normalizer(charsmap: bytes, clean: str) -> normalizers.Normalizer:
    """``cleaning.CLEANERS[clean]``, then SentencePiece's own normalization."""
    steps = [normalizers.NFC(), *(normalizers.Replace(Regex(found), to) for found, to in REPAIRS)]
    if clean == "canonicalize":
        punctuation = Regex(f"[{re.escape(string.punctuation.replace('_', ''))}]")
        steps += [normalizers.Replace("_", " "), normalizers.Replace(punctuation, "")]
    if clean != "whitespace":
        steps.append(normalizers.Lowercase())
    if charsmap:
        steps.append(normalizers.Precompiled(charsmap))
    return normalizers.Sequence([*steps, normalizers.Replace(Regex(r"\s+"), " "), normalizers.Strip()])
