"""Anybody's features: a matrix with a row per example and an array of their labels, as ``.npy`` files."""

from pathlib import Path
from typing import NamedTuple

import numpy as np
from jaxtyping import Float, Int

from clip_jax.errors import UserError


class Features(NamedTuple):
    """Features with their labels."""

    features: Float[np.ndarray, "n features"]
    labels: Int[np.ndarray, " n"]
    """As in the file: any whole numbers."""


def read_features(features: str, labels: str, like: Features | None = None) -> Features:
    """Reads both files. ``like`` is the data of which these are the test examples.

    Raises UserError for what does not fit: each other, ``like``, or a classifier.
    """
    x, y = _read(features), _read(labels)
    if x.ndim != 2 or not np.issubdtype(x.dtype, np.floating):
        raise UserError(f"{features}: {x.dtype}{list(x.shape)}; features are float32[examples, features]")
    if y.ndim != 1 or not np.issubdtype(y.dtype, np.integer):
        raise UserError(f"{labels}: {y.dtype}{list(y.shape)}; labels are int64[examples]")
    if not len(x) or len(x) != len(y):
        raise UserError(f"{features} has {len(x)} examples and {labels} {len(y)}; both have a row for each, in order")
    bad = np.flatnonzero(~np.isfinite(x).all(axis=1))
    if len(bad):
        raise UserError(f"{features}: {len(bad)} of {len(x)} rows are not finite, the first is {bad[0]}")
    if like is not None and x.shape[1] != like.features.shape[1]:
        raise UserError(f"{features}: {x.shape[1]} features, but those to fit on have {like.features.shape[1]}")
    unknown = [] if like is None else sorted(set(y.tolist()) - set(like.labels.tolist()))
    if unknown:
        raise UserError(f"{labels}: label {unknown[0]} is not among those to fit on")
    return Features(x.astype(np.float32), y)


def _read(file: str) -> np.ndarray:
    try:
        found = np.load(Path(file).expanduser(), allow_pickle=False)
    except (OSError, ValueError, EOFError) as error:
        raise UserError(f"{file}: {getattr(error, 'strerror', None) or 'not an array of NumPy (.npy)'}") from error
    if not isinstance(found, np.ndarray):
        raise UserError(f"{file}: several arrays; save one with numpy.save")
    return found
