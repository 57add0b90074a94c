"""Where a run's numbers go: ``metrics.jsonl`` (the source of truth), and TensorBoard and W&B from the same lines."""

import json
import math
import os
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np
from tensorboardX import SummaryWriter

from clip_jax.storage import atomic
from clip_jax.training import weights_and_biases

FILE = "metrics.jsonl"

TIMINGS = ("train/pairs_per_second", "train/pairs_seen_per_second", "train/data_wait_share", "train/mfu")
"""Metrics that depend on the machine's speed, as do names that end in ``_seconds``. All others are the same in a run
that was killed and resumed, but for counts of bad examples, which begin anew between two lines."""


def is_timing(name: str) -> bool:
    return name in TIMINGS or name.endswith("_seconds")


def truncate(file: Path, step: int) -> None:
    """Drops the lines of steps after ``step``, and a line that a kill left unfinished."""
    if file.exists():
        _write(file, [line for line in _read(file) if line["step"] <= step])


def _read(file: Path) -> list[dict[str, Any]]:
    """The complete lines; none where there is no file."""
    found = []
    for line in file.read_bytes().splitlines() if file.exists() else ():
        try:
            values = json.loads(line)
        except ValueError:  # half a line, or half a character
            continue
        if isinstance(values, dict) and "step" in values:
            found.append(values)
    return found


def _write(file: Path, lines: list[dict[str, Any]]) -> None:
    atomic.write_text(file, "".join(json.dumps(line) + "\n" for line in lines))


def evaluated(file: Path, step: int) -> set[str]:
    """The names of the evaluations that have results of this step."""
    keys = [key.split("/") for line in _read(file) if line["step"] == step for key in line]
    return {key[1] for key in keys if key[0] == "eval" and len(key) == 3}


def forget(file: Path, step: int, names: Collection[str]) -> None:
    """Drops the results of the named evaluations at this step and later."""
    if not file.exists():
        return
    dropped = tuple(f"eval/{name}/" for name in names)
    remaining = [
        {key: value for key, value in line.items() if line["step"] < step or not key.startswith(dropped)}
        for line in _read(file)
    ]
    _write(file, remaining)


def add_lines(file: Path, lines: Sequence[str]) -> None:
    """Appends the lines that the file does not have."""
    known = set(file.read_text(encoding="utf-8").splitlines()) if file.exists() else set()
    with file.open("a", encoding="utf-8") as opened:
        opened.writelines(f"{line}\n" for line in lines if line not in known)


class Writer:
    """Appends lines; writes nothing on processes other than the first."""

    def __init__(
        self,
        workdir: Path,
        *,
        enabled: bool,
        tensorboard: bool,
        first_step: int,
        wandb: str = "",
        config: Mapping[str, Any] | None = None,
    ):
        """``wandb`` is the project of Weights & Biases that gets the lines too, with the ``config``; empty: none."""
        self._file = (workdir / FILE).open("a", encoding="utf-8") if enabled else None
        # What an interrupted run had written after the checkpoint it was resumed from, this step and later, is hidden.
        board = {"logdir": str(workdir / "tensorboard"), "purge_step": first_step + 1}
        self._board = SummaryWriter(**board) if enabled and tensorboard else None
        self._wandb = weights_and_biases.start(workdir, wandb, config or {}) if enabled and wandb else None

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
        if self._wandb is not None:
            self._wandb.log({"step": step, **values})

    def sync(self) -> None:
        """On disk when it returns: called before a checkpoint that these lines belong to."""
        if self._file is not None:
            os.fsync(self._file.fileno())

    def close(self) -> None:
        if self._file is not None:
            self._file.close()
        if self._board is not None:
            self._board.close()
        if self._wandb is not None:
            self._wandb.finish()


class Samples:
    """``samples.<process>.jsonl``: the rows of the global batch that a process filled, and with which samples.

    Written before the step and never truncated: a step that is repeated after a restart has several lines, which are
    equal.
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
