"""How a run ends before its last step: SIGTERM, a hang, no memory or no disk left.

Periodic checkpoints are the guarantee (a machine can vanish without a word); a checkpoint at SIGTERM is the fast path.
"""

import contextlib
import faulthandler
import os
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator

import jax
from jax.experimental import multihost_utils

from clip_jax import errors
from clip_jax.command_line import program


@contextlib.contextmanager
def sigterm() -> Iterator[Callable[[int], bool]]:
    """Yields ``should_stop(step)``: whether to stop after this step, because a process has received SIGTERM.

    True at the same step on all processes, each of which must call it once per step. With several processes JAX's own
    service distributes the notice in the background and agrees on the step (10 microseconds per call, no communication
    before a notice); its C++ handler must not be replaced by one of Python's.
    """
    if jax.process_count() > 1:
        yield multihost_utils.reached_preemption_sync_point
        return
    if threading.current_thread() is not threading.main_thread():  # where Python allows no handler
        yield lambda step: False
        return
    received = threading.Event()
    before = signal.signal(signal.SIGTERM, lambda *_: received.set())
    try:
        yield lambda step: received.is_set()
    finally:
        signal.signal(signal.SIGTERM, before)


@contextlib.contextmanager
def watchdog(seconds: float) -> Iterator[Callable[[], None]]:
    """Yields ``heartbeat()``; the process ends when it was not called for ``seconds`` (0: never).

    A lost host or a dead file system leaves other processes in a collective or a read that never returns, and only
    another thread can notice. It writes the stacks of all threads and one line to stderr, and exits with
    ``EXIT_WATCHDOG`` without any cleanup, which would hang as well.
    """
    if not seconds:
        yield lambda: None
        return
    last, over = [time.monotonic()], threading.Event()

    def watch() -> None:
        while not over.wait(max(0.0, last[0] + seconds - time.monotonic())):
            if time.monotonic() - last[0] < seconds:
                continue
            faulthandler.dump_traceback(sys.__stderr__, all_threads=True)
            print(
                f"{program()}: no step finished in {seconds:g} s: the stacks of all threads are above; a host or a "
                "disk may be gone; the same command resumes from the last checkpoint (or raise "
                "config.log.watchdog_seconds)",
                file=sys.__stderr__,
                flush=True,
            )
            os._exit(errors.EXIT_WATCHDOG)

    thread = threading.Thread(target=watch, name="watchdog", daemon=True)
    thread.start()

    def heartbeat() -> None:
        last[0] = time.monotonic()

    try:
        yield heartbeat
    finally:
        over.set()
        thread.join()


@contextlib.contextmanager
def concise_resource_errors(workdir: object) -> Iterator[None]:
    """Turns a lack of memory or disk, which libraries report in a page of text, into an error of one line."""
    try:
        yield
    except MemoryError as error:
        raise errors.OutOfMemoryError(
            f"the machine is out of memory ({error}): lower config.data.prefetch and config.data.workers"
        ) from error
    except Exception as error:
        text = str(error)
        if "No space left on device" in text or "Disk quota exceeded" in text:  # TensorStore has it in its message only
            raise errors.UserError(
                f"no space is left for {workdir}: free some (config.checkpoint.keep_last keeps fewer checkpoints); "
                "the same command resumes from the last complete one"
            ) from error
        if not (isinstance(error, jax.errors.JaxRuntimeError) and "RESOURCE_EXHAUSTED" in text):
            raise
        raise errors.OutOfMemoryError(
            f"the devices are out of memory ({text.strip().splitlines()[0]}): lower config.micro_batch, set "
            "config.model.remat=full, split the parameters with config.mesh.fsdp, or take more devices"
        ) from error
