"""The training loop: reads the config, builds the run, trains, evaluates, saves checkpoints and writes the report.

Start reading here. ``config`` reads the settings of a run, ``run.py`` builds it, ``learner.py`` compiles the training
step, ``initialize.py`` creates or restores the state, ``data/stream.py`` loads batches, ``recorder.py`` writes the logs
and ``evaluation`` computes held-out metrics.
"""

import collections
import contextlib
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import jax
import numpy as np
from ml_collections import ConfigDict

from clip_jax import config as configs
from clip_jax import errors
from clip_jax.command_line import program
from clip_jax.data.stream import stream
from clip_jax.devices import simulated, xla_flags
from clip_jax.devices.sharding import initialize_processes, process_rows, to_devices
from clip_jax.errors import StoppedError, UserError
from clip_jax.evaluation import protocols
from clip_jax.evaluation.embed import Embedded, Variables
from clip_jax.evaluation.protocols import Evaluation
from clip_jax.reports import terminal
from clip_jax.reports.gallery import Gallery, make_gallery
from clip_jax.storage import run_folder
from clip_jax.storage.checkpoints import Checkpoints, checkpoint_dir, latest_step
from clip_jax.storage.run_folder import Folder
from clip_jax.training import console, constants, initialize, restart, stop, stored_images, text_buckets
from clip_jax.training.recorder import Recorder
from clip_jax.training.run import Phase, Run, description, make_run
from clip_jax.training.state import TrainState

AHEAD = 1
"""Batches on the devices beyond the one of the next step; with that one, two are ahead of the step that is running."""


def run(
    *,
    workdir: str | None,
    recipe: str | None,
    overrides: Mapping[str, str],
    processes: tuple[str | None, int | None, int | None] = (None, None, None),
) -> int:
    """Starts or resumes the run in ``workdir`` and returns the exit code of the process. Raises UserError."""
    with stop.concise_system_errors(workdir):
        return _run(*read_config(workdir, recipe, overrides), processes)


def _run(
    folder: Folder,
    config: ConfigDict,
    previous: dict[str, Any] | None,
    processes: tuple[str | None, int | None, int | None],
) -> int:
    if config.mesh.xla_flags:
        xla_flags.apply()
    simulated.use_cpus(config.mesh.cpu_devices)
    initialize_processes(*processes)
    with restart.hold(folder, config, previous):
        parts = make_run(folder, config, previous if latest_step(str(folder)) is not None else None)
        check_same_data(parts, previous)
        if previous is not None:
            restart.forget_replaced(parts, previous)
        if jax.process_index() == 0:
            run_folder.write(folder.path, description(parts))
            terminal.header(console.header(parts))
        folder.push(jax.process_index())
        try:
            with (
                stop.concise_system_errors(folder),
                stop.watchdog(config.log.watchdog_seconds) as heartbeat,
                stop.signals() as should_stop,
            ):
                gallery = train(parts, heartbeat, should_stop)
        except UserError:
            with contextlib.suppress(Exception):  # a failed upload must not hide the UserError
                folder.push(jax.process_index())
            raise
        except StoppedError as error:
            folder.push(jax.process_index())
            print(f"{program()}: {error}", flush=True)
            return error.exit_code
        if jax.process_index() == 0:
            console.finish(parts, gallery)
        folder.push(jax.process_index())
    return errors.EXIT_DONE


def read_config(
    workdir: str | None, recipe: str | None, overrides: Mapping[str, str]
) -> tuple[Folder, ConfigDict, dict[str, Any] | None]:
    """Returns (run folder, config, ``run.json`` or None); without a recipe, the config of the run in the folder."""
    if not workdir:
        raise UserError("--workdir is missing: the folder where the run keeps its checkpoints, metrics and report")
    folder = Folder(workdir)
    if folder.path.exists() and not folder.path.is_dir():
        raise UserError(f"--workdir={workdir} is a file, not a folder")
    previous = run_folder.read(folder.path) if run_folder.is_run(folder.path) else None
    if previous is None and recipe is None:
        raise UserError(f"--workdir={workdir} holds no run yet; say what to train with --config=configs/NAME.py")
    if previous is None and checkpoint_dir(str(folder)).exists():
        raise UserError(
            f"{folder} has checkpoints but no {run_folder.RUN_FILE}: restore that file, or use a new folder"
        )
    saved_config = None if previous is None else configs.from_json(previous["config"], str(folder))
    config = (
        configs.override(saved_config, overrides, str(folder)) if recipe is None else configs.load(recipe, overrides)
    )
    if previous is not None:
        restart.check_settings(folder, previous, config)
    folder.path.mkdir(parents=True, exist_ok=True)
    return folder, config, previous


def check_same_data(run: Run, previous: Mapping[str, Any] | None) -> None:
    """Raises UserError if changed data or length prevents resuming; warns about other changes."""
    if previous is None or latest_step(str(run.folder)) is None:  # nothing is saved that could differ
        return
    restart.check_data(run, previous)
    restart.check_length(run, previous)
    constants.check_stored(run, previous)
    new_settings = configs.later_settings(previous["config"], run.config)
    if new_settings:
        print(f"{run.folder}: begun by older code, which had no {', '.join(new_settings)}")
    if previous["tokenizer"]["fingerprint"] != run.tokenizer.fingerprint:
        # Not an error: upgrading a tokenizer library must not make old runs unusable.
        print(f"{run.folder}/tokenizer: its file or its libraries changed since the run began; some tokens may differ")


