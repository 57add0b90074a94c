"""How fast a run goes: pairs per second since the last log line, without evaluation and checkpoints."""

import contextlib
import time
from collections.abc import Iterator, Mapping

from clip_jax.models import flops
from clip_jax.training.setup import Run


class Meter:
    """Speed since the last log line, and what a step's numbers add up to."""

    def __init__(self, run: Run, first_step: int):
        self._batch, self._peak = run.config.batch_size, run.peak_flops
        self._flops_per_pair = flops.training(run.preset.architecture)
        self._compiling = True
        self._step, self._since, self._waited = first_step, time.perf_counter(), 0.0

    @contextlib.contextmanager
    def waiting(self) -> Iterator[None]:
        """Time inside is time spent waiting for data."""
        started = time.perf_counter()
        yield
        self._waited += time.perf_counter() - started

    @contextlib.contextmanager
    def paused(self) -> Iterator[None]:
        """Time inside is not training time."""
        started = time.perf_counter()
        yield
        self._since += time.perf_counter() - started

    def read(self, step: int, metrics: Mapping[str, float]) -> dict[str, float]:
        """The log line of a step."""
        pairs = step * self._batch
        values = {f"train/{name}": value for name, value in metrics.items()}
        values |= {"train/pairs": pairs, "train/flops": pairs * self._flops_per_pair}
        now = time.perf_counter()
        seconds = now - self._since
        if not self._compiling and seconds > 0:  # the first line's time is the compiler's
            speed = (step - self._step) * self._batch / seconds
            values |= {"train/pairs_per_second": speed, "train/data_wait_share": min(1.0, self._waited / seconds)}
            if self._peak is not None:
                values["train/mfu"] = speed * self._flops_per_pair / self._peak
        self._compiling = False
        self._step, self._since, self._waited = step, now, 0.0
        return values
