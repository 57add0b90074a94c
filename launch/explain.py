"""What the loop does, step by step, with the commands of each step: the output of ``launch/tpu.py loop --dry-run``."""

from typing import NamedTuple

import gcloud
import plans
import restarts
import workers
from spot_loop import MAX_BACKOFF, LoopConfig

REQUEST = 2
"""The number of the step that requests a slice."""
SET_UP = 4
"""The number of the step that a restart on the same slice returns to."""


class Step(NamedTuple):
    title: str
    commands: list[list[str]]


def heading(config: LoopConfig) -> str:
    slice_, type_ = config.slice, config.slice.accelerator
    return (
        f"# The run in {config.workdir}: {type_.name} ({type_.hosts} worker(s), {type_.devices} devices), "
        f"{slice_.capacity}, in {slice_.zone}.\n# Its steps and their commands; this dry run executes none of them."
    )


def steps(config: LoopConfig, *, plan: bool) -> list[Step]:
    """The steps of a run from its plan to its end. ``plan``: whether the loop would check that the run fits."""
    slice_, poll = config.slice, config.poll_seconds
    types = config.accelerators if plan else ()
    next_type = "".join(
        f"; without capacity for {config.patience_minutes:g} minutes, of {a.name} instead, and so on"
        for a in config.accelerators[1:2]
    )
    return [
        Step(
            "Check that the run fits; if not, request nothing",
            [plans.command("clip-jax", a.name, config.main_flags) for a in types],
        ),
        Step(f"Request a slice{next_type}", [gcloud.create_command(slice_)]),
        Step(
            f"Every {poll:g} to {MAX_BACKOFF * poll:g} s, for up to {config.wait_hours:g} hours, check if it is active",
            gcloud.describe_commands(slice_),
        ),
        Step(
            f"Set up its {slice_.accelerator.hosts} worker(s) with this revision and its pinned dependencies",
            [gcloud.setup_command(slice_, config.setup)],
        ),
        Step("Find the newest checkpoint, to count the starts from it", [status_command(config, 0)]),
        Step(
            "Start main.py on every worker; it stops an earlier run and resumes from that checkpoint",
            [gcloud.train_command(slice_, config.main_flags)],
        ),
        Step(
            "Follow the log; a dropped connection is made again and does not affect the run",
            [workers.command(slice_, 0, "follow", "0", "60")],
        ),
        Step("At the end, collect the exit codes of all workers", [status_command(config, "all")]),
    ]


def status_command(config: LoopConfig, worker: int | str) -> list[str]:
    return workers.command(config.slice, worker, "status", config.workdir)


def exit_codes() -> str:
    """What the loop does for each exit code of the run."""
    decisions = {"stop": "stop", "restart": f"restart at {SET_UP}"}
    rows = [("0", "done", ""), *((str(c), decisions[d], meaning) for c, d, meaning in sorted(restarts.EXIT_CODES))]
    rows.append(("other", decisions["restart"], "it crashed"))
    return "\n".join(f"#    {code:<6} {decision:<13} {meaning}".rstrip() for code, decision, meaning in rows)


def limits(config: LoopConfig) -> str:
    return (
        f"# At most {config.max_restarts_per_hour} starts per hour; "
        f"{config.max_restarts_without_progress} consecutive starts from the same checkpoint end the loop."
        + ("\n# When the loop ends it deletes the slice." if config.delete_at_end else "")
        + "\n# On every exit it reports what still costs money, and how to delete it."
    )
