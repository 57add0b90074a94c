"""What may change when a run is started again in its folder, and how the run takes it into account."""

import contextlib
import shutil
from collections.abc import Iterator, Mapping
from typing import Any

import jax
import numpy as np
from jax.experimental import multihost_utils
from ml_collections import ConfigDict

from clip_jax import config as configs
from clip_jax.errors import UserError
from clip_jax.evaluation.protocols import Evaluation
from clip_jax.settings import UNITS
from clip_jax.storage import lock, run_folder
from clip_jax.storage.checkpoints import latest_step
from clip_jax.storage.run_folder import Folder
from clip_jax.training import metrics
from clip_jax.training.run import Run
from clip_jax.training.setup import make_schedule

SHAPE = ("optimizer.schedule", *(f"optimizer.cooldown_{name}" for name in (*UNITS, "form")))
"""Settings that may change where they change no learning rate of the past: a cooldown after a constant rate."""
RESULT = ("protocol", "source", "train", "caption", "templates")
"""The fields of an evaluation that change its numbers; schedule and batch size do not."""


@contextlib.contextmanager
def hold(folder: Folder, config: ConfigDict, previous: Mapping[str, Any] | None) -> Iterator[None]:
    """Keeps other runs out of the folder. Raises UserError if one is training in it, or was until a moment ago.

    If the run starts from the beginning with other settings, its tokenizer, made with the old ones, is removed.
    """
    first = jax.process_index() == 0
    with lock.locked(str(folder), folder.path, folder.remote) if first else contextlib.nullcontext():
        if jax.process_count() > 1:
            multihost_utils.sync_global_devices("the first process has the lock")
        folder.pull()
        now = run_folder.read(folder.path) if run_folder.is_run(folder.path) else None
        if now != previous:
            raise UserError(f"{folder}: another run has just started or ended here; repeat the command")
        if previous is not None and changes(folder, previous, config) and latest_step(str(folder)) is None:
            shutil.rmtree(folder.path / "tokenizer", ignore_errors=True)
            if jax.process_count() > 1:  # before one of them makes it again
                multihost_utils.sync_global_devices("the tokenizer is removed")
        yield


def changes(folder: Folder, previous: Mapping[str, Any], config: ConfigDict) -> list[str]:
    """The settings that differ and that a restart may not change."""
    saved = configs.from_json(previous["config"], str(folder))
    changed = configs.differences(configs.to_json(saved), configs.to_json(config))
    if not set(SHAPE) & set(changed) or not _same_past(saved, config, previous, latest_step(str(folder)) or 0):
        return changed
    return [key for key in changed if key not in SHAPE]


def _same_past(saved: ConfigDict, config: ConfigDict, previous: Mapping[str, Any], step: int) -> bool:
    """Whether both configs give the same learning rate to each of the first ``step`` steps."""
    examples = previous["data"]["train"]["samples"]
    then, now = (
        [np.asarray(make_schedule(phase.config, steps, examples)(np.arange(step))) for phase in configs.phases(given)]
        for given, steps in ((saved, previous["steps"]), (config, configs.duration(config, "", examples)))
    )
    return len(then) == len(now) and all(map(np.array_equal, then, now))


def check_settings(folder: Folder, previous: Mapping[str, Any], config: ConfigDict) -> None:
    """Raises UserError for settings that a run cannot change once a step of it is saved."""
    changed = ", ".join(changes(folder, previous, config))
    if changed and latest_step(str(folder)) is not None:
        raise UserError(
            f"{folder} holds a run with other settings ({changed}); use a new --workdir, "
            "or omit --config to resume it with its own settings"
        )
    if changed:
        print(f"{folder}: no step is saved yet, so the run begins anew with the changed settings ({changed})")


def check_data(run: Run, previous: Mapping[str, Any]) -> None:
    """Raises UserError if the training data is not the run's, unless it was repaired and the config accepts that."""
    then, now = previous["data"]["train"], run.train
    if then["fingerprint"] == now.fingerprint:
        return
    if then["fingerprint"] == now.former_fingerprint:
        print(f"{run.folder}: names and sizes of the data are unchanged; from now on the run also records its content")
        return
    if then["samples"] != len(now):
        raise UserError(
            f"{now.name} is not the data this run began with ({then['samples']} examples then, {len(now)} now); "
            "restore it, or start in a new --workdir"
        )
    if run.config.data.changed != "accept":
        raise UserError(
            f"{now.name} is not the data this run began with, though it has as many examples; restore it, or, if "
            "it was mended, continue with --config.data.changed=accept"
        )
    print(f"{run.folder}: the training data changed (config.data.changed=accept); later steps use the new data")


def check_length(run: Run, previous: Mapping[str, Any]) -> None:
    """Prints how the learning rate changes if a run is made longer. Raises UserError if it is made shorter."""
    old, new = previous.get("steps", run.steps), run.steps
    if new == old:
        return
    if new < old:
        raise UserError(
            f"config.steps: {run.folder} is a run of {old} steps, and this would make it {new}; it can be made longer, "
            "not shorter: use a new --workdir"
        )
    saved, examples = configs.from_json(previous["config"], str(run.folder)), len(run.train)
    config = configs.phases(run.config)[-1].config
    before, after = (
        float(make_schedule(given, steps, examples)(old - 1))
        for given, steps in ((configs.phases(saved)[-1].config, old), (config, new))
    )
    print(
        f"{run.folder}: now {new} steps in place of {old}. From here the learning rate is that of a run of {new} steps "
        f"({config.optimizer.schedule}): at step {old} it was to be {before:.3g} and would be {after:.3g}"
    )


def forget_replaced(run: Run, previous: Mapping[str, Any]) -> None:
    """Drops the last step's results of evaluations whose definition changed, so that they are computed again."""
    then, now = configs.from_json(previous["config"], str(run.folder)).eval, run.config.eval
    replaced = [name for name in now if name in then and any(then[name][f] != now[name][f] for f in RESULT)]
    if replaced and jax.process_index() == 0:
        metrics.forget(run.workdir / metrics.FILE, run.steps, replaced)


def lacking(run: Run, evaluations: tuple[Evaluation, ...]) -> list[Evaluation]:
    """The evaluations without results at the last step, the same on all processes."""
    found = metrics.evaluated(run.workdir / metrics.FILE, run.steps)  # the first process's file
    flags = np.array([evaluation.name not in found for evaluation in evaluations])
    if jax.process_count() > 1 and len(flags):
        flags = np.asarray(multihost_utils.broadcast_one_to_all(flags))
    return [evaluation for evaluation, flag in zip(evaluations, flags, strict=True) if flag]
