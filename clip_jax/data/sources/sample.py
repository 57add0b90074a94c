"""The interface of every source: samples by index. It is small, so that files of any kind can be trained on."""

from collections.abc import Mapping
from typing import Any, NamedTuple, Protocol

import numpy as np


class Sample(NamedTuple):
    """One image with its captions, not yet decoded."""

    image: bytes | np.ndarray
    """The encoded file (JPEG, PNG, WebP), or uint8[height, width, 3] where there is no file."""
    captions: tuple[str, ...]
    """Never empty; where there are several, training takes one at random and evaluation takes all of them."""
    key: str
    """How messages name the sample: shard and member, file name, dataset key."""
    label: int = -1
    """The class, for zero-shot classification; -1 if there is none."""
    extras: Mapping[str, Any] = {}
    """Further fields of a source by name. Read-only. ``boxes``: ``boxes.py``'s, of the whole image; in the view of
    an objective, as they lie in the image of the pair."""
    shares: tuple[float, ...] = ()
    """How often training takes each caption, summing to 1; empty if all are taken equally often."""
    index: int = -1
    """Its number in the source, where the stream has read it."""


def notes(source: "Source") -> tuple[str, ...]:
    """Notes about a source that a user should see before training, one per line; most sources have none."""
    return getattr(source, "notes", ())


class BadSampleError(Exception):
    """A sample that cannot be used (empty caption, undecodable image): counted and replaced, never fatal alone."""

    def __init__(self, reason: str, key: str):
        super().__init__(f"{key}: {reason}")
        self.reason, self.key = reason, key


class Source(Protocol):
    """Random access to N samples; safe to call from several threads at once."""

    name: str
    """The name in the config: ``kind:where``."""
    fingerprint: str
    """Changes whenever a sample or their order does, so that a resumed run can refuse other data."""
    former_fingerprint: str
    """The fingerprint of names and sizes that older code recorded in runs; empty if it is the same."""
    class_names: tuple[str, ...]
    """The names that ``Sample.label`` indexes; empty if samples have no labels."""

    def __len__(self) -> int: ...

    def __getitem__(self, index: int) -> Sample:
        """Raises BadSampleError for a fault of this sample alone, OSError for a fault that may be transient."""
        ...
