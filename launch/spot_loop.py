"""Keeps a run alive on capacity that is taken away: ask, wait, set up, start, follow, understand, again.

Everything it needs to know is in the cloud and in the run's folder, so it may itself be stopped and started again at
any moment, from any machine: a run that is under way is joined.
"""

import random
import shlex
import time
from typing import NamedTuple

import gcloud
import restarts
from accelerators import Accelerator, LaunchError, accelerator
from gcloud import NoCapacity, Setup, Slice, State, Unreachable, Worker
from restarts import Outcome, Start

SETUP_SECONDS = 1800
SETUP_ATTEMPTS = 6
LONGEST_POLL = 15
"""In units of the first poll: waits double up to so many."""


class Wish(NamedTuple):
    """What the loop is asked to keep running."""

    slice: Slice
    accelerators: tuple[Accelerator, ...]
    """In order of preference; a run goes on over any of them."""
    main_flags: list[str]
    workdir: str
    setup: Setup
    poll_seconds: float
    patience_minutes: float
    """How long to wait for one kind of slice before the next is tried, where there are several."""
    wait_hours: float
    """How long to wait for any slice."""
    restarts_per_hour: int
    fruitless_restarts: int
    delete_at_end: bool


def keep_alive(wish: Wish) -> int:
    """Returns the exit code of the run: 0, or that of a mistake that a restart does not mend. Raises LaunchError."""
    slice_, starts = wish.slice, []
    try:
        while True:
            slice_ = obtain(wish)
            outcome = go_on(wish, slice_, starts)
            say(f"the run ended: {outcome.reason}")
            if outcome.decision != "again":
                if wish.delete_at_end:
                    gcloud.delete(slice_)
                return outcome.code
            if outcome.code == 42:
                await_loss(wish, slice_)
    except KeyboardInterrupt:
        say("stopped watching; what runs on the slice goes on, and the same command joins it again")
        return 130
    finally:
        bill(slice_)


def obtain(wish: Wish) -> Slice:
    """A slice that is active, whatever it takes within the deadline."""
    deadline, turn = time.monotonic() + wish.wait_hours * 3600, 0
    while time.monotonic() < deadline:
        wanted = wish.slice._replace(accelerator=wish.accelerators[turn % len(wish.accelerators)])
        patience = deadline
        if len(wish.accelerators) > 1:
            patience = min(deadline, time.monotonic() + wish.patience_minutes * 60)
        found = wait_for(wish, wanted, patience)
        if found is not None:
            return found
        turn += 1
    raise LaunchError(f"no slice in {wish.wait_hours:g} hours; try another zone, size or --capacity=on-demand")


def wait_for(wish: Wish, wanted: Slice, patience: float) -> Slice | None:
    """The slice once it is active; None where there is no room for it."""
    pauses, told, asked = Pauses(wish.poll_seconds), None, False
    while True:
        try:
            state, kind = gcloud.state(wanted)
            if state is not told:
                say(f"{wanted.name} ({kind or wanted.accelerator.name}) is {state.value}")
            told = state
            if state is State.ACTIVE:
                return wanted._replace(accelerator=accelerator(kind) if kind else wanted.accelerator)
            if state is State.LOST:
                gcloud.delete(wanted)
                if asked and len(wish.accelerators) > 1:
                    return None
            elif state is State.ABSENT:
                gcloud.create(wanted)
                asked = True
        except NoCapacity as error:
            say(f"no room for {wanted.accelerator.name} ({error})")
            if len(wish.accelerators) > 1:
                pauses.sleep()
                return None
        except Unreachable as error:
            say(f"no answer ({error}); trying again")
        if time.monotonic() > patience:
            gcloud.delete(wanted)
            return None
        pauses.sleep()