def train(run: Run, heartbeat: Callable[[], None], should_stop: stop.Stop) -> Gallery | None:
    """Trains all remaining steps; returns example pairs for the report, if there is a retrieval evaluation.

    ``heartbeat()`` resets the watchdog; ``should_stop(step)`` returns the error to raise after this step, or None.
    """
    gallery = None
    with open_checkpoints(run) as checkpoints:
        state, first_step = initialize.initial_state(run, checkpoints)
        phase = run.phases[run.phase_of(first_step)]
        stored_images.check_weights(phase.learner, state, run.train)
        check_evaluations(phase, state)
        heartbeat()
        with Recorder(run, first_step, heartbeat) as recorder:
            for phase in run.phases_after(first_step):
                start = max(first_step, phase.start)
                state = initialize.enter(run, phase, state, start)
                train_step, frozen = phase.learner.step(), constants.load(run, phase)
                for step, batch in batches(run, phase, start, recorder):
                    state, metrics = train_step(state, batch, frozen)
                    recorder.add(step, metrics)
                    last = step == run.steps
                    due_now = [e for e in phase.evaluations if due(step, e.every, last)]
                    if due_now:
                        recorder.check_finite(step, metrics)
                        gallery = evaluate(run, due_now, state, step, recorder)
                        heartbeat()
                    stopping = None if last else should_stop(step)
                    if due(step, run.checkpoint_every, last or stopping is not None):
                        save(run, checkpoints, state, step, metrics, recorder)
                        heartbeat()
                    if stopping is not None:
                        raise stopping(step, run.steps)
            if first_step == run.steps and (missing := restart.lacking(run, phase.evaluations)):
                gallery = evaluate(run, missing, state, first_step, recorder)
    if gallery is None and not (run.workdir / "report.html").exists():
        gallery = recompute_gallery(phase, state)
    return gallery


def open_checkpoints(run: Run) -> Checkpoints:
    settings = run.config.checkpoint
    keep_every = None if settings.keep_every_steps == configs.AUTO else settings.keep_every_steps
    return Checkpoints(str(run.folder), keep_last=settings.keep_last, keep_every=keep_every)


def check_evaluations(phase: Phase, state: TrainState) -> None:
    """Runs one batch of every evaluation, so that an unusable source is reported before training starts."""
    for evaluation in phase.evaluations:
        protocols.check_one_batch(evaluation, Variables(state.evaluation_params, state.batch_stats))


def batches(run: Run, phase: Phase, start: int, recorder: Recorder) -> Iterator[tuple[int, dict[str, jax.Array]]]:
    """(step, global batch on the devices) for every step of the phase after ``start``."""
    size, data = phase.learner.ratio * run.config.batch_size, run.config.data
    rows = process_rows(run.mesh, size)
    host_batches = stream(phase.batches, rows, start, phase.stop, workers=data.workers, prefetch=data.prefetch)

    def load(step: int) -> tuple[int, np.ndarray, np.ndarray, dict[str, jax.Array]]:
        with recorder.meter.waiting():
            batch = dict(next(host_batches))
            if data.text_buckets:
                batch["text"] = text_buckets.cut(batch["text"], phase.preset.architecture.text, data.text_buckets)
        return step, batch.pop("index"), batch.pop("faults"), to_devices(batch, run.mesh, size)

    for step, index, faults, batch in ahead(map(load, range(start + 1, phase.stop + 1)), AHEAD):
        recorder.examples(step, rows, index, faults)
        yield step, batch


def ahead(items: Iterator[Any], count: int) -> Iterator[Any]:
    """The items, with ``count`` further ones taken from ``items`` before each is yielded."""
    taken = collections.deque()
    for item in items:
        taken.append(item)
        if len(taken) > count:
            yield taken.popleft()
    yield from taken


def due(step: int, every: int | None, last: bool) -> bool:
    return last or (every is not None and step % every == 0)


def evaluate(
    run: Run, evaluations: Sequence[Evaluation], state: TrainState, step: int, recorder: Recorder
) -> Gallery | None:
    """Runs the evaluations and logs their metrics; after the last step, returns pairs to show in the report."""
    recorder.pending.settle()
    values, classifiers, gallery, started = {}, {}, None, time.perf_counter()
    weights = Variables(state.evaluation_params, state.batch_stats)
    with recorder.meter.paused():
        for evaluation in evaluations:
            found, embedded = protocols.evaluate(evaluation, weights, classifiers)
            values |= found
            if step == run.steps and gallery is None and evaluation.protocol == "retrieval":
                gallery = gallery_of(evaluation, embedded)
        values["eval/time_seconds"] = time.perf_counter() - started
    recorder.write(step, values, console.summary(step, values))
    return gallery


def recompute_gallery(phase: Phase, state: TrainState) -> Gallery | None:
    """Recomputes the example pairs of the report when the report is missing."""
    for evaluation in phase.evaluations:
        if evaluation.protocol == "retrieval":
            _, embedded = protocols.evaluate(evaluation, Variables(state.evaluation_params, state.batch_stats))
            return gallery_of(evaluation, embedded)
    return None


def gallery_of(evaluation: Evaluation, embedded: Embedded) -> Gallery:
    """Some pairs of an evaluation, for the report."""
    embedder = evaluation.embedder
    return make_gallery(
        evaluation.name,
        evaluation.source,
        embedder.preprocess,
        embedder.image_size,
        images=embedded.images,
        texts=embedded.texts,
        owner=embedded.owner,
        captions=embedded.captions,
        indices=embedded.indices,
    )


def save(
    run: Run,
    checkpoints: Checkpoints,
    state: TrainState,
    step: int,
    metrics: Mapping[str, jax.Array],
    recorder: Recorder,
) -> None:
    """Saves a checkpoint after flushing the logs. Raises NonFiniteError if the metrics are not finite."""
    recorder.sync()
    recorder.check_finite(step, metrics)
    with recorder.meter.paused():
        run.folder.push(jax.process_index())
        checkpoints.save(step, state)
