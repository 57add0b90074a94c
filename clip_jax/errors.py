"""Errors of the user: one line that says what is wrong, where, and what to do.

``UserError`` is raised anywhere and caught only in ``main.py`` and ``commands``, which print the line and exit with
one of the codes below. All other errors keep their traceback.
"""

import difflib
import errno
from collections.abc import Iterable

EXIT_DONE = 0
EXIT_UNEXPECTED = 1
EXIT_USER_ERROR = 2
EXIT_PREEMPTED = 42
EXIT_NON_FINITE = 43
EXIT_WATCHDOG = 44
EXIT_OUT_OF_MEMORY = 45
EXIT_INTERRUPTED = 130  # what a shell gives for SIGINT

NO_ACCESS = (errno.EACCES, errno.EPERM, errno.EROFS, errno.ENOTDIR, errno.ENAMETOOLONG, errno.ELOOP)
"""Errors of the system that say what is wrong with a path that the user gave."""


class UserError(Exception):
    """A mistake that the user can correct: the message says what, where, and how to correct it, in one line."""


class StoppedError(Exception):
    """The run ended before its last step although its settings are valid; ``main.py`` prints the message."""

    exit_code: int


class SavedError(StoppedError):
    """The run was asked to end after ``step`` of ``steps``; a checkpoint is written, and the same command resumes."""

    reason: str

    def __init__(self, step: int, steps: int):
        super().__init__(f"{self.reason}; step {step} of {steps} is saved, the same command resumes from it")


class PreemptedError(SavedError):
    """SIGTERM."""

    exit_code, reason = EXIT_PREEMPTED, "received SIGTERM"


class InterruptedRunError(SavedError):
    """Ctrl-C."""

    exit_code, reason = EXIT_INTERRUPTED, "interrupted"


class NonFiniteError(StoppedError):
    """The loss or a gradient became NaN or infinite."""

    exit_code = EXIT_NON_FINITE


class OutOfMemoryError(StoppedError):
    """A device or the host is out of memory."""

    exit_code = EXIT_OUT_OF_MEMORY


class NoDeviceError(StoppedError):
    """JAX cannot use the devices that it was asked to use; another start may find them free."""

    exit_code = EXIT_UNEXPECTED


def out_of_memory(error: Exception) -> str:
    """The library's first line if the error is a lack of memory of the host or of a device, else an empty string."""
    lines = str(error).strip().splitlines() or ["MemoryError"]
    # By its name: this file does not import JAX.
    of_jax = type(error).__name__ in ("JaxRuntimeError", "XlaRuntimeError") and "RESOURCE_EXHAUSTED" in str(error)
    return lines[0] if of_jax or isinstance(error, MemoryError) else ""


def nearest(name: str, known: Iterable[str]) -> str:
    """``" (nearest: ...)"`` for a mistyped name, or ``""`` when nothing known resembles it."""
    known = list(known)
    matches = difflib.get_close_matches(name, known, n=1, cutoff=0.5)
    if not matches:  # A key without its section, or with a wrong one, still has the right last word.
        last_word = name.rsplit(".", 1)[-1]
        matches = [k for k in known if last_word in (k.rsplit(".", 1)[-1], _initials(k))]
    return f" (nearest: {matches[0]})" if matches else ""


def _initials(key: str) -> str:
    """``lr`` for ``optimizer.learning_rate``: what the field calls it."""
    return "".join(word[:1] for word in key.rsplit(".", 1)[-1].split("_"))
