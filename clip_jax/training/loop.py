"""The story of a run: read the config, put the parts together, train, evaluate, keep, show.

The file people read first. Each part is elsewhere: ``config.py`` says what a run is, ``setup.py`` builds it,
``step.py`` is the one compiled function, ``data/stream.py`` feeds it, ``evaluation`` judges it.
"""

import collections
import math
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from ml_collections import ConfigDict

from clip_jax import config as configs
from clip_jax import errors, run_folder
from clip_jax.checkpoint import FOLDER, Checkpoints
from clip_jax.data.stream import stream
from clip_jax.errors import NonFiniteError, UserError
from clip_jax.evaluation.embed import make_encoders
from clip_jax.evaluation.runner import Evaluator
from clip_jax.models import flops
from clip_jax.reports import page, terminal
from clip_jax.reports.gallery import Gallery
from clip_jax.sharding import batch_shards, initialize_processes, process_rows, to_devices
from clip_jax.training import metrics as metric_files
from clip_jax.training import setup
from clip_jax.training.setup import Run
from clip_jax.training.step import State, abstract_state, create_state, make_train_step

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
    if config.mesh.cpu_devices > 1:
        jax.config.update("jax_num_cpu_devices", config.mesh.cpu_devices)
    initialize_processes(*processes)
    parts = setup.make(folder, config)
    check_same_data(parts, previous)
    if jax.process_index() == 0:
        run_folder.write(folder, setup.description(parts))
        terminal.header(header(parts))
    try:
        gallery = train(parts)
    except NonFiniteError as error:
        print(f"main.py: {error}")
        return errors.EXIT_NON_FINITE
    if jax.process_index() == 0:
        finish(parts, gallery)
    return errors.EXIT_DONE


def read_config(
    workdir: str | None, recipe: str | None, overrides: Mapping[str, str]
) -> tuple[Path, ConfigDict, dict[str, Any] | None]:
    """(run folder, config, what the folder said before). A folder that holds a run decides what the run is."""
    if not workdir:
        raise UserError("--workdir is missing: the folder where the run keeps its checkpoints, metrics and report")
    folder = Path(workdir)
    if folder.exists() and not folder.is_dir():
        raise UserError(f"--workdir={workdir} is a file, not a folder")
    previous = run_folder.read(folder) if run_folder.is_run(folder) else None
    if previous is None and recipe is None:
        raise UserError(f"--workdir={workdir} holds no run yet; say what to train with --config=configs/NAME.py")
    if previous is None and (folder / FOLDER).exists():
        raise UserError(
            f"{folder} has checkpoints but no {run_folder.RUN_FILE}: restore that file, or use a new folder"
        )
    if recipe is not None:
        config = configs.load(recipe, overrides)
    else:
        config = configs.override(configs.from_json(previous["config"], str(folder)), overrides, str(folder))
    if previous is not None:
        changed = configs.differences(previous["config"], configs.to_json(config))
        if changed:
            raise UserError(
                f"{folder} holds a run with other settings ({', '.join(changed)}); use a new --workdir, "
                "or leave --config out to continue it as it was"
            )
    folder.mkdir(parents=True, exist_ok=True)
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
    if previous["tokenizer"]["fingerprint"] != run.tokenizer.fingerprint:
        # Its file or its libraries: a library that was upgraded must not lock a run out, but is worth a line.
        print(f"{run.workdir}/tokenizer: its file or its libraries changed since the run began; some tokens may differ")


