"""Ctrl-C ends a run at once, or after its step once there is one worth keeping.

By default Python raises an exception in whatever code the main thread runs. Inside a hook of JAX the exception is lost,
at the wrong moment it ends in a segmentation fault, and while XLA compiles, the main thread runs no Python at all. So a
thread receives the signal through a pipe and ends the process as a kill would, after which a run can always resume.

Only the standard library is imported: ``install`` is called before JAX is imported.
"""

import os
import signal
import threading
from collections.abc import Callable

from clip_jax.command_line import program
from clip_jax.errors import EXIT_INTERRUPTED

EARLY = "interrupted before the first step; the same command starts again where the last checkpoint is"
FIRST = "interrupted; finishing the step and writing a checkpoint (Ctrl-C again: stop at once, without it)"
SECOND = "interrupted again; the same command resumes from the last complete checkpoint"

_requested = threading.Event()
_after_step: list[Callable[[], None]] = []
"""The argument of ``after_step``, once it was called."""
_early: list[str] = []
"""The line of ``install``, once it was called."""


def install(early: str = "") -> None:
    """From now on Ctrl-C ends the process with one line and ``EXIT_INTERRUPTED``. Main thread only.

    ``early`` is that line for a program other than the trainer; a second call only changes it. If SIGINT is ignored, as
    for the background jobs of a script, it stays ignored.
    """
    if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
        return
    installed = bool(_early)
    _early[:] = [early or f"{program()}: {EARLY}"]
    if installed:
        return
    read, write = os.pipe()
    os.set_blocking(write, False)
    signal.set_wakeup_fd(write, warn_on_full_buffer=False)
    signal.signal(signal.SIGINT, lambda *_: None)
    threading.Thread(target=_watch, args=(read,), name="interrupts", daemon=True).start()


def after_step(notify: Callable[[], None]) -> None:
    """From now on the first Ctrl-C only calls ``notify`` and makes ``requested`` true; the second ends the process."""
    _after_step[:] = [notify]


def requested() -> bool:
    """Whether Ctrl-C was pressed and the run ends after its step."""
    return _requested.is_set()


def _watch(signals: int) -> None:
    while number := os.read(signals, 1):
        if number[0] != signal.SIGINT:  # every signal that Python handles comes through here
            continue
        if _after_step and not _requested.is_set():
            _requested.set()
            _say(f"{program()}: {FIRST}")
            _after_step[0]()
        else:
            _say(f"{program()}: {SECOND}" if _requested.is_set() else _early[0])
            os._exit(EXIT_INTERRUPTED)


def _say(line: str) -> None:
    # Without Python's streams: the main thread may hold their locks. On a terminal, "^C" and a progress bar are on its
    # line, and the bar has hidden the cursor.
    start = "\n\033[?25h" if os.isatty(2) else ""
    os.write(2, f"{start}{line}\n".encode())
