"""How fast a run is, and its steps in flight: metrics are read when they are due, never before.

A step is launched while those before it still compute. Reading a metric waits for its step, so metrics stay on the
devices until no more than ``IN_FLIGHT`` steps are unfinished.
"""

import collections
import contextlib
import time
from collections.abc import Callable, Iterator, Mapping

import jax

IN_FLIGHT = 2
"""Steps that may be launched and not finished."""


class Pending:
    """The metrics of steps that are launched; ``settle`` waits for them in order."""

    def __init__(self, heartbeat: Callable[[], None], log: Callable[[int, Mapping[str, jax.Array]], None]):
        self._steps: collections.deque[tuple[int, Mapping[str, jax.Array]]] = collections.deque()
        self._heartbeat, self._log = heartbeat, log

    def add(self, step: int, metrics: Mapping[str, jax.Array]) -> None:
        self._steps.append((step, metrics))
        self.settle(IN_FLIGHT - 1)

    def settle(self, unfinished: int = 0) -> None:
        """Waits until no more than ``unfinished`` steps are unfinished, and logs the others."""
        while len(self._steps) > unfinished:
            step, metrics = self._steps.popleft()
            jax.block_until_ready(metrics)
            self._heartbeat()
            self._log(step, metrics)


class Meter:
    """Pairs per second since the last log line, without evaluation and checkpoints."""

    def __init__(
        self,
        *,
        batch_size: int,
        seen: Callable[[int], int],
        flops: Callable[[int], int],
        peak_flops: float | None,
        first_step: int,
    ):
        """``flops(step)`` and ``seen(step)``: the training FLOPs of all steps up to one, and their pairs, with those
        that a selection left out; ``peak_flops``: FLOP/s of all devices."""
        self._batch, self._seen, self._flops, self._peak = batch_size, seen, flops, peak_flops
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
        values = {f"train/{name}": value for name, value in metrics.items()}
        values |= {"train/pairs": step * self._batch, "train/flops": self._flops(step)}
        selects = self._seen(step) > step * self._batch
        if selects:
            values["train/pairs_seen"] = self._seen(step)
        now = time.perf_counter()
        seconds = now - self._since
        if not self._compiling and seconds > 0:  # the first line's time is the compiler's
            speed = (step - self._step) * self._batch / seconds
            values |= {"train/pairs_per_second": speed, "train/data_wait_share": min(1.0, self._waited / seconds)}
            if selects:
                seen = self._seen(step) - self._seen(self._step)
                values["train/pairs_seen_per_second"] = seen / seconds
            if self._peak is not None:
                values["train/mfu"] = (self._flops(step) - self._flops(self._step)) / seconds / self._peak
        self._compiling = False
        self._step, self._since, self._waited = step, now, 0.0
        return values
