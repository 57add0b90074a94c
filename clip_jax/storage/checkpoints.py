"""Checkpoints: Orbax, and nothing else knows Orbax.

A checkpoint is a folder ``checkpoints/<step>``. All processes write it in the background, and a rename publishes it (in
a bucket: the file COMMITTED), so that a run killed at any moment finds its last complete one. It can be read on any
number of devices and processes.

The model is stored apart from the rest, so that it can be loaded without its optimizer:

model      params (the EMA that is evaluated, where a run has one), batch_stats
training   step, data_step, opt_state; trained_params where ``params`` is an EMA; further EMAs under ``ema``, the
           objectives' state under ``aux``. Nothing empty is stored.
"""

import logging
import os
import re
from collections.abc import Mapping
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import jax
import jax.numpy as jnp
from etils import epath
from orbax.checkpoint import v1 as ocp

from clip_jax.errors import SavedError, UserError
from clip_jax.storage import buckets, checkpoints_s3

FOLDER = "checkpoints"
COMMITTED = "commit_success.txt"


class Checkpoints:
    """The checkpoints of one run folder; the newest ``keep_last`` are kept, and every ``keep_every``-th step's.

    ``with Checkpoints(...) as checkpoints`` waits at its end for a save in progress, however the block ends: a process
    that leaves earlier loses that checkpoint, and Orbax's threads write tracebacks about it.
    """

    def __init__(self, workdir: str | Path, *, keep_last: int, keep_every: int | None):
        policies = [ocp.training.preservation_policies.LatestN(keep_last)]
        if keep_every:
            policies.append(ocp.training.preservation_policies.EveryNSteps(keep_every))
        self._workdir = workdir
        logging.getLogger("absl").addFilter(_is_news)
        self._checkpointer = ocp.training.Checkpointer(
            checkpoint_dir(workdir),
            # The loop decides when to save; whatever it asks for is saved.
            save_decision_policy=ocp.training.save_decision_policies.FixedIntervalPolicy(1),
            preservation_policy=ocp.training.preservation_policies.AnyPreservationPolicy(policies),
            cleanup_tmp_directories=True,
        )

    def latest(self) -> int | None:
        """The step of the newest complete checkpoint."""
        found = self._checkpointer.latest
        return None if found is None else found.step

    def save(self, step: int, state: Any) -> None:
        """Copies the state off the devices, then writes it in the background; waits for the save before it."""
        self._checkpointer.save_checkpointables_async(step, _split(state))

    def restore(self, step: int, abstract: Any) -> Any:
        """The state of a step, each shard read where ``abstract`` (shapes with shardings) wants it.

        Raises UserError for an entry that the checkpoint lacks.
        """
        wanted = _split(abstract)
        folder = checkpoint_dir(self._workdir) / str(step)
        stored = ocp.checkpointables_metadata(folder).metadata
        for part in ("model", "training"):
            if lacking := _lacking(wanted[part], stored[part]):
                raise UserError(
                    f"{folder}: has no {lacking}: it was written with other objectives or EMAs; "
                    "start in a new --workdir with --config.model.init_from"
                )
        found = self._checkpointer.load_checkpointables(step, wanted)
        return _join(type(abstract), found)

    def close(self) -> None:
        """Waits for a save in progress; an error in the background is raised here."""
        self._checkpointer.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """An error of the save is raised, unless the block has failed for a reason of its own."""
        try:
            self.close()
        except Exception as failed:
            if error is None or isinstance(error, SavedError):
                raise
            print(f"the checkpoint being written is not complete: {str(failed).splitlines()[0]}", flush=True)


def _is_news(record: logging.LogRecord) -> bool:
    """False for what Orbax's threads log about an error, hundreds of lines: the next save or the end raises it."""
    return record.levelno < logging.ERROR or "orbax" not in Path(record.pathname).parts


EMA = "average"
"""The name in a state of the EMA that is stored as the model."""


def _split(state: Any) -> dict[str, Any]:
    fields = state._asdict()
    ema = dict(fields.pop("ema"))
    model = {name: fields.pop(name) for name in ("params", "batch_stats")}
    if EMA in ema:
        fields["trained_params"], model["params"] = model["params"], ema.pop(EMA)
    aux = fields.pop("aux")
    return {"model": model, "training": fields | ({"ema": ema} if ema else {}) | ({"aux": aux} if aux else {})}


def _lacking(wanted: Any, stored: Any, path: str = "") -> str:
    """The path of the first entry of nested dictionaries that is not stored; empty if all are."""
    for name, value in wanted.items() if isinstance(wanted, dict) else ():
        if not isinstance(stored, Mapping) or name not in stored:
            return f"{path}{name}"
        if lacking := _lacking(value, stored[name], f"{path}{name}/"):
            return lacking
    return ""


def _join(kind: type, found: dict[str, Any]) -> Any:
    model, fields = dict(found["model"]), dict(found["training"])
    ema, aux = dict(fields.pop("ema", {})), dict(fields.pop("aux", {}))
    if "trained_params" in fields:
        ema[EMA], model["params"] = model["params"], fields.pop("trained_params")
    return kind(**model, **fields, ema=ema, aux=aux)


def checkpoint_dir(workdir: str | Path) -> epath.Path:
    """The folder with the checkpoints of a run folder, local or in a bucket."""
    if not buckets.is_bucket(workdir):
        return epath.Path(os.path.abspath(workdir)) / FOLDER
    if str(workdir).startswith("s3://"):
        checkpoints_s3.register()
    return epath.Path(workdir) / FOLDER


def complete_steps(workdir: str | Path) -> list[int]:
    """The steps of a run folder's complete checkpoints, ascending, without opening any."""
    folder = checkpoint_dir(workdir)
    found = [p for p in folder.iterdir() if re.fullmatch(r"\d+", p.name)] if folder.is_dir() else []
    if buckets.is_bucket(workdir):
        found = [p for p in found if (p / COMMITTED).exists()]
    return sorted(int(p.name) for p in found)


def latest_step(workdir: str | Path) -> int | None:
    """The step of a run folder's newest complete checkpoint."""
    return max(complete_steps(workdir), default=None)


def need_step(workdir: str | Path, step: int | None = None) -> int:
    """The given step, or the newest one; raises UserError if there is no such checkpoint."""
    steps = complete_steps(workdir)
    if not steps:
        raise UserError(f"{workdir}: no checkpoint yet; let the run reach its first one")
    if step is not None and step not in steps:
        raise UserError(f"{workdir}: no checkpoint of step {step}; it keeps {', '.join(map(str, steps))}")
    return steps[-1] if step is None else step


def load_model(workdir: str | Path, step: int, params: Any, batch_stats: Any) -> tuple[Any, Any]:
    """(parameters, batch statistics) of a checkpoint, with the shapes that are given.

    The parameters of training objectives, which no model needs, are not read.
    """
    folder = checkpoint_dir(workdir) / str(step)
    stored = ocp.checkpointables_metadata(folder).metadata["model"]["params"]
    objectives = {name: tree for name, tree in stored.items() if name == "objectives"}
    skipped = jax.tree.map(lambda _: ocp.PLACEHOLDER, objectives)
    wanted = {"model": {"params": params | skipped, "batch_stats": batch_stats}}
    found = ocp.load_checkpointables(folder, wanted)["model"]
    found["params"].pop("objectives", None)
    return tuple(jax.tree.map(jnp.asarray, found[name]) for name in ("params", "batch_stats"))
