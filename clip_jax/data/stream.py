"""Makes batches from an order, a source and views; worker threads decode, crop and tokenize ahead of the step.

Each Grain element is this process's slice of a global batch, decoded into preallocated arrays: one element per example
would halve the decoding speed. Batch k, including its crops and choice of captions, is a pure function of (seed, k):
random numbers depend only on (seed, position), never on a worker or a host.
"""

import threading
import time
import zlib
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass

import grain
import numpy as np

from clip_jax.data import faults, images
from clip_jax.data.faults import Faults
from clip_jax.data.order import MixedOrder, Order, fold
from clip_jax.data.sources.sample import BadSampleError, Sample, Source
from clip_jax.data.views import PAIR, View, empty_batch
from clip_jax.errors import UserError

READ_ATTEMPTS = 4
FIRST_RETRY_SECONDS = 0.2
REPLACEMENT_ATTEMPTS = 100


def read(source: Source, index: int) -> Sample:
    """Reads an example and cuts its captions to ``MAX_CHARACTERS``. Retries an OSError, then raises UserError."""
    return faults.with_short_captions(_read(source, index))


def _read(source: Source, index: int) -> Sample:
    for attempt in range(READ_ATTEMPTS):
        try:
            return source[index]
        except OSError as error:
            if attempt == READ_ATTEMPTS - 1:
                raise UserError(f"{source.name}: example {index} cannot be read: {error}") from error
            time.sleep(FIRST_RETRY_SECONDS * 2**attempt)
    raise AssertionError("unreachable")


_thread = threading.local()


def _generator_of_thread(key: int) -> np.random.Generator:
    """``Generator(Philox(key=key))``, valid until the next call in this thread.

    A new one takes five times as long, because NumPy also draws entropy for it.
    """
    if not hasattr(_thread, "generator"):
        _thread.generator = np.random.Generator(np.random.Philox(key=0))
        _thread.state = _thread.generator.bit_generator.state
    state = _thread.state
    state["state"]["key"][0] = key
    _thread.generator.bit_generator.state = state
    return _thread.generator


@dataclass(frozen=True)
class TrainingBatches:
    """Batch k of a run, or a process's rows of it."""

    source: Source
    order: Order | MixedOrder
    views: Mapping[str, View]
    faults: Faults
    ratio: int = 1
    """Batches of the order per step."""
    start: int = 0
    """The first step with this ``ratio``."""
    before: int = 0
    """Batches of the order that earlier steps used."""

    def __call__(self, step: int, rows: np.ndarray) -> dict[str, np.ndarray]:
        """The arrays of the views; ``index`` int64[rows], the examples that were used; and ``faults``.

        ``faults`` int32[rows, len(faults.COLUMNS)]: how often an example was replaced for each kind of fault.
        """
        first = self.before + (step - self.start) * self.ratio
        positions = np.concatenate([self.order.positions(first + n) for n in range(self.ratio)])[rows]
        indices = self.order.indices(positions)
        batch, used = empty_batch(self.views, len(rows)), np.empty(len(rows), np.int64)
        counts = np.zeros((len(rows), len(faults.COLUMNS)), np.int32)
        for row, (position, index) in enumerate(zip(positions.tolist(), indices.tolist(), strict=True)):
            arrays = {name: array[row] for name, array in batch.items()}
            used[row] = self._fill(position, index, arrays, counts[row])
        return batch | {"index": used, "faults": counts}

    def _fill(self, position: int, index: int, arrays: Mapping[str, np.ndarray], counts: np.ndarray) -> int:
        """Fills one row. A bad example is replaced by another one, which follows from the position alone."""
        rng = _generator_of_thread(fold(self.order.seed, position, 2))
        for attempt in range(REPLACEMENT_ATTEMPTS):
            key = str(index)
            try:
                found = _read(self.source, index)._replace(index=index)
                short, key = faults.with_short_captions(found), found.key
                sample = short
                for name in PAIR:
                    sample = self.views[name].fill(sample, rng, arrays) or sample
                for name, view in self.views.items():
                    if name not in PAIR:
                        view.fill(sample, self._generator(position, name, attempt), arrays)
                counts[faults.COLUMNS.index(faults.CUT)] += short is not found
                return index
            except images.BadImageError as error:
                self.faults.count(BadSampleError(str(error), key), counts)
            except BadSampleError as error:
                self.faults.count(error, counts)
            index = self.order.another(index, rng)
        raise UserError(
            f"{self.source.name}: {REPLACEMENT_ATTEMPTS} examples in a row could not be used ({self.faults.summary()})"
        )

    def _generator(self, position: int, view: str, attempt: int) -> np.random.Generator:
        """The generator of a view other than the pair: adding a view does not change the pair's random numbers."""
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
