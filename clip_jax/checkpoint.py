"""Checkpoints: Orbax, and nothing else knows Orbax.

A checkpoint is a folder ``checkpoints/<step>``; it is written in the background, by all processes, and appears, whole,
by a rename (in a bucket: by the file COMMITTED), so a run killed at any moment finds its last complete one. It can be
read on any number of devices and processes.
The model is stored apart from the rest, so that it can be loaded without its optimizer: its averaged parameters, where
a run has those, and then the parameters that it trains are with the rest.
"""

import os
import re
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
from etils import epath
from orbax.checkpoint import v1 as ocp

from clip_jax import buckets, checkpoint_s3
from clip_jax.errors import UserError

FOLDER = "checkpoints"
COMMITTED = "commit_success.txt"


class Checkpoints:
    """The checkpoints of one run folder; the newest ``keep_last`` are kept, and every ``keep_every``-th step's."""

    def __init__(self, workdir: str | Path, *, keep_last: int, keep_every: int | None):
        policies = [ocp.training.preservation_policies.LatestN(keep_last)]
        if keep_every:
            policies.append(ocp.training.preservation_policies.EveryNSteps(keep_every))
        self._checkpointer = ocp.training.Checkpointer(
            place(workdir),
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
        """The state of a step, each shard read where ``abstract`` (shapes with shardings) wants it."""
        found = self._checkpointer.load_checkpointables(step, _split(abstract))
        return _join(type(abstract), found)

    def close(self) -> None:
        """Waits for a save in progress; an error in the background is raised here."""
        self._checkpointer.close()


def _split(state: Any) -> dict[str, Any]:
    fields = state._asdict()
    average = fields.pop("average")
    model = {name: fields.pop(name) for name in ("params", "batch_stats")}
    if average is not None:
        fields["trained_params"], model["params"] = model["params"], average
    return {"model": model, "training": fields}


def _join(kind: type, found: dict[str, Any]) -> Any:
    model, fields = dict(found["model"]), dict(found["training"])
    if "trained_params" in fields:
        fields["average"], model["params"] = model["params"], fields.pop("trained_params")
    return kind(**model, **fields)


def place(workdir: str | Path) -> epath.Path:
    """Where the checkpoints of a run folder are, local or in a bucket."""
    if not buckets.is_bucket(workdir):
        return epath.Path(os.path.abspath(workdir)) / FOLDER
    if str(workdir).startswith("s3://"):
        checkpoint_s3.teach()
    return epath.Path(workdir) / FOLDER


def latest_step(workdir: str | Path) -> int | None:
    """The step of a run folder's newest complete checkpoint, without opening any."""
    folder = place(workdir)
    found = [p for p in folder.iterdir() if re.fullmatch(r"\d+", p.name)] if folder.is_dir() else []
    if buckets.is_bucket(workdir):
        found = [p for p in found if (p / COMMITTED).exists()]
    return max((int(p.name) for p in found), default=None)


def load_model(workdir: str | Path, params: Any, batch_stats: Any) -> tuple[int, Any, Any]:
    """(step, parameters, batch statistics) of a run folder's newest checkpoint, with the shapes that are given."""
    step = latest_step(workdir)
    if step is None:
        raise UserError(f"{workdir}: no checkpoint yet; let the run reach its first one")
    wanted = {"model": {"params": params, "batch_stats": batch_stats}}
    found = ocp.load_checkpointables(place(workdir) / str(step), wanted)["model"]
    return step, *(jax.tree.map(jnp.asarray, found[name]) for name in ("params", "batch_stats"))
