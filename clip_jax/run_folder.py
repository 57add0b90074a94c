"""A run's folder on disk: what is in it, how it is recognised, and the tokenizer it carries.

run.json          the resolved config, the model, versions, data; ``clip_jax_version`` is what ``load`` recognises
metrics.jsonl     one JSON object a line
checkpoints/      one folder a step
tokenizer/        what turns captions into tokens, so that the folder needs nothing else
report.html
"""

import json
from pathlib import Path
from typing import Any

from clip_jax.data import tokenizers
from clip_jax.data.tokenizers import Tokenizer
from clip_jax.errors import UserError

RUN_FILE = "run.json"
TOKENIZER_FILES = {"sentencepiece": "sentencepiece.model", "clip": "merges.txt"}


def is_run(folder: Path) -> bool:
    return (folder / RUN_FILE).is_file()


def read(folder: Path) -> dict[str, Any]:
    """``run.json``; UserError where there is none or it is not ours."""
    file = folder / RUN_FILE
    try:
        values = json.loads(file.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise UserError(f"{folder}: not a run folder (it has no {RUN_FILE})") from None
    except json.JSONDecodeError as error:
        raise UserError(f"{file}: not readable as JSON ({error}); restore it or start in a new folder") from error
    if "clip_jax_version" not in values:
        raise UserError(f"{file}: not written by clip_jax (no clip_jax_version)")
    return values


def write(folder: Path, values: dict[str, Any]) -> None:
    """Replaces ``run.json`` in one go."""
    temporary = folder / f"{RUN_FILE}.tmp"
    temporary.write_text(json.dumps(values, indent=2, allow_nan=False) + "\n", encoding="utf-8")
    temporary.replace(folder / RUN_FILE)


def tokenizer_file(folder: Path, kind: str) -> Path:
    return folder / "tokenizer" / TOKENIZER_FILES[kind]


def open_tokenizer(folder: Path, kind: str, context_length: int) -> Tokenizer:
    """The tokenizer that a run folder carries."""
    file = tokenizer_file(folder, kind)
    if kind == "clip":
        return tokenizers.clip(file, context_length)
    return tokenizers.sentencepiece(file, context_length)
