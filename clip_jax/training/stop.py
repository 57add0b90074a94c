"""How a run ends before its last step: SIGTERM, Ctrl-C, a hang, no memory or no disk left.

Periodic checkpoints are the guarantee, because a machine can vanish without notice; a checkpoint at SIGTERM saves time.
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
import numpy as np
from jax.experimental import multihost_utils

from clip_jax import errors, interrupts
from clip_jax.command_line import program

Stop = Callable[[int], type[errors.SavedError] | None]
"""``should_stop(step)``: None, or how the run ends after this step."""


@contextlib.contextmanager
def signals() -> Iterator[Stop]:
    """Yields ``should_stop(step)``: whether a process has received SIGTERM, or Ctrl-C (where ``main.py`` watches it).

    The answer is the same at the same step on all processes, each of which must call it once per step. The first call
    means that there is a step to keep: until then Ctrl-C ends the process at once. With several processes JAX's own
    service distributes the notice in the background and agrees on the step (10 microseconds per call, no communication
    before a notice); its C++ handler of SIGTERM must not be replaced by one of Python's.
    """
    if jax.process_count() > 1:
        yield _agreed
        return
    received, before = threading.Event(), None
    if threading.current_thread() is threading.main_thread():  # Python allows handlers nowhere else
        before = signal.signal(signal.SIGTERM, lambda *_: received.set())

    def should_stop(step: int) -> type[errors.SavedError] | None:
        interrupts.after_step(lambda: None)
        if interrupts.requested():
            return errors.InterruptedRunError
        return errors.PreemptedError if received.is_set() else None

    try:
        yield should_stop
    finally:
        if before is not None:
            signal.signal(signal.SIGTERM, before)


def _agreed(step: int) -> type[errors.SavedError] | None:
    """The same for several processes: Ctrl-C in one of them is passed on as SIGTERM."""
    interrupts.after_step(lambda: os.kill(os.getpid(), signal.SIGTERM))
    if not multihost_utils.reached_preemption_sync_point(step):
        return None
    interrupted = multihost_utils.process_allgather(np.array(interrupts.requested()))
    return errors.InterruptedRunError if interrupted.any() else errors.PreemptedError


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


NO_ACCESS_TEXTS = ("Permission denied", "Read-only file system")
"""TensorStore gives the reason only in its message."""


@contextlib.contextmanager
def concise_system_errors(workdir: object) -> Iterator[None]:
    """Turns a lack of memory, disk, rights or devices, which libraries report in a page of text, into one line."""
    try:
        yield
    except (errors.UserError, errors.StoppedError):
        raise
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
        if (isinstance(error, OSError) and error.errno in errors.NO_ACCESS) or any(
            words in text for words in NO_ACCESS_TEXTS
        ):
            path = getattr(error, "filename", None) or workdir
            reason = getattr(error, "strerror", None) or next(words for words in NO_ACCESS_TEXTS if words in text)
            raise errors.UserError(
                f"{path}: {reason}; a run reads and writes its --workdir and reads its data: change the permissions "
                "or name another folder"
            ) from error
        if "Unable to initialize backend" in text:
            raise errors.NoDeviceError(
                f"{text.strip().splitlines()[0]}: the device is missing or busy with another process; "
                "JAX_PLATFORMS=cpu trains on the host"
            ) from error
        if not (reason := errors.out_of_memory(error)):
            raise
        raise errors.OutOfMemoryError(
            f"the devices are out of memory ({reason}): lower config.micro_batch, set "
            "config.model.remat=full, split the parameters with config.mesh.fsdp, or take more devices"
        ) from error
