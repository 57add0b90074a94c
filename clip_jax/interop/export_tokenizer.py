"""Writes a model's tokenizer beside its weights, so that Transformers and OpenCLIP give its texts the same ids."""

import json
import shutil
from pathlib import Path

from clip_jax.data.tokenizers import Tokenizer
from clip_jax.data.tokenizers.files import FILES, native_name
from clip_jax.data.tokenizers.sentence_pieces import Pieces
from clip_jax.interop import tokenizer_json
from clip_jax.interop.files import write_json
from clip_jax.storage import run_folder

CONFIG = "tokenizer_config.json"
COPIED = {"tokenizer.json", CONFIG, "special_tokens_map.json", "added_tokens.json"}
# The classes of Transformers that read these kinds' own files as the models were trained.
CLASSES = {"clipa": "BertTokenizer", "siglip": "SiglipTokenizer"}


def write(to: Path, layout: str, kind: str, tokenizer: Tokenizer | None, source: Path) -> list[str]:
    """Writes the files into the folder ``to`` and returns lines for the user.

    ``kind`` is the preset's, ``tokenizer`` the model's (None if it was not found), and ``source`` the folder that
    the model was loaded from.
    """
    if layout == "bigvision":
        return ["tokenizer: left out, big_vision finds its tokenizers itself"]
    if tokenizer is None:
        included = "; OpenCLIP includes its own" if kind == "clip" else ""
        return [f"tokenizer: left out, {kind}'s was not found on this machine{included}"]
    if kind == "clip" and hasattr(tokenizer.codec, "merges"):
        _write_clip(to, tokenizer)
        return ["tokenizer: CLIP's (tokenizer.json, vocab.json, merges.txt)"]
    if isinstance(tokenizer.codec, Pieces) and kind != "siglip":
        # The model file beside them is what ``load`` reads: no conversion is exact for wrongly decoded texts.
        (to / native_name(kind)).write_bytes(tokenizer.codec.processor.serialized_model_proto())
        written = tokenizer_json.of_pieces(tokenizer)
        (to / "tokenizer.json").write_text(written["tokenizer.json"], encoding="utf-8")
        write_json(to / CONFIG, written[CONFIG])
        lines = [f"tokenizer: the model's own ({native_name(kind)}), converted to tokenizer.json"]
        if kind == "sentencepiece" and layout == "openclip":
            lines.append("on the Hugging Face hub, hf_tokenizer_name in open_clip_config.json must be the repository")
        return lines
    folder = source / "tokenizer" if run_folder.is_run(source) else source
    copied = [path for path in folder.iterdir() if path.name in COPIED | set(FILES.get(kind, ()))]
    for path in copied:
        shutil.copyfile(path, to / path.name)
    names = {path.name for path in copied}
    if copied and kind in CLASSES and CONFIG not in names and "tokenizer.json" not in names:
        write_json(to / CONFIG, {"tokenizer_class": CLASSES[kind], "model_max_length": tokenizer.context_length})
        names.add(CONFIG)
    return [f"tokenizer: {', '.join(sorted(names))}" if copied else f"tokenizer: left out, {source} has none"]


def _write_clip(to: Path, tokenizer: Tokenizer) -> None:
    """Transformers' files; the first two are for programs that read no ``tokenizer.json``."""
    written = tokenizer_json.of_merges(tokenizer)
    (to / "tokenizer.json").write_text(written["tokenizer.json"], encoding="utf-8")
    write_json(to / CONFIG, written[CONFIG])
    write_json(to / "vocab.json", json.loads(written["tokenizer.json"])["model"]["vocab"], indent=None)
    merges = "\n".join(["#version: 0.2", *(" ".join(pair) for pair in tokenizer.codec.merges)])
    (to / "merges.txt").write_text(merges + "\n", encoding="utf-8")
