"""What a run prints: a header, its progress and results. A live progress bar on a terminal, plain lines elsewhere.

Everything goes to standard output, so that ``python main.py ... > log`` captures all of it in order; absl logs to
standard error.
"""

import math
import time
from collections import deque
from collections.abc import Callable, Sequence
from types import TracebackType
from typing import Self

from rich import progress as rich_progress
from rich.console import Console
from rich.table import Table
from rich.text import Text

from clip_jax.reports import formats

# The remaining time is estimated from this many updates: enough to average over an evaluation, few enough to adapt.
ETA_UPDATES = 20
# Redraws between updates only turn the spinner; the host's CPU is needed for the data.
REDRAWS_PER_SECOND = 2
BAR_COLUMNS = 28


def header(rows: Sequence[tuple[str, str]], *, console: Console | None = None) -> None:
    """Prints what is about to run: aligned names and values, one per line."""
    console = _console(console)
    _aligned(rows, console)
    _print(console, Text())


def results(title: str, rows: Sequence[tuple[str, str]], *, console: Console | None = None) -> None:
    """Prints a titled table of names and values."""
    console = _console(console)
    _print(console, Text())
    _print(console, Text(title, "bold"))
    _aligned(rows, console, value_style="bold")


def next_commands(commands: Sequence[str], *, console: Console | None = None) -> None:
    """Prints the commands a user would run next, each on one line, to copy."""
    console = _console(console)
    _print(console, Text())
    _print(console, Text("Next:", "bold"))
    for command in commands:
        _print(console, Text(f"  {command}", "cyan"))


class Progress:
    """The progress of a run from ``start_step`` to ``total_steps``: ``with Progress(2400) as progress: ...``.

    With ``enabled=False``, as on every process except the first, it prints nothing.
    """

    def __init__(
        self,
        total_steps: int,
        start_step: int = 0,
        *,
        enabled: bool = True,
        console: Console | None = None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._total_steps = total_steps
        self._enabled = enabled
        self._console = _console(console)
        self._clock = clock
        self._updates: deque[tuple[int, float]] = deque(maxlen=ETA_UPDATES)
        self._bar: rich_progress.Progress | None = None
        if enabled and self._console.is_terminal:
            self._bar = _bar(self._console)
            self._task = self._bar.add_task(
                "", total=total_steps, completed=start_step, step=self._step(start_step), status="starting"
            )

    def __enter__(self) -> Self:
        if self._bar is not None:
            self._bar.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        if self._bar is not None:
            self._bar.stop()

    def update(self, step: int, *, loss: float | None = None, pairs_per_second: float | None = None) -> None:
        """Reports that ``step`` steps are done; without a terminal, each call prints one line."""
        if not self._enabled:
            return
        self._updates.append((step, self._clock()))
        status = "  ".join(self._status(step, loss, pairs_per_second))
        if self._bar is not None:
            self._bar.update(self._task, completed=step, step=self._step(step), status=status, refresh=True)
        else:
            self.line(f"step {step}/{self._total_steps}  {status}".rstrip())

    def line(self, text: str) -> None:
        """Prints ``text`` above the bar."""
        if self._enabled:
            _print(self._console, Text(text))

    def _step(self, step: int) -> str:
        # Equally wide at every step, so that nothing to its right moves.
        return f"step {step:>{len(str(self._total_steps))}}/{self._total_steps}"

    def _status(self, step: int, loss: float | None, pairs_per_second: float | None) -> list[str]:
        status = [] if loss is None else [f"loss {formats.fixed(loss)}"]
        # NaN at the first step, which compiles.
        known = pairs_per_second is not None and math.isfinite(pairs_per_second)
        status += [f"{formats.number(pairs_per_second)} pairs/s"] if known else []
        (first_step, first_time), (last_step, last_time) = self._updates[0], self._updates[-1]
        # Measured from the first update, not from the start: the first step includes compilation.
        if first_step < last_step < self._total_steps:
            seconds_per_step = (last_time - first_time) / (last_step - first_step)
            status.append(f"ETA {formats.duration(seconds_per_step * (self._total_steps - step))}")
        return status


def _bar(console: Console) -> rich_progress.Progress:
    return rich_progress.Progress(
        rich_progress.SpinnerColumn(style="cyan", finished_text=" "),  # Turns while the first step compiles.
        rich_progress.TextColumn("{task.fields[step]}", markup=False),
        rich_progress.BarColumn(BAR_COLUMNS, complete_style="cyan", finished_style="cyan"),
        rich_progress.TextColumn("{task.percentage:>3.0f}%", style="dim"),
        # No markup: a value in brackets would be parsed as a style.
        rich_progress.TextColumn("{task.fields[status]}", markup=False),
        console=console,
        refresh_per_second=REDRAWS_PER_SECOND,
    )


def _aligned(rows: Sequence[tuple[str, str]], console: Console, value_style: str = "") -> None:
    if console.is_terminal:
        table = Table.grid(padding=(0, 3))
        table.add_column(style="dim", no_wrap=True)
        table.add_column(style=value_style, overflow="fold")
        for name, value in rows:
            table.add_row(Text(f"  {name}"), Text(value))
        console.print(table)
        return
    width = max((len(name) for name, _ in rows), default=0)
    for name, value in rows:
        _print(console, Text(f"  {name:<{width}}   {value}".rstrip()))


def _print(console: Console, text: Text) -> None:
    """Prints one line, however long: logs are searched by line, and commands are copied by line."""
    if console.is_terminal:
        console.print(text, soft_wrap=True)
    else:  # Flushed, because pipes are buffered in blocks and a log is read while the run continues.
        print(text.plain, file=console.file, flush=True)


def _console(console: Console | None) -> Console:
    return Console(highlight=False) if console is None else console
