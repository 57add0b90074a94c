"""The story of a run: read the config, put the parts together, train, evaluate, keep, show.

The file people read first. Each part is elsewhere: ``config.py`` says what a run is, ``setup.py`` builds it,
``step.py`` is the one compiled function, ``data/stream.py`` feeds it, ``evaluation`` judges it.
"""

import collections
import math
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from ml_collections import ConfigDict

from clip_jax import config as configs
from clip_jax import errors, run_folder, xla_flags
from clip_jax.checkpoint import Checkpoints, place
from clip_jax.data.stream import stream
from clip_jax.errors import NonFiniteError, PreemptedError, StoppedError, UserError
from clip_jax.evaluation.embed import make_encoders
from clip_jax.evaluation.runner import Evaluator
from clip_jax.interop.merge import differences, merge
from clip_jax.model import load
from clip_jax.reports import terminal
from clip_jax.reports.gallery import Gallery
from clip_jax.run_folder import Folder
from clip_jax.sharding import initialize_processes, process_rows, to_devices
from clip_jax.training import console, setup, stop
from clip_jax.training import metrics as metric_files
from clip_jax.training.meter import Meter
from clip_jax.training.setup import Run
from clip_jax.training.state import State, abstract_state, create_state

IN_FLIGHT = 2
"""Steps that may be launched and not finished; their metrics are read when they leave this window, never before."""


def run(
    *,
    workdir: str | None,
    recipe: str | None,
    overrides: Mapping[str, str],
    processes: tuple[str | None, int | None, int | None] = (None, None, None),
) -> int:
    """Trains, or goes on training, the run in ``workdir``; returns the process's exit code. Raises UserError."""
    folder, config, previous = read_config(workdir, recipe, overrides)
    if config.mesh.xla_flags:
        xla_flags.apply()
    if config.mesh.cpu_devices > 1:
        jax.config.update("jax_num_cpu_devices", config.mesh.cpu_devices)
    initialize_processes(*processes)
    parts = setup.make(folder, config)
    check_same_data(parts, previous)
    if jax.process_index() == 0:
        run_folder.write(folder.path, setup.description(parts))
        terminal.header(console.header(parts))
    folder.push(jax.process_index())
    try:
        with (
            stop.told_in_one_line(folder),
            stop.watchdog(config.log.watchdog_seconds) as alive,
            stop.sigterm_at() as reached,
        ):
            gallery = train(parts, alive, reached)
    except StoppedError as error:
        folder.push(jax.process_index())
        print(f"main.py: {error}", flush=True)
        return error.exit_code
    if jax.process_index() == 0:
        console.finish(parts, gallery)
    folder.push(jax.process_index())
    return errors.EXIT_DONE


def read_config(
    workdir: str | None, recipe: str | None, overrides: Mapping[str, str]
) -> tuple[Folder, ConfigDict, dict[str, Any] | None]:
    """(run folder, config, what the folder said before). A folder that holds a run decides what the run is."""
    if not workdir:
        raise UserError("--workdir is missing: the folder where the run keeps its checkpoints, metrics and report")
    folder = Folder(workdir)
    if folder.path.exists() and not folder.path.is_dir():
        raise UserError(f"--workdir={workdir} is a file, not a folder")
    previous = run_folder.read(folder.path) if run_folder.is_run(folder.path) else None
    if previous is None and recipe is None:
        raise UserError(f"--workdir={workdir} holds no run yet; say what to train with --config=configs/NAME.py")
    if previous is None and place(str(folder)).exists():
        raise UserError(
            f"{folder} has checkpoints but no {run_folder.RUN_FILE}: restore that file, or use a new folder"
        )
    begun = None if previous is None else configs.from_json(previous["config"], str(folder))
    config = configs.override(begun, overrides, str(folder)) if recipe is None else configs.load(recipe, overrides)
    if begun is not None:
        changed = configs.differences(configs.to_json(begun), configs.to_json(config))
        if changed:
            raise UserError(
                f"{folder} holds a run with other settings ({', '.join(changed)}); use a new --workdir, "
                "or leave --config out to continue it as it was"
            )
    folder.path.mkdir(parents=True, exist_ok=True)
    return folder, config, previous


