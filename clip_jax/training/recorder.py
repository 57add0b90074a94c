"""The logs of a training run: metrics, progress, the examples of each step, and unusable examples."""

import math
from collections.abc import Callable, Mapping
from types import TracebackType
from typing import Self

import jax
import numpy as np

from clip_jax import config as configs
from clip_jax.errors import NonFiniteError, StoppedError, UserError
from clip_jax.reports import terminal
from clip_jax.storage.checkpoints import latest_step
from clip_jax.training import budget
from clip_jax.training import metrics as metric_files
from clip_jax.training.meter import Meter, Pending
from clip_jax.training.run import Run


class Recorder:
    """The logs of one process; metrics and progress are the first process's.

    ``with Recorder(...) as recorder`` truncates what an interrupted run logged after ``first_step``, and closes all
    files at the end.
    """

    def __init__(self, run: Run, first_step: int, heartbeat: Callable[[], None]):
        first_process = jax.process_index() == 0
        if first_process:
            metric_files.truncate(run.workdir / metric_files.FILE, first_step)
        self._run, self._reported = run, 0
        self._budget = budget.Budget(run.config.data.max_bad_share, run.seen, first_step)
        self._log = metric_files.Writer(
            run.workdir,
            enabled=first_process,
            tensorboard=run.config.log.tensorboard,
            first_step=first_step,
            wandb=run.config.log.wandb,
            config=configs.to_json(run.config),
        )
        self._samples = metric_files.Samples(run.workdir, enabled=run.config.log.samples)
        self.progress = terminal.Progress(run.steps, first_step, enabled=first_process)
        self.meter = Meter(
            batch_size=run.config.batch_size,
            seen=run.seen,
            flops=run.flops,
            peak_flops=run.peak_flops,
            first_step=first_step,
        )
        self.pending = Pending(heartbeat, self._write_step)

    def __enter__(self) -> Self:
        self.progress.__enter__()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if kind is None or issubclass(kind, StoppedError | UserError):
            self.report_bad_samples()
        self.progress.__exit__(kind, error, trace)
        self._log.close()
        self._samples.close()

    def examples(self, step: int, rows: np.ndarray, index: np.ndarray, faults: np.ndarray) -> None:
        """The examples of a step that is about to be launched, and the counts of those that they replace."""
        self._samples.write(step, rows, index)
        self._budget.add(faults)

    def add(self, step: int, metrics: Mapping[str, jax.Array]) -> None:
        """A step was launched; its metrics are logged when it is finished and due."""
        # The counts of all processes are added up on the devices, so all must ask for it between the same two steps.
        counts = {budget.COUNTS: self._budget.counts()} if self._due(step) else {}
        self.pending.add(step, {**metrics, **counts})

    def write(self, step: int, values: Mapping[str, float], line: str) -> None:
        """An evaluation's metrics, and their line for the user."""
        self._log.write(step, values)
        self.progress.line(line)

    def sync(self) -> None:
        """Waits for all launched steps and flushes their log lines to disk; called before a checkpoint is saved."""
        self.pending.settle()
        self._log.sync()

    def _write_step(self, step: int, metrics: Mapping[str, jax.Array]) -> None:
        if not self._due(step):
            return
        counts = np.asarray(metrics[budget.COUNTS])
        scalars = {name: float(value) for name, value in metrics.items() if name != budget.COUNTS}
        values = self.meter.read(step, scalars | budget.as_metrics(counts))
        self._log.write(step, values)
        speed = values.get("train/pairs_per_second", math.nan)
        self.progress.update(step, loss=values["train/loss"], pairs_per_second=speed)
        self.report_bad_samples()
        self.check_finite(step, metrics)
        self._budget.check(step, counts, first=next(iter(self._run.faults.examples), ""))

    def _due(self, step: int) -> bool:
        return step == 1 or step % self._run.config.log.every_steps == 0 or step == self._run.steps

    def check_finite(self, step: int, metrics: Mapping[str, jax.Array]) -> None:
        """Raises NonFiniteError if the loss, gradient or update is not finite, so that no such state is saved."""
        if not all(np.isfinite(float(metrics[name])) for name in ("loss", "grad_norm", "update_norm")):
            folder = self._run.folder
            where = "and repeat the command"
            if latest_step(str(folder)) is not None:
                where = f"in a new --workdir with --config.model.init_from={folder} (its last good checkpoint)"
            raise NonFiniteError(
                f"step {step}: the loss or its gradient is not finite; lower config.optimizer.learning_rate or set "
                f"config.optimizer.clip_norm=1.0, {where}"
            )

    def report_bad_samples(self) -> None:
        """Prints the number of bad examples if it increased, and adds them to this process's ``bad_samples.txt``."""
        faults = self._run.faults
        if faults.reasons.total() == self._reported:
            return
        self._reported = faults.reasons.total()
        number = jax.process_index()
        name = "bad_samples.txt" if number == 0 else f"bad_samples.{number}.txt"
        self.progress.line(f"replaced {self._reported} bad samples so far ({faults.summary()}); see {name}")
        metric_files.add_lines(self._run.workdir / name, faults.names())
