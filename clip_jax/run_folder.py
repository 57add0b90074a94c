"""A run's folder, on disk or in a bucket: what is in it, how it is recognised, and the tokenizer it carries.

run.json          the resolved config, the model, versions, data; ``clip_jax_version`` is what ``load`` recognises
metrics.jsonl     one JSON object a line
checkpoints/      one folder a step
tokenizer/        what turns captions into tokens, so that the folder needs nothing else
report.html
init_from.txt     where the run started from other weights: what became of each tensor
"""

import atexit
import json
import shutil
import tempfile
from pathlib import Path, PurePosixPath
from typing import Any

from clip_jax import buckets
from clip_jax.data import tokenizers
from clip_jax.data.tokenizers import Tokenizer
from clip_jax.errors import UserError

RUN_FILE = "run.json"
TOKENIZER_FILES = {
    "sentencepiece": "sentencepiece.model",
    "clip": "merges.txt",
    "clipa": "vocab.txt",
    "siglip": "spiece.model",
    "siglip2": "tokenizer.model",
}
TOKENIZER_JSON = "tokenizer.json"
"""What Hugging Face keeps in place of the last three."""

NOT_COPIED = ("checkpoints", "tensorboard")
"""Of a folder in a bucket: written there by all processes, and appended to under new names."""


class Folder:
    """Where a run is: as its user says it (``str(folder)``), and ``path``, where this machine has its files.

    The two are one for a local folder. One in a bucket is copied to ``path``, a new temporary folder, but for its
    checkpoints; what is written here is in the bucket after the next ``push``. UserError where it cannot be reached.
    """

    def __init__(self, where: str | Path):
        self._where = str(where)
        if not buckets.is_bucket(where):
            self._remote, self.path = None, Path(where)
            return
        self._remote = buckets.connect(self._where)
        temporary = tempfile.mkdtemp(prefix="clip_jax_")
        atexit.register(shutil.rmtree, temporary, ignore_errors=True)
        self.path = Path(temporary) / PurePosixPath(self._remote.root).name
        buckets.pull(self._remote, self.path, skip=NOT_COPIED)
        self._in_bucket = self._files()

    def __str__(self) -> str:
        return self._where if self._remote else str(self.path)

    def push(self, process: int) -> None:
        """Sends the files that changed since the last time; those of the first process, and what others call theirs.

        An object store takes one write a second of an object: nothing may be written by two processes.
        """
        if self._remote is None:
            return
        files = self._files()
        changed = [file for file, state in files.items() if self._in_bucket.get(file) != state]
        own = changed if process == 0 else [file for file in changed if f".{process}." in file.name]
        buckets.push(self._remote, own, self.path)
        self._in_bucket |= {file: files[file] for file in own}

    def _files(self) -> dict[Path, tuple[int, int]]:
        """All files with what changes when they do."""
        files = sorted(file for file in self.path.rglob("*") if file.is_file())
        return {file: (file.stat().st_mtime_ns, file.stat().st_size) for file in files}


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


def tokenizer_file(folder: Path, kind: str) -> Path | None:
    """The file of the tokenizer that a run folder carries; None where it carries none yet."""
    places = [folder / "tokenizer" / name for name in (TOKENIZER_FILES[kind], TOKENIZER_JSON)]
    return next((file for file in places if file.is_file()), None)


def write_tokenizer(folder: Path, kind: str, data: bytes) -> None:
    """Puts the tokenizer's file there in one go, under the name that its content asks for."""
    file = folder / "tokenizer" / (TOKENIZER_JSON if data[:1] == b"{" else TOKENIZER_FILES[kind])
    file.parent.mkdir(parents=True, exist_ok=True)
    temporary = file.with_name(f"{file.name}.tmp")
    temporary.write_bytes(data)
    temporary.replace(file)


def open_tokenizer(folder: Path, kind: str, context_length: int) -> Tokenizer:
    """The tokenizer that a run folder carries. Raises UserError."""
    file = tokenizer_file(folder, kind)
    if file is None:
        raise UserError(f"{folder / 'tokenizer' / TOKENIZER_FILES[kind]}: missing; restore the run's folder as it was")
    return tokenizers.KINDS[kind](file, context_length)
