"""Examples that cannot be used, and captions that are cut: counted by kind for every row of a batch, listed by name.

The counts are part of the batch, so they belong to a step, whatever was read ahead; ``training/budget.py`` adds them up
over all processes. The names are of one process.
"""

import collections
import threading
from dataclasses import dataclass, field

import numpy as np

from clip_jax.data.sources.sample import BadSampleError, Sample

CUT = "cut_captions"
"""Captions that were too long: cut, and used."""
KINDS = {
    "empty_captions": ("empty caption", "no label"),
    "unreadable_captions": ("unreadable caption", "caption is not UTF-8"),
    "empty_images": ("empty image file",),
    "undecodable_images": ("undecodable image", "image of floats", "image of integers"),
    "oversized_images": ("image of",),
    "unusable_boxes": ("boxes are", "a box"),
    "missing_images": ("no image", "no such file", "these credentials", "the server refuses", "a URL", "not a URL"),
    "corrupted_records": ("corrupted record", "not a tf.train.Example"),
    "other_bad_examples": ("",),
    CUT: (),
}
"""Kind, as in the names of metrics -> how the reasons begin."""
COLUMNS = tuple(KINDS)
NAMED = 10_000
MAX_CHARACTERS = 16_384
"""The longest caption, far more than the longest context. Cleaning and tokenizing a megabyte would take seconds."""


@dataclass
class Faults:
    """The examples that this process could not use: counted by reason, the first ones also by name."""

    reasons: collections.Counter = field(default_factory=collections.Counter)
    examples: dict[str, None] = field(default_factory=dict)
    """Lines of key and reason, each of them once."""
    lock: threading.Lock = field(default_factory=threading.Lock, repr=False)

    def count(self, error: BadSampleError, counts: np.ndarray) -> None:
        """Adds it here, and to a row's ``counts`` int32[len(COLUMNS)]."""
        counts[COLUMNS.index(kind(error.reason))] += 1
        with self.lock:
            self.reasons[error.reason] += 1
            if len(self.examples) < NAMED:
                self.examples[str(error)] = None

    def names(self) -> list[str]:
        """The lines of the examples so far."""
        with self.lock:
            return list(self.examples)

    def summary(self) -> str:
        with self.lock:
            return ", ".join(f"{count} {reason}" for reason, count in self.reasons.most_common())


def kind(reason: str) -> str:
    """The kind of a reason."""
    return next(name for name, beginnings in KINDS.items() if reason.startswith(beginnings))


def with_short_captions(sample: Sample) -> Sample:
    """The sample itself, or one whose captions are cut."""
    if max(map(len, sample.captions), default=0) <= MAX_CHARACTERS:
        return sample
    return sample._replace(captions=tuple(caption[:MAX_CHARACTERS] for caption in sample.captions))