def check_same_data(run: Run, previous: Mapping[str, Any] | None) -> None:
    """A run goes on with the data it began with, or not at all."""
    if previous is None:
        return
    if previous["data"]["train"]["fingerprint"] != run.sources.train.fingerprint:
        raise UserError(
            f"{run.sources.train.name} is not the data this run began with "
            f"({previous['data']['train']['samples']} samples then, {len(run.sources.train)} now); "
            "restore it, or start in a new --workdir"
        )
    new = configs.flatten(configs.to_json(run.config)).keys() - configs.flatten(previous["config"]).keys()
    if new:
        print(f"{run.folder}: begun by older code, which had no {', '.join(sorted(new))}")
    if previous["tokenizer"]["fingerprint"] != run.tokenizer.fingerprint:
        # Its file or its libraries: a library that was upgraded must not lock a run out, but is worth a line.
        print(f"{run.folder}/tokenizer: its file or its libraries changed since the run began; some tokens may differ")


def train(run: Run, alive: Callable[[], None], reached: Callable[[int], bool]) -> Gallery | None:
    """All steps that are left; returns what the last evaluation has to show.

    ``alive()`` is told of progress, ``reached(step)`` says whether to stop after a step (``stop.py``).
    """
    config, first_process = run.config, jax.process_index() == 0
    train_step = setup.make_step(config, run.preset, run.model, run.optimizer, run.rate, run.mesh)
    keep_every = config.checkpoint.keep_every_steps
    checkpoints = Checkpoints(
        str(run.folder),
        keep_last=config.checkpoint.keep_last,
        keep_every=None if keep_every == configs.AUTO else keep_every,
    )
    state, first_step = start(run, checkpoints)
    if first_process:
        metric_files.truncate(run.workdir / metric_files.FILE, first_step)
    log = metric_files.Writer(
        run.workdir, enabled=first_process, tensorboard=config.log.tensorboard, first_step=first_step
    )
    progress = terminal.Progress(run.steps, first_step, enabled=first_process)
    samples = metric_files.Samples(run.workdir, enabled=config.log.samples)
    meter, evaluator = Meter(run, first_step), make_evaluator(run)
    in_flight: collections.deque[tuple[int, dict[str, jax.Array]]] = collections.deque()
    gallery, told, stopping = None, Told(), False

    def settle(left: int) -> None:
        """Waits until no more than so many steps are unfinished, and logs those that are due."""
        while len(in_flight) > left:
            step, metrics = in_flight.popleft()
            jax.block_until_ready(metrics)
            alive()
            if step == 1 or step % config.log.every_steps == 0 or step == run.steps:
                values = meter.read(step, {name: float(value) for name, value in metrics.items()})
                log.write(step, values)
                progress.update(
                    step, loss=values["train/loss"], pairs_per_second=values.get("train/pairs_per_second", math.nan)
                )
                told.update(progress, run)
                check_finite(run, step, metrics)

    rows = process_rows(run.mesh, config.batch_size)
    batches = stream(
        run.batches, rows, int(state.data_step), run.steps, workers=config.data.workers, prefetch=config.data.prefetch
    )
    with progress:
        for step in range(first_step + 1, run.steps + 1):
            with meter.waiting():
                host = next(batches)
            batch = to_devices({"image": host["image"], "text": host["text"]}, run.mesh, config.batch_size)
            samples.write(step, rows, host["index"])
            state, metrics = train_step(state, batch)
            in_flight.append((step, metrics))
            settle(IN_FLIGHT - 1)

            last = step == run.steps
            if due(step, run.eval_every, last):
                settle(0)
                with meter.paused():
                    values, gallery = evaluate(run, evaluator, state, show=last)
                log.write(step, values)
                progress.line(console.summary(step, values))
                alive()
            stopping = reached(step) and not last
            if due(step, run.checkpoint_every, last or stopping):
                settle(0)
                check_finite(run, step, metrics)
                log.sync()  # the lines of these steps are on disk before a checkpoint that follows them exists
                with meter.paused():
                    run.folder.push(jax.process_index())
                    checkpoints.save(step, state)
                alive()
            if stopping:
                break
        told.update(progress, run)
    checkpoints.close()
    log.close()
    samples.close()
    if stopping:
        raise PreemptedError(f"received SIGTERM; step {step} of {run.steps} is kept, the same command goes on from it")
    if gallery is None and not (run.workdir / "report.html").exists():
        _, gallery = evaluate(run, evaluator, state, show=True)
    return gallery


def start(run: Run, checkpoints: Checkpoints) -> tuple[State, int]:
    """The state to go on from and its step: the newest checkpoint's, or a fresh one."""
    step, average = checkpoints.latest(), run.config.ema_decay > 0
    if step is not None:
        return checkpoints.restore(step, abstract_state(run.model, run.optimizer, run.mesh, average=average)), step
    state = create_state(run.model, run.optimizer, run.mesh, run.config.seed, average=average)
    return (init_from(run, state) if run.config.model.init_from else state), 0


