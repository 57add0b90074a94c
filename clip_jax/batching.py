"""Encodes many inputs with a tower: threads decode ahead of the device, and batches have few different sizes."""

import collections
import contextlib
import os
import sys
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any

import numpy as np
from jaxtyping import Float
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from clip_jax.errors import UserError

BATCH = 64
"""Inputs encoded at once, unless the user says otherwise."""
AHEAD = 2
"""Batches decoded before the device needs them."""
LONG = 10
"""The number of batches from which a progress bar is shown."""
MAX_WORKERS = 16


def encode_in_batches(
    inputs: Sequence[Any],
    decode: Callable[[Any], np.ndarray] | None,
    encode: Callable[[np.ndarray], Float[np.ndarray, "n dim"]],
    *,
    batch_size: int = BATCH,
    workers: int | None = None,
    progress: bool | None = None,
) -> Float[np.ndarray, "inputs dim"]:
    """The rows of ``encode`` for all inputs, in their order.

    ``decode`` turns an input into a row, in ``workers`` threads (None: one per core); without it the inputs are rows.
    The last batch is padded to a power of two by repeating its rows, and the padding is dropped again: for any number
    of inputs, at most ``log2(batch_size) + 2`` programs are compiled. ``progress``: whether to show a bar on standard
    error; None: for long lists on a terminal. Raises UserError if there is no input.
    """
    if not len(inputs):
        raise UserError("nothing to encode: give at least one image or text")
    for name, value in (("batch_size", batch_size), ("workers", workers)):
        if value is not None and value < 1:
            raise UserError(f"{name}={value} must be at least 1")
    chunks = [inputs[start : start + batch_size] for start in range(0, len(inputs), batch_size)]
    rows = map(np.asarray, chunks) if decode is None else _decoded(chunks, decode, workers or _cores())
    out = []
    with bar(len(inputs), sys.stderr.isatty() and len(chunks) >= LONG if progress is None else progress) as advance:
        for batch in rows:
            filled = min(batch_size, 1 << (len(batch) - 1).bit_length())
            out.append(np.asarray(encode(batch[np.arange(filled) % len(batch)]))[: len(batch)])
            advance(len(batch))
    return np.concatenate(out)


def _decoded(
    chunks: Sequence[Sequence[Any]], decode: Callable[[Any], np.ndarray], workers: int
) -> Iterator[np.ndarray]:
    """Each chunk as one array, while threads decode the next ones."""
    with ThreadPoolExecutor(workers) as pool:
        waiting: collections.deque[list[Future]] = collections.deque()
        try:
            for chunk in chunks:
                waiting.append([pool.submit(decode, item) for item in chunk])
                if len(waiting) > AHEAD:
                    yield np.stack([future.result() for future in waiting.popleft()])
            while waiting:
                yield np.stack([future.result() for future in waiting.popleft()])
        finally:  # after a broken input, do not decode the rest
            pool.shutdown(wait=True, cancel_futures=True)


def _cores() -> int:
    """Cores that this process may use: a container has fewer than its machine."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return min(cores, MAX_WORKERS)


@contextlib.contextmanager
def bar(total: int, shown: bool, title: str = "encoding") -> Iterator[Callable[[int], None]]:
    """Yields ``advance(count)``, which moves a progress bar on standard error."""
    if not shown:
        yield lambda count: None
        return
    columns = (TextColumn(title), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    with Progress(*columns, console=Console(stderr=True), transient=sys.stderr.isatty()) as shown_bar:
        task = shown_bar.add_task("", total=total)
        yield lambda count: shown_bar.advance(task, count)
