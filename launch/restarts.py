"""Why a run ended, and whether to start it again. Pure functions; no command is run here."""

from collections.abc import Sequence
from typing import NamedTuple

from accelerators import LaunchError

HOUR = 3600.0

# main.py's exit codes (clip_jax/errors.py), the most important first: (code, decision, meaning).
EXIT_CODES = (
    (2, "stop", "a mistake in the settings"),
    (45, "stop", "out of memory, which a restart would repeat"),
    (43, "stop", "the loss is not finite, which a restart would repeat"),
    (130, "stop", "interrupted by Ctrl-C"),
    (44, "restart", "no step finished within the watchdog's limit"),
    (42, "restart", "SIGTERM, after writing a checkpoint"),
)


class Outcome(NamedTuple):
    """How a run ended. ``decision`` is done, restart or stop; ``code`` is the loop's exit code if it stops."""

    decision: str
    code: int
    reason: str


class Start(NamedTuple):
    """A start of the run at ``time`` (seconds), from the checkpoint of ``step``."""

    time: float
    step: int


def outcome(codes: Sequence[int | None], message: str = "") -> Outcome:
    """The outcome of a run from the exit codes of all workers; None stands for a worker that never ended.

    A mistake on one host (a missing file) ends the others with other codes, so the most important known code counts.
    """
    detail = f": {message}" if message else ""
    for code, decision, meaning in EXIT_CODES:
        if code in codes:
            return Outcome(decision, code, f"{meaning} (exit code {code}){detail}")
    if codes and all(code == 0 for code in codes):
        return Outcome("done", 0, "done")
    listed = ", ".join("none" if code is None else str(code) for code in codes)
    return Outcome("restart", 1, f"it crashed (exit codes {listed}){detail}")


def check_progress(starts: Sequence[Start], step: int, *, max_without_progress: int) -> None:
    """Raises LaunchError if the last ``max_without_progress`` starts did not get past the checkpoint of ``step``."""
    recent = starts[-max_without_progress:]
    if len(starts) >= max_without_progress and all(start.step >= step for start in recent):
        raise LaunchError(
            f"{max_without_progress} starts without a new checkpoint (still step {step}): see the log for the reason; "
            "if slices are preempted earlier than that, lower config.checkpoint.every_steps"
        )


def seconds_to_wait(starts: Sequence[Start], now: float, *, per_hour: int) -> float:
    """Seconds until another start keeps within ``per_hour`` starts in any hour."""
    recent = [start.time for start in starts if now - start.time < HOUR]
    return 0.0 if len(recent) < per_hour else recent[-per_hour] + HOUR - now
