"""Order + source -> batches: decoding, cropping and tokenising in worker threads, ahead of the step.

Grain's element is this process's slice of a whole batch, decoded into one preallocated array: an element a sample
costs half of the decoder's speed in hand-overs. Batch k, with its crops and the choice among captions, is a pure
function of (seed, k): random numbers come from (seed, position), never from a worker or a host.
"""

import collections
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field

import grain
import numpy as np

from clip_jax.data import images
from clip_jax.data.order import Order, fold
from clip_jax.data.sources import BadSampleError, Source
from clip_jax.data.tokenizers import Tokenizer
from clip_jax.errors import UserError

READ_ATTEMPTS = 4
FIRST_RETRY_SECONDS = 0.2
REPLACEMENT_ATTEMPTS = 100
BUDGET_AFTER = 1000
"""The share of bad samples is judged once so many were read: one broken image among the first ten is no verdict."""


@dataclass
class Faults:
    """What was replaced in this process: counted by reason, the first few kept by name."""

    max_share: float
    read: int = 0
    reasons: collections.Counter = field(default_factory=collections.Counter)
    examples: list[str] = field(default_factory=list)
    lock: threading.Lock = field(default_factory=threading.Lock, repr=False)

    def count(self, error: BadSampleError) -> None:
        with self.lock:
            self.reasons[error.reason] += 1
            if len(self.examples) < 1000:
                self.examples.append(str(error))

    def seen(self, samples: int) -> None:
        """Raises UserError when too many of the samples read so far were bad."""
        with self.lock:
            self.read += samples
            bad = self.reasons.total()
            if self.read >= BUDGET_AFTER and bad > self.max_share * self.read:
                raise UserError(
                    f"{bad} of {self.read} samples could not be used ({self.summary()}; first: {self.examples[0]}); "
                    "mend the data, or raise config.data.max_bad_share"
                )

    def summary(self) -> str:
        return ", ".join(f"{count} {reason}" for reason, count in self.reasons.most_common())


def read(source: Source, index: int):
    """A sample; a fault that may pass (a network file system's) is retried, then stops the run with its place."""
    for attempt in range(READ_ATTEMPTS):
        try:
            return source[index]
        except OSError as error:
            if attempt == READ_ATTEMPTS - 1:
                raise UserError(f"{source.name}: sample {index} cannot be read: {error}") from error
            time.sleep(FIRST_RETRY_SECONDS * 2**attempt)
    raise AssertionError("unreachable")


@dataclass(frozen=True)
class TrainingBatches:
    """Batch k of a run, or a process's rows of it."""

    source: Source
    order: Order
    tokenizer: Tokenizer
    image_size: int
    crop_scale: tuple[float, float]
    crop_ratio: tuple[float, float]
    interpolation: str
    faults: Faults

    def __call__(self, step: int, rows: np.ndarray) -> dict[str, np.ndarray]:
        """``image`` uint8[rows, H, W, 3], ``text`` int32[rows, L], ``index`` int64[rows] of what was really taken."""
        positions = self.order.positions(step)[rows]
        indices = self.order.indices(positions)
        pixels = np.empty((len(rows), self.image_size, self.image_size, 3), np.uint8)
        captions, taken = [], np.empty(len(rows), np.int64)
        for row, (position, index) in enumerate(zip(positions.tolist(), indices.tolist(), strict=True)):
            taken[row], caption = self._sample(position, index, pixels[row])
            captions.append(caption)
        self.faults.seen(len(rows))
        return {"image": pixels, "text": self.tokenizer(captions), "index": taken}

    def _sample(self, position: int, index: int, out: np.ndarray) -> tuple[int, str]:
        """Fills ``out`` with the crop; a bad sample gives way to another one, chosen by the position alone."""
        rng = np.random.Generator(np.random.Philox(key=fold(self.order.seed, position, 2)))
        for _ in range(REPLACEMENT_ATTEMPTS):
            try:
                sample = read(self.source, index)
                caption = sample.captions[int(rng.integers(len(sample.captions)))]
                out[:] = images.random_resized_crop(
                    sample.image,
                    self.image_size,
                    rng,
                    scale=self.crop_scale,
                    ratio=self.crop_ratio,
                    interpolation=self.interpolation,
                )
                return index, caption
            except images.BadImageError as error:
                self.faults.count(BadSampleError(str(error), sample.key))
            except BadSampleError as error:
                self.faults.count(error)
            index = int(rng.integers(len(self.source)))
        raise UserError(
            f"{self.source.name}: {REPLACEMENT_ATTEMPTS} samples in a row could not be used ({self.faults.summary()})"
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
    """Batches ``first_step`` to ``steps - 1``, up to ``prefetch`` of them ready before they are asked for."""
    dataset = grain.MapDataset.range(first_step, steps).map(lambda step: batch(int(step), rows))
    return iter(dataset.to_iter_dataset(grain.ReadOptions(num_threads=workers, prefetch_buffer_size=prefetch)))