def go_on(wish: Wish, slice_: Slice, starts: list[Start]) -> Outcome:
    """Sets up and starts the run on an active slice, or joins it there, and follows it to its end."""
    worker = ask_first(slice_, wish.workdir)
    if worker is not None and worker.state == "running":
        say("the run is under way; following it")
        return follow(wish, slice_)
    if not set_up(wish, slice_):
        if gcloud.state(slice_)[0] is State.ACTIVE:
            gcloud.delete(slice_)  # a machine that cannot be set up is not worth its price
        starts.append(Start(time.monotonic(), starts[-1].step if starts else 0))
        restarts.check_progress(starts, starts[-1].step, fruitless=wish.fruitless_restarts)
        return Outcome("again", 1, "the slice could not be set up")
    worker = ask_first(slice_, wish.workdir)
    step = worker.step or 0 if worker is not None else 0
    restarts.check_progress(starts, step, fruitless=wish.fruitless_restarts)
    pause = restarts.seconds_to_wait(starts, time.monotonic(), per_hour=wish.restarts_per_hour)
    if pause:
        say(f"{wish.restarts_per_hour} starts in an hour; waiting {pause / 60:.0f} minutes")
        time.sleep(pause)
    starts.append(Start(time.monotonic(), step))
    accelerator_ = slice_.accelerator
    say(f"start {len(starts)}, from step {step}, on {accelerator_.hosts} worker(s) of {accelerator_.name}")
    if not gcloud.succeeds(gcloud.train_command(slice_, wish.main_flags), SETUP_SECONDS):
        return Outcome("again", 1, "the run could not be started")
    return follow(wish, slice_)


def set_up(wish: Wish, slice_: Slice) -> bool:
    """Machines answer ssh some time after they are called active, so several attempts are usual."""
    pauses = Pauses(wish.poll_seconds)
    for attempt in range(SETUP_ATTEMPTS):
        if attempt:
            pauses.sleep()
            if still(slice_) is State.LOST:
                return False
        if gcloud.succeeds(gcloud.setup_command(slice_, wish.setup), SETUP_SECONDS):
            return True
        say(f"setup did not succeed (attempt {attempt + 1} of {SETUP_ATTEMPTS})")
    return False


def follow(wish: Wish, slice_: Slice) -> Outcome:
    """Shows the log until the run ends or its slice is gone."""
    offset, pauses = 0, Pauses(wish.poll_seconds)
    while True:
        offset, worker = gcloud.follow(slice_, offset, seconds=max(1, round(3 * wish.poll_seconds)))
        if worker is None:
            if still(slice_) in (State.LOST, State.ABSENT):
                return Outcome("again", 1, "the slice was taken away")
            pauses.sleep()
        elif worker.state == "running":
            pauses = Pauses(wish.poll_seconds)
        elif worker.state == "exited":
            return judge(wish, slice_, worker)
        else:
            return Outcome("again", 1, "the machine has forgotten the run")


def judge(wish: Wish, slice_: Slice, first: Worker) -> Outcome:
    """Waits a little for the other workers to end too, and says what their exit codes mean together."""
    workers = [first]
    for _ in range(6):
        try:
            workers = gcloud.statuses(slice_, workdir=wish.workdir)
        except Unreachable:
            break
        if all(worker.state != "running" for worker in workers):
            break
        time.sleep(wish.poll_seconds)
    result = restarts.outcome([worker.code for worker in workers])
    speakers = [worker for worker in workers if worker.code == result.code] or workers
    return restarts.outcome([worker.code for worker in workers], speakers[0].message)


def await_loss(wish: Wish, slice_: Slice) -> None:
    """After SIGTERM the slice usually goes within a minute; a start before that would be lost with it."""
    for _ in range(4):
        if still(slice_) in (State.LOST, State.ABSENT):
            return
        time.sleep(wish.poll_seconds)


def still(slice_: Slice) -> State | None:
    try:
        return gcloud.state(slice_)[0]
    except Unreachable:
        return None


def ask_first(slice_: Slice, workdir: str) -> Worker | None:
    """Worker 0's status; None where nothing is set up, or the connection drops."""
    try:
        return gcloud.statuses(slice_, 0, workdir)[0]
    except Unreachable:
        return None


def bill(slice_: Slice) -> None:
    """What is left that costs money, and how it is deleted."""
    try:
        state, kind = gcloud.state(slice_)
    except (Unreachable, LaunchError):
        state, kind = None, ""
    if state is State.ABSENT:
        say(f"nothing is left of {slice_.name}, and nothing costs money")
        return
    what = f"{slice_.name} ({kind or slice_.accelerator.name}, {slice_.capacity}) in {slice_.zone}"
    costs = "may still be there" if state is None else f"is {state.value}, and costs money while it is active"
    say(f"{what} {costs}; to delete it: {shlex.join(gcloud.delete_command(slice_))}")


class Pauses:
    """Waits that double, each a little different, so that many loops do not ask at the same moment."""

    def __init__(self, first: float):
        self.first, self.next = first, first

    def sleep(self) -> None:
        time.sleep(self.next * random.uniform(0.8, 1.2))
        self.next = min(2 * self.next, LONGEST_POLL * self.first)


def say(text: str) -> None:
    print(f"[{time.strftime('%H:%M:%S')}] {text}", flush=True)
