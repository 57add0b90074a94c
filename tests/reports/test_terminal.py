import io
import itertools
import re

import pytest
from rich.console import Console

from clip_jax.reports import terminal
from clip_jax.reports.terminal import Progress


def pipe() -> Console:
    return Console(file=io.StringIO(), force_terminal=False, width=40)


def tty(width: int = 100) -> Console:
    return Console(file=io.StringIO(), force_terminal=True, width=width, highlight=False, legacy_windows=False)


def written(console: Console) -> str:
    return console.file.getvalue()


def seen(console: Console) -> str:
    """The text written to a terminal, without colors and cursor movements."""
    return re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", written(console))


def clock(seconds: float):
    """A clock that advances by ``seconds`` every time it is read."""
    return itertools.count(0, seconds).__next__


def test_without_a_terminal_every_update_prints_a_line():
    console = pipe()
    with Progress(2400, 0, console=console, clock=clock(7)) as progress:
        progress.update(80, loss=5.0, pairs_per_second=700)
        progress.update(120, loss=2.309, pairs_per_second=840.4)
        progress.line("step 120  held out: loss 2.5 [shapes]")
        progress.update(2400, loss=0.28, pairs_per_second=840)
    assert written(console).splitlines() == [
        "step 80/2400  loss 5.00  700 pairs/s",
        "step 120/2400  loss 2.31  840 pairs/s  ETA 0:06:39",  # 2280 remaining steps at 7 s per 40.
        "step 120  held out: loss 2.5 [shapes]",
        "step 2400/2400  loss 0.280  840 pairs/s",
    ]


def test_the_remaining_time_is_estimated_from_the_last_updates():
    times = iter([*range(0, 1000, 100), *range(1000, 1100)])
    console = pipe()
    with Progress(1000, console=console, clock=times.__next__) as progress:
        for step in range(1, 101):  # 100 s per step at first, then 1 s per step.
            progress.update(step)
    assert written(console).splitlines()[-1] == "step 100/1000  ETA 0:15:00"


def test_an_unknown_speed_is_not_shown():
    console = pipe()
    with Progress(10, console=console) as progress:
        progress.update(1, loss=5.5, pairs_per_second=float("nan"))
    assert written(console) == "step 1/10  loss 5.50\n"


def test_a_resumed_run_estimates_the_remaining_time_from_its_own_steps():
    console = pipe()
    with Progress(1000, 900, console=console, clock=clock(10)) as progress:
        progress.update(910)
        progress.update(920)
    assert written(console).splitlines()[-1] == "step 920/1000  ETA 0:01:20"


def test_on_other_processes_nothing_is_printed():
    for console in (pipe(), tty()):
        with Progress(100, enabled=False, console=console) as progress:
            progress.update(50, loss=1.0, pairs_per_second=10)
            progress.line("text")
        assert written(console) == ""


def test_on_a_terminal_the_bar_stays_below_the_lines():
    console = tty()
    with Progress(2400, 0, console=console, clock=clock(7)) as progress:
        progress.update(1200, loss=2.31, pairs_per_second=840)
        progress.line("evaluated [shapes]")
        progress.update(2400, loss=0.28, pairs_per_second=850)
    text = seen(console)
    assert "step 1200/2400 " in text and " 50% loss 2.31  840 pairs/s" in text
    assert text.index("evaluated [shapes]\n") < text.index("step 2400/2400")
    assert text.rstrip().endswith("100% loss 0.280  850 pairs/s")


def test_an_exception_propagates_and_restores_the_terminal():
    console = tty()
    with pytest.raises(KeyboardInterrupt), Progress(10, console=console) as progress:
        progress.update(1)
        raise KeyboardInterrupt
    assert written(console).rindex("\x1b[?25h") > written(console).rindex("\x1b[?25l"), "the cursor is visible again"


def test_the_header_is_aligned_and_printed_verbatim():
    rows = [("model", "ViT-B/32"), ("parameters", "151M: image 87.8M, text 63.4M"), ("data", "[/data/{0..9}.tar]")]
    for console in (pipe(), tty()):
        terminal.header(rows, console=console)
        lines = seen(console).splitlines()
        assert {line.rstrip().index(value) for line, (_, value) in zip(lines, rows, strict=False)} == {15}


def test_without_a_terminal_there_are_no_colors():
    console = pipe()
    terminal.header([("model", "ViT-B/32")], console=console)
    terminal.results("Results", [("train loss", "0.28")], console=console)
    terminal.next_commands(["clip-jax inspect runs/demo"], console=console)
    assert "\x1b" not in written(console)
    assert written(console).splitlines() == [
        "  model   ViT-B/32",
        "",
        "",
        "Results",
        "  train loss   0.28",
        "",
        "Next:",
        "  clip-jax inspect runs/demo",
    ]


@pytest.mark.parametrize("console", [pipe(), tty(30)], ids=["pipe", "terminal"])
def test_a_long_command_is_printed_on_one_line(console):
    command = 'clip-jax classify runs/demo photo.jpg --labels "a red circle" "a blue square" [not markup]'
    terminal.next_commands([command], console=console)
    assert f"  {command}\n" in seen(console)


def test_everything_goes_to_standard_output(capsys):
    with Progress(10) as progress:
        progress.update(5, loss=1.0)
    assert capsys.readouterr().out == "step 5/10  loss 1.00\n"
