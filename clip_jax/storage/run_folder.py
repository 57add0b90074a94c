"""A run's folder, on disk or in a bucket: what is in it, and how it is recognized.

run.json          the resolved config, the model, versions, data; ``load`` recognizes a run by ``clip_jax_version``
metrics.jsonl     one JSON object per line
checkpoints/      one folder per saved step
tokenizer/        the tokenizer's file, so that the folder needs nothing else (``data/tokenizers/stored.py``)
report.html
lock.json         which process trains here (``lock.py``)
init_from.txt     for a run that started from other weights: what was done with each tensor
"""

import atexit
import json
import os
import shutil
import tempfile
from pathlib import Path, PurePosixPath
from typing import Any

from clip_jax.errors import UserError
from clip_jax.storage import atomic, buckets, lock

RUN_FILE = "run.json"
NOT_COPIED = ("checkpoints", "tensorboard", "wandb", lock.FILE)
"""What stays in the bucket: all processes write checkpoints there, event files are only added, and the lock is read
where it is."""


class Folder:
    """A run's folder: its address as the user gave it (``str(folder)``), and ``path``, its files on this machine.

    For a local folder the two are the same. A folder in a bucket is copied to ``path``, a new temporary folder, without
    its checkpoints; what is written there is in the bucket after the next ``push``. UserError if the bucket cannot
    be reached.
    """

    def __init__(self, where: str | Path):
        self._where = str(where)
        if not buckets.is_bucket(where):
            self.remote, self.path = None, Path(os.path.expanduser(where))
            return
        self.remote = buckets.connect(self._where)
        temporary = tempfile.mkdtemp(prefix="clip_jax_")
        atexit.register(shutil.rmtree, temporary, ignore_errors=True)
        self.path = Path(temporary) / PurePosixPath(self.remote.root).name
        self.pull()

    def __str__(self) -> str:
        return self._where if self.remote else str(self.path)

    def pull(self) -> None:
        """Copies the bucket's files to this machine again; nothing for a local folder."""
        if self.remote is not None:
            buckets.pull(self.remote, self.path, skip=NOT_COPIED)
            self._in_bucket = self._files()

    def push(self, process: int) -> None:
        """Uploads the files that changed since the last time: on the first process all, on others ``*.<process>.*``.

        An object store takes one write per second and object, so no file may be written by two processes.
        """
        if self.remote is None:
            return
        files = self._files()
        changed = [file for file, state in files.items() if self._in_bucket.get(file) != state]
        local = changed if process == 0 else [file for file in changed if f".{process}." in file.name]
        buckets.push(self.remote, local, self.path)
        self._in_bucket |= {file: files[file] for file in local}

    def _files(self) -> dict[Path, tuple[int, int]]:
        """All files, each with its modification time and size."""
        files = sorted(file for file in self.path.rglob("*") if file.is_file())
        return {file: (file.stat().st_mtime_ns, file.stat().st_size) for file in files}


def is_run(folder: Path) -> bool:
    return (folder / RUN_FILE).is_file()


def read(folder: Path) -> dict[str, Any]:
    """``run.json``; UserError if there is none or it is not ours."""
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
    """Replaces ``run.json``."""
    atomic.write_text(folder / RUN_FILE, json.dumps(values, indent=2, allow_nan=False) + "\n")