def train(run: Run) -> Gallery | None:
    """All steps that are left; returns what the last evaluation has to show."""
    config, first_process = run.config, jax.process_index() == 0
    train_step = make_train_step(
        run.model, run.preset.preprocess, run.optimizer, run.rate, run.mesh, max_logit_scale=config.loss.max_logit_scale
    )
    keep_every = config.checkpoint.keep_every_steps
    checkpoints = Checkpoints(
        run.workdir,
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
    meter = Meter(run, first_step)
    in_flight: collections.deque[tuple[int, dict[str, jax.Array]]] = collections.deque()
    gallery = None

    def settle(left: int) -> None:
        """Waits until no more than so many steps are unfinished, and logs those that are due."""
        while len(in_flight) > left:
            step, metrics = in_flight.popleft()
            jax.block_until_ready(metrics)
            if step == 1 or step % config.log.every_steps == 0 or step == run.steps:
                values = meter.read(step, {name: float(value) for name, value in metrics.items()})
                log.write(step, values)
                progress.update(
                    step, loss=values["train/loss"], pairs_per_second=values.get("train/pairs_per_second", math.nan)
                )
                if not (math.isfinite(values["train/loss"]) and math.isfinite(values["train/grad_norm"])):
                    raise NonFiniteError(
                        f"step {step}: the loss or its gradient is not finite; {run.workdir} keeps the last checkpoint"
                    )

    rows = process_rows(run.mesh, config.batch_size)
    batches = stream(
        run.batches, rows, int(state.data_step), run.steps, workers=config.data.workers, prefetch=config.data.prefetch
    )
    with progress:
        for step in range(first_step + 1, run.steps + 1):
            with meter.waiting():
                host = next(batches)
            batch = to_devices({"image": host["image"], "text": host["text"]}, run.mesh, config.batch_size)
            state, metrics = train_step(state, batch)
            in_flight.append((step, metrics))
            settle(IN_FLIGHT - 1)

            last = step == run.steps
            if due(step, run.eval_every, last):
                settle(0)
                with meter.paused():
                    values, gallery = evaluate(run, state, show=last)
                log.write(step, values)
                progress.line(summary(step, values))
            if due(step, run.checkpoint_every, last):
                settle(0)
                check_finite(run, step, metrics)
                log.sync()  # the lines of these steps are on disk before a checkpoint that follows them exists
                with meter.paused():
                    checkpoints.save(step, state)
    checkpoints.close()
    log.close()
    if run.batches.faults.reasons:
        print(f"replaced bad samples: {run.batches.faults.summary()} (first: {run.batches.faults.examples[0]})")
    if gallery is None and not (run.workdir / "report.html").exists():
        _, gallery = evaluate(run, state, show=True)
    return gallery


def start(run: Run, checkpoints: Checkpoints) -> tuple[State, int]:
    """The state to go on from and its step: the newest checkpoint's, or a fresh one."""
    step = checkpoints.latest()
    if step is None:
        return create_state(run.model, run.optimizer, run.mesh, run.config.seed), 0
    return checkpoints.restore(step, abstract_state(run.model, run.optimizer, run.mesh)), step


def due(step: int, every: int | None, last: bool) -> bool:
    return last or (every is not None and step % every == 0)


def check_finite(run: Run, step: int, metrics: Mapping[str, jax.Array]) -> None:
    """A checkpoint is never written from a state that is lost already."""
    if not all(np.isfinite(float(metrics[name])) for name in ("loss", "grad_norm", "update_norm")):
        raise NonFiniteError(
            f"step {step}: the loss or its gradient is not finite; {run.workdir} keeps the last good checkpoint: "
            "lower optimizer.learning_rate or set optimizer.clip_norm=1.0"
        )


def evaluate(run: Run, state: State, *, show: bool) -> tuple[dict[str, float], Gallery | None]:
    """``eval/...`` metrics of the held-out sources and, where asked, pairs to show."""
    evaluation, sources = run.config.eval, run.sources
    evaluator = Evaluator(
        encoders=make_encoders(run.model, run.preset.preprocess, run.mesh),
        tokenizer=run.tokenizer,
        image_size=run.preset.architecture.image.image_size,
        preprocess=run.preset.preprocess,
        mesh=run.mesh,
        batch_size=run.config.batch_size if evaluation.batch_size == configs.AUTO else evaluation.batch_size,
        workers=run.config.data.workers,
    )
    started, values, gallery = time.perf_counter(), {}, None
    if sources.heldout is not None:
        scale = float(jnp.exp(state.params["logit_scale"]))
        found, embedded = evaluator.heldout(state.params, sources.heldout, scale)
        values |= {f"eval/{evaluation.heldout_name}/{name}": value for name, value in found.items()}
        gallery = evaluator.gallery(embedded, sources.heldout) if show else None
    if sources.zero_shot is not None:
        found = evaluator.zero_shot(state.params, sources.zero_shot, evaluation.templates)
        values |= {f"eval/{evaluation.zero_shot_name}/{name}": value for name, value in found.items()}
    if values:
        values["eval/time_seconds"] = time.perf_counter() - started
    return values, gallery


class Meter:
    """Speed since the last log line, without evaluation and checkpoints, and what the step's numbers add up to."""

    def __init__(self, run: Run, first_step: int):
        self._batch, self._peak = run.config.batch_size, run.peak_flops
        self._flops_per_pair = flops.training(run.preset.architecture)
        self._step, self._since, self._waited = first_step, time.perf_counter(), 0.0

    def waiting(self):
        return _Timed(self._add_wait)

    def paused(self):
        return _Timed(self._skip)

    def _add_wait(self, seconds: float) -> None:
        self._waited += seconds

    def _skip(self, seconds: float) -> None:
        self._since += seconds

    def read(self, step: int, metrics: Mapping[str, float]) -> dict[str, float]:
        """The log line of a step."""
        pairs = step * self._batch
        values = {f"train/{name}": value for name, value in metrics.items()}
        values |= {"train/pairs": pairs, "train/flops": pairs * self._flops_per_pair}
        now = time.perf_counter()
        seconds = now - self._since
        if step > 1 and seconds > 0:  # the first step's time is the compiler's
            speed = (step - self._step) * self._batch / seconds
            values |= {"train/pairs_per_second": speed, "train/data_wait_share": min(1.0, self._waited / seconds)}
            if self._peak is not None:
                values["train/mfu"] = speed * self._flops_per_pair / self._peak
        self._step, self._since, self._waited = step, now, 0.0
        return values


class _Timed:
    def __init__(self, report):
        self._report = report

    def __enter__(self):
        self._started = time.perf_counter()

    def __exit__(self, *_):
        self._report(time.perf_counter() - self._started)


def header(run: Run) -> list[tuple[str, str]]:
    """What is about to run, for a person."""
    counts, mesh, batch = run.parameters, run.mesh, run.config.batch_size
    axes = " x ".join(f"{name} {size}" for name, size in mesh.shape.items())
    train = run.sources.train
    rows = [
        ("model", f"{run.config.model.name}, {counts['total'] / 1e6:.1f}M parameters"),
        ("towers", f"image {counts['image'] / 1e6:.1f}M, text {counts['text'] / 1e6:.1f}M, {run.config.model.dtype}"),
        ("mesh", f"{axes} on {jax.device_count()} x {jax.devices()[0].device_kind}, {jax.process_count()} process(es)"),
        ("batch", f"{batch} pairs, {batch // batch_shards(mesh)} a device"),
        ("steps", f"{run.steps} ({run.steps * batch / len(train):.1f} epochs)"),
        ("data", f"{train.name}, {len(train)} samples"),
    ]
    if run.sources.heldout is not None:
        rows.append(("held out", f"{run.sources.heldout.name}, {len(run.sources.heldout)} samples"))
    if run.sources.zero_shot is not None:
        classes = len(run.sources.zero_shot.class_names)
        rows.append(("zero-shot", f"{run.sources.zero_shot.name}, {classes} classes"))
    return [*rows, ("folder", str(run.workdir))]


def summary(step: int, values: Mapping[str, float]) -> str:
    """One line of an evaluation's numbers."""
    shown = ("loss", "zero_shot_top1", "i2t_R@1", "t2i_R@1", "i2t_R@5", "t2i_R@5")
    parts = [f"{name.removeprefix('eval/')} {v:.3f}" for name, v in values.items() if name.split("/")[-1] in shown]
    return f"evaluation at step {step}: " + "  ".join(parts)


def finish(run: Run, gallery: Gallery | None) -> None:
    """The report, the table of results, and what to try next."""
    report = run.workdir / "report.html"
    if gallery is not None or not report.exists():
        page.write(run.workdir, gallery)
    last: dict[str, float] = {}
    for line in page.read_metrics(run.workdir / metric_files.FILE):
        last |= line
    rows = [
        (name.removeprefix("eval/"), f"{value:.3f}")
        for name, value in last.items()
        if name.startswith("eval/") and name.split("/")[-1] not in ("images", "skipped", "time_seconds")
    ]
    terminal.results("Results", [("train/loss", f"{last['train/loss']:.3f}"), *rows])
    terminal.next_commands(
        [
            f"open {report}",
            f'clip-jax classify --model={run.workdir} --image=PATH --labels="a red circle,a blue square"',
            f"python -c \"import clip_jax; print(clip_jax.load('{run.workdir}'))\"",
        ]
    )