def init_from(run: Run, state: State) -> State:
    """A fresh state with the weights that ``config.model.init_from`` names.

    What did not come from them is said; ``init_from.txt`` has a line for every tensor.
    """
    source = run.config.model.init_from
    bare = Path(source).is_file()  # says nothing but its tensors
    loaded = load(run.config.model.name, weights=source) if bare else load(source)
    differing = {} if bare else differences(run.preset, loaded.preset)
    if run.preset.tokenizer == loaded.preset.tokenizer == "sentencepiece":  # each learned from captions of its own
        ours, theirs = (
            tokenizer.codec.processor.serialized_model_proto() for tokenizer in (run.tokenizer, loaded.tokenizer)
        )
        if ours != theirs:
            file = f"{source}/tokenizer/{run_folder.TOKENIZER_FILES['sentencepiece']}"
            differing["tokenizer"] = f"another vocabulary; --config.tokenizer.vocab={file} takes that of the weights"
    params, report = merge(state.params, loaded.params, run.config.model.init_from_allow, differing)
    if jax.process_index() == 0:
        print(f"{source}: " + "; ".join(report.lines()))
        (run.workdir / "init_from.txt").write_text("\n".join([source, *report.every()]) + "\n", encoding="utf-8")
    place = jax.tree.map(lambda leaf: leaf.sharding, (state.params, state.batch_stats))
    return state._replace(
        params=jax.device_put(params, place[0]),
        batch_stats=jax.device_put(loaded.batch_stats or state.batch_stats, place[1]),
        average=None if state.average is None else jax.device_put(params, place[0]),
    )


class Told:
    """How many bad samples a person has been told of; all that are known by name are in ``bad_samples.txt``."""

    def __init__(self) -> None:
        self.count = 0

    def update(self, progress: terminal.Progress, run: Run) -> None:
        faults = run.batches.faults
        if faults.reasons.total() > self.count:
            self.count = faults.reasons.total()
            progress.line(f"replaced {self.count} bad samples so far ({faults.summary()}); see bad_samples.txt")
            name = "bad_samples.txt" if jax.process_index() == 0 else f"bad_samples.{jax.process_index()}.txt"
            (run.workdir / name).write_text("\n".join(faults.examples) + "\n", encoding="utf-8")


def due(step: int, every: int | None, last: bool) -> bool:
    return last or (every is not None and step % every == 0)


def check_finite(run: Run, step: int, metrics: Mapping[str, jax.Array]) -> None:
    """A checkpoint is never written from a state that is lost already."""
    if not all(np.isfinite(float(metrics[name])) for name in ("loss", "grad_norm", "update_norm")):
        raise NonFiniteError(
            f"step {step}: the loss or its gradient is not finite; {run.folder} keeps the last good checkpoint: "
            "lower optimizer.learning_rate or set optimizer.clip_norm=1.0"
        )


def make_evaluator(run: Run) -> Evaluator:
    """Both towers, compiled once for all evaluations of the run."""
    batch_size = run.config.eval.batch_size
    return Evaluator(
        encoders=make_encoders(run.model, run.preset.preprocess, run.mesh),
        tokenizer=run.tokenizer,
        image_size=run.preset.architecture.image.image_size,
        preprocess=run.preset.preprocess,
        mesh=run.mesh,
        batch_size=run.config.batch_size if batch_size == configs.AUTO else batch_size,
        workers=run.config.data.workers,
    )


def evaluate(run: Run, evaluator: Evaluator, state: State, *, show: bool) -> tuple[dict[str, float], Gallery | None]:
    """``eval/...`` metrics of the held-out sources and, where asked, pairs to show."""
    evaluation, sources, weights = run.config.eval, run.sources, (state.evaluated, state.batch_stats)
    started, values, gallery = time.perf_counter(), {}, None
    if sources.heldout is not None:
        scale, bias = float(jnp.exp(state.evaluated["logit_scale"])), None
        if run.config.loss.name == "sigmoid":
            bias = float(state.evaluated["logit_bias"])
        found, embedded = evaluator.heldout(weights, sources.heldout, scale, bias)
        values |= {f"eval/{evaluation.heldout_name}/{name}": value for name, value in found.items()}
        gallery = evaluator.gallery(embedded, sources.heldout) if show else None
    if sources.zero_shot is not None:
        found = evaluator.zero_shot(weights, sources.zero_shot, evaluation.templates)
        values |= {f"eval/{evaluation.zero_shot_name}/{name}": value for name, value in found.items()}
    if values:
        values["eval/time_seconds"] = time.perf_counter() - started
    return values, gallery
