"""How many examples were bad, over all processes: counts for the metrics, and the end of a run past its budget."""

import collections
import functools
from collections.abc import Callable

import jax
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from clip_jax.data.faults import COLUMNS, CUT
from clip_jax.errors import UserError

COUNTS = "faults"
"""The name of the counts among a step's metrics."""
WINDOW = 10_000
"""The latest examples, of which the share of bad ones is judged."""
JUDGED_AFTER = 1000
"""Examples before the share is judged: one broken image among the first ten proves nothing."""


class Budget:
    """The counts since the last log line, and those of the last ``WINDOW`` examples."""

    def __init__(self, max_share: float, seen: Callable[[int], int], first_step: int):
        """``seen(step)``: the examples of all steps up to one."""
        self._max_share, self._seen, self._step = max_share, seen, first_step
        self._since = np.zeros(len(COLUMNS), np.int32)
        self._window: collections.deque[tuple[int, np.ndarray]] = collections.deque()

    def add(self, faults: np.ndarray) -> None:
        """``faults`` int32[rows, len(COLUMNS)] of this process's rows of a step."""
        self._since += faults.sum(axis=0, dtype=np.int32)

    def counts(self) -> jax.Array | np.ndarray:
        """int32[len(COLUMNS)]: those of all processes since the last call; a computation that nothing waits for.

        All processes must call it between the same two steps.
        """
        since, self._since = self._since, np.zeros_like(self._since)
        return sum_over_processes(since)

    def check(self, step: int, counts: np.ndarray, first: str) -> None:
        """Raises UserError if too many of the latest examples, up to ``step``, were bad: on all processes the same.

        ``first`` names an example of this process.
        """
        self._window.append((self._seen(step) - self._seen(self._step), counts))
        self._step = step
        while sum(read for read, _ in self._window) - self._window[0][0] >= WINDOW:
            self._window.popleft()
        read = sum(read for read, _ in self._window)
        total = np.sum([counts for _, counts in self._window], axis=0)
        found = {name: int(count) for name, count in zip(COLUMNS, total, strict=True) if count and name != CUT}
        bad = sum(found.values())
        if read >= JUDGED_AFTER and bad > self._max_share * read:
            reasons = ", ".join(f"{count} {name.replace('_', ' ')}" for name, count in found.items())
            raise UserError(
                f"{bad} of the last {read} examples of all processes could not be used ({reasons}"
                f"{f'; first: {first}' if first else ''}); bad_samples*.txt names them: repair the data, or raise "
                "config.data.max_bad_share"
            )


def as_metrics(counts: np.ndarray) -> dict[str, float]:
    """The counts that are not zero, by name, and the number of bad examples; empty where all is well."""
    found = {name: float(count) for name, count in zip(COLUMNS, counts, strict=True) if count}
    bad = sum(count for name, count in found.items() if name != CUT)
    return ({"bad_examples": bad} if bad else {}) | found


def sum_over_processes(values: np.ndarray) -> jax.Array | np.ndarray:
    """The sum of each process's int32[n]."""
    if jax.process_count() == 1:
        return values
    shardings, add = _sum(jax.process_count())
    return add(jax.make_array_from_process_local_data(shardings, values[None], (jax.process_count(), len(values))))


@functools.cache
def _sum(processes: int) -> tuple[NamedSharding, Callable[[jax.Array], jax.Array]]:
    devices = sorted(jax.devices(), key=lambda device: (device.process_index, device.id))
    mesh = Mesh(np.array(devices).reshape(processes, -1), ("process", "device"))
    add = jax.jit(lambda rows: rows.sum(axis=0), out_shardings=NamedSharding(mesh, PartitionSpec()))
    return NamedSharding(mesh, PartitionSpec("process")), add
