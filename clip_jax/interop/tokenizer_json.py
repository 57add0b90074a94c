"""SentencePiece models and CLIP's merges -> Transformers' ``tokenizer.json`` and ``tokenizer_config.json``.

The file holds the pieces, the normalization that SentencePiece compiled into its model, and as much of
``data/tokenizers/cleaning.py`` as a JSON file can: quotes, the usual HTML entities, ligatures, the width of characters,
case, punctuation, white space. It cannot repair wrongly decoded text as ftfy does; OpenCLIP does that itself,
Transformers does not.
"""

import re
import string
from typing import Any

import tokenizers
from ftfy import chardata
from sentencepiece import sentencepiece_model_pb2
from tokenizers import AddedToken, Regex, decoders, models, normalizers, pre_tokenizers, processors

from clip_jax.data.tokenizers import Tokenizer
from clip_jax.data.tokenizers.byte_pairs import WORD

FRAMED = {"pad": "<|pad|>", "unk": "<|unknown|>", "bos": "<|startoftext|>", "eos": "<|endoftext|>"}
"""The special tokens of clip_jax's own vocabularies. In a text SentencePiece reads "<s>" (HTML) as letters, and
``tokenizers`` always as the special token of that name: hence names that no caption has."""

OPENAI = {"unk": "<|endoftext|>", "bos": "<|startoftext|>", "eos": "<|endoftext|>", "pad": "<|endoftext|>"}
"""CLIP's special tokens as Transformers spells them; OpenCLIP's "<start_of_text>" has the same id. Transformers pads
with the end token and OpenCLIP with 0, which no embedding depends on."""

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


def of_merges(tokenizer: Tokenizer) -> dict[str, dict[str, Any] | str]:
    """The two files of CLIP's byte-pair encoding.

    Transformers' own CLIPTokenizer keeps curly quotes, HTML entities and full-width letters, with which OpenAI's and
    OpenCLIP's models were never trained: the class is therefore the one that reads everything from the file.
    """
    codec, end = tokenizer.codec, OPENAI["eos"]
    symbols = [*codec.symbols[:-2], OPENAI["bos"], end]
    vocabulary = {symbol: i for i, symbol in enumerate(symbols)}
    made = tokenizers.Tokenizer(models.BPE(vocabulary, codec.merges, unk_token=end, end_of_word_suffix="</w>"))
    same = chardata.LIGATURES | chardata.WIDTH_MAP
    repairs = [normalizers.Replace(chr(character), str(to)) for character, to in same.items()]
    made.normalizer = normalizers.Sequence([*repairs, _normalizer(b"", "lower")])
    words = pre_tokenizers.Split(Regex(WORD.pattern), behavior="removed", invert=True)
    made.pre_tokenizer = pre_tokenizers.Sequence(
        [words, pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)]
    )
    made.decoder = decoders.Sequence([decoders.ByteLevel(), decoders.Replace("</w>", " "), decoders.Strip(" ", 0, 1)])
    made.post_processor = processors.TemplateProcessing(
        single=f"{OPENAI['bos']} $A {end}", special_tokens=[(x, vocabulary[x]) for x in (OPENAI["bos"], end)]
    )
    made.add_special_tokens([AddedToken(x, normalized=False, special=True) for x in (OPENAI["bos"], end)])
    return {"tokenizer.json": made.to_str(), "tokenizer_config.json": _config(OPENAI, tokenizer.context_length)}


def of_pieces(tokenizer: Tokenizer) -> dict[str, dict[str, Any] | str]:
    """The two files by name, JSON text and plain values, of a tokenizer whose codec holds a SentencePiece model."""
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
    converted = _converted(model, tokenizer.codec.clean, special, ids)
    config = _config(special, tokenizer.context_length)
    return {"tokenizer.json": converted.to_str(pretty=True), "tokenizer_config.json": config}


def _config(special: dict[str, str], context_length: int) -> dict[str, Any]:
    return {
        "tokenizer_class": "PreTrainedTokenizerFast",
        **{f"{kind}_token": name for kind, name in special.items()},
        "model_max_length": context_length,
        "padding_side": "right",
        "truncation_side": "right",
        "clean_up_tokenization_spaces": False,
    }


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
