"""Order + source + views -> batches: decoding, cropping and tokenizing in worker threads, ahead of the step.

Grain's element is this process's slice of a whole batch, decoded into preallocated arrays: an element per example costs
half of the decoder's speed. Batch k, with its crops and its choice among captions, is a pure function of (seed, k):
random numbers come from (seed, position), never from a worker or a host.
"""

import collections
import threading
import time
import zlib
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field

import grain
import numpy as np

from clip_jax.data import images
from clip_jax.data.order import MixedOrder, Order, fold
from clip_jax.data.sources.sample import BadSampleError, Sample, Source
from clip_jax.data.views import PAIR, View, empty_batch
from clip_jax.errors import UserError

READ_ATTEMPTS = 4
FIRST_RETRY_SECONDS = 0.2
REPLACEMENT_ATTEMPTS = 100
JUDGED_AFTER = 1000
"""Examples read before the share of bad ones is judged: one broken image among the first ten proves nothing."""
NAMED_FAULTS = 1000


@dataclass
class Faults:
    """The examples that this process replaced: counted by reason, the first ones also by name."""

    max_share: float
    read: int = 0
    reasons: collections.Counter = field(default_factory=collections.Counter)
    examples: list[str] = field(default_factory=list)
    lock: threading.Lock = field(default_factory=threading.Lock, repr=False)

    def count(self, error: BadSampleError) -> None:
        with self.lock:
            self.reasons[error.reason] += 1
            if len(self.examples) < NAMED_FAULTS:
                self.examples.append(str(error))

    def seen(self, examples: int) -> None:
        """Raises UserError when too many of the examples read so far were bad."""
        with self.lock:
            self.read += examples
            bad = self.reasons.total()
            if self.read >= JUDGED_AFTER and bad > self.max_share * self.read:
                raise UserError(
                    f"{bad} of {self.read} examples could not be used ({self.summary()}; first: {self.examples[0]}); "
                    "repair the data, or raise config.data.max_bad_share"
                )

    def summary(self) -> str:
        return ", ".join(f"{count} {reason}" for reason, count in self.reasons.most_common())


def read(source: Source, index: int) -> Sample:
    """An example; a transient fault (of a network file system) is retried, then stops the run."""
    for attempt in range(READ_ATTEMPTS):
        try:
            return source[index]
        except OSError as error:
            if attempt == READ_ATTEMPTS - 1:
                raise UserError(f"{source.name}: example {index} cannot be read: {error}") from error
            time.sleep(FIRST_RETRY_SECONDS * 2**attempt)
    raise AssertionError("unreachable")


@dataclass(frozen=True)
class TrainingBatches:
    """Batch k of a run, or a process's rows of it."""

    source: Source
    order: Order | MixedOrder
    views: Mapping[str, View]
    faults: Faults
    ratio: int = 1
    """Batches of the order that a step takes at once."""
    start: int = 0
    """The step from which ``ratio`` holds, and the batches of the order before it."""
    before: int = 0

    def __call__(self, step: int, rows: np.ndarray) -> dict[str, np.ndarray]:
        """The arrays of the views, and ``index`` int64[rows]: the examples that were used."""
        first = self.before + (step - self.start) * self.ratio
        positions = np.concatenate([self.order.positions(first + n) for n in range(self.ratio)])[rows]
        indices = self.order.indices(positions)
        batch, used = empty_batch(self.views, len(rows)), np.empty(len(rows), np.int64)
        for row, (position, index) in enumerate(zip(positions.tolist(), indices.tolist(), strict=True)):
            used[row] = self._fill(position, index, {name: array[row] for name, array in batch.items()})
        self.faults.seen(len(rows))
        return batch | {"index": used}

    def _fill(self, position: int, index: int, arrays: Mapping[str, np.ndarray]) -> int:
        """Fills one row. A bad example is replaced by another one, which follows from the position alone."""
        rng = np.random.Generator(np.random.Philox(key=fold(self.order.seed, position, 2)))
        for attempt in range(REPLACEMENT_ATTEMPTS):
            key = str(index)
            try:
                sample = read(self.source, index)._replace(index=index)
                key = sample.key
                for name in PAIR:
                    sample = self.views[name].fill(sample, rng, arrays) or sample
                for name, view in self.views.items():
                    if name not in PAIR:
                        view.fill(sample, self._generator(position, name, attempt), arrays)
                return index
            except images.BadImageError as error:
                self.faults.count(BadSampleError(str(error), key))
            except BadSampleError as error:
                self.faults.count(error)
            index = self.order.another(index, rng)
        raise UserError(
            f"{self.source.name}: {REPLACEMENT_ATTEMPTS} examples in a row could not be used ({self.faults.summary()})"
        )

    def _generator(self, position: int, view: str, attempt: int) -> np.random.Generator:
        """A view besides the pair draws from its own generator, so that it changes no batch of the pair's."""
        return np.random.Generator(
            np.random.Philox(key=fold(self.order.seed, position, 2, zlib.crc32(view.encode()), attempt))
        )


def stream(
    batch: Callable[[int, np.ndarray], dict[str, np.ndarray]],
    rows: np.ndarray,
    first_step: int,
    steps: int,
    *,
    workers: int,
    prefetch: int,
) -> Iterator[dict[str, np.ndarray]]:
    """Batches ``first_step`` to ``steps - 1``, up to ``prefetch`` of them ready before they are needed."""
    dataset = grain.MapDataset.range(first_step, steps).map(lambda step: batch(int(step), rows))
    return iter(dataset.to_iter_dataset(grain.ReadOptions(num_threads=workers, prefetch_buffer_size=prefetch)))
