"""Why a run ended, and whether to start it again. No command is run here."""

from collections.abc import Sequence
from typing import NamedTuple

from accelerators import LaunchError

HOUR = 3600.0

# main.py's exit codes (clip_jax/errors.py), the worst first: (code, what to do, what it means).
MEANINGS = (
    (2, "stop", "a mistake in the settings"),
    (45, "stop", "out of memory: the same would happen again"),
    (43, "stop", "the loss is not finite: the same would happen again"),
    (44, "again", "no step finished for long (watchdog)"),
    (42, "again", "SIGTERM, with a checkpoint"),
)


class Outcome(NamedTuple):
    """``decision`` is done, again or stop; ``code`` is what the loop would exit with."""

    decision: str
    code: int
    reason: str


class Start(NamedTuple):
    """The run was started at ``time`` (seconds), from the checkpoint of ``step``."""

    time: float
    step: int


def outcome(codes: Sequence[int | None], message: str = "") -> Outcome:
    """What the exit codes of all workers mean together; None: a worker that never ended.

    One host's reason (a missing file) ends the others with other codes, so the worst known one counts.
    """
    said = f": {message}" if message else ""
    for code, decision, meaning in MEANINGS:
        if code in codes:
            return Outcome(decision, code, f"{meaning} (exit code {code}){said}")
    if codes and all(code == 0 for code in codes):
        return Outcome("done", 0, "done")
    listed = ", ".join("none" if code is None else str(code) for code in codes)
    return Outcome("again", 1, f"it broke off (exit codes {listed}){said}")


def check_progress(starts: Sequence[Start], step: int, *, fruitless: int) -> None:
    """Raises LaunchError when so many starts in a row, and one more now, are from the same checkpoint."""
    if len(starts) >= fruitless and all(start.step >= step for start in starts[-fruitless:]):
        raise LaunchError(
            f"{fruitless} starts without a new checkpoint (still step {step}): the log says why; "
            "if slices do not last that long, lower config.checkpoint.every_steps"
        )


def seconds_to_wait(starts: Sequence[Start], now: float, *, per_hour: int) -> float:
    """How long until another start is within the bound of so many an hour."""
    recent = [start.time for start in starts if now - start.time < HOUR]
    return 0.0 if len(recent) < per_hour else recent[-per_hour] + HOUR - now
