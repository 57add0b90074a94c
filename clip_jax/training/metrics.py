"""Where a run's numbers go: ``metrics.jsonl`` (the source of truth) and TensorBoard files made from the same lines."""

import json
import math
import os
from collections.abc import Mapping
from pathlib import Path

import jax
import numpy as np
from tensorboardX import SummaryWriter

from clip_jax.storage import atomic

FILE = "metrics.jsonl"

TIMINGS = ("train/pairs_per_second", "train/data_wait_share", "train/mfu")
"""Metrics that depend on the machine's speed; all others are the same in a run that was killed and resumed. So are
names that end in ``_seconds``."""


def is_timing(name: str) -> bool:
    return name in TIMINGS or name.endswith("_seconds")


def truncate(file: Path, step: int) -> None:
    """Drops the lines of steps after ``step``, and a line that a kill left unfinished."""
    if not file.exists():
        return
    kept = []
    for line in file.read_text(encoding="utf-8").splitlines():
        try:
            if json.loads(line)["step"] <= step:
                kept.append(line + "\n")
        except (json.JSONDecodeError, KeyError):
            continue
    atomic.write_text(file, "".join(kept))


class Writer:
    """Appends lines; writes nothing on processes other than the first."""

    def __init__(self, workdir: Path, *, enabled: bool, tensorboard: bool, first_step: int):
        self._file = (workdir / FILE).open("a", encoding="utf-8") if enabled else None
        # purge_step hides what an interrupted run had written after the checkpoint it was resumed from.
        self._board = (
            SummaryWriter(str(workdir / "tensorboard"), purge_step=first_step) if enabled and tensorboard else None
        )

    def write(self, step: int, values: Mapping[str, float]) -> None:
        """One line; a value that is not finite becomes null, which JSON knows."""
        if self._file is None:
            return
        finite = {name: value if math.isfinite(value) else None for name, value in values.items()}
        self._file.write(json.dumps({"step": step, **finite}, allow_nan=False) + "\n")
        self._file.flush()
        if self._board is not None:
            for name, value in values.items():
                self._board.add_scalar(name, value, step)

    def sync(self) -> None:
        """On disk when it returns: called before a checkpoint that these lines belong to."""
        if self._file is not None:
            os.fsync(self._file.fileno())

    def close(self) -> None:
        if self._file is not None:
            self._file.close()
        if self._board is not None:
            self._board.close()


class Samples:
    """``samples.<process>.jsonl``: the rows of the global batch that a process filled, and with which samples.

    Written before the step is taken and never shortened: of a step that was taken again after a restart there are
    several lines, all of them the same.
    """

    def __init__(self, workdir: Path, *, enabled: bool):
        name = f"samples.{jax.process_index()}.jsonl"
        self._file = (workdir / name).open("a", encoding="utf-8") if enabled else None

    def write(self, step: int, rows: np.ndarray, index: np.ndarray) -> None:
        if self._file is not None:
            self._file.write(json.dumps({"step": step, "rows": rows.tolist(), "samples": index.tolist()}) + "\n")
            self._file.flush()

    def close(self) -> None:
        if self._file is not None:
            self._file.close()
