"""Keeps a run alive on spot capacity: request a slice, wait, set up, start, follow, and again after a preemption.

All state is in the cloud and in the run's folder. The loop itself may therefore be stopped and started again at any
time, from any machine: it joins a run that is in progress.
"""

import random
import shlex
import time
from typing import NamedTuple

import gcloud
import restarts
import workers
from accelerators import Accelerator, LaunchError, accelerator
from gcloud import NoCapacity, Setup, Slice, State, Unreachable
from restarts import Outcome, Start
from workers import WorkerStatus

SETUP_SECONDS = 1800
SETUP_ATTEMPTS = 6
MAX_BACKOFF = 15
"""Waits double up to this multiple of the first one."""


class LoopConfig(NamedTuple):
    """The settings of the loop."""

    slice: Slice
    accelerators: tuple[Accelerator, ...]
    """In order of preference; a run can resume on any of them."""
    main_flags: list[str]
    workdir: str
    setup: Setup
    poll_seconds: float
    patience_minutes: float
    """How long to wait for one accelerator type before the next is tried, if there are several."""
    wait_hours: float
    """How long to wait for a slice of any type."""
    max_restarts_per_hour: int
    max_restarts_without_progress: int
    delete_at_end: bool


def keep_alive(config: LoopConfig) -> int:
    """Returns the exit code of the run: 0, or that of an error that a restart does not fix. Raises LaunchError."""
    slice_, starts = config.slice, []
    try:
        while True:
            slice_ = acquire_slice(config)
            outcome = run_on_slice(config, slice_, starts)
            log(f"the run ended: {outcome.reason}")
            if outcome.decision != "restart":
                if config.delete_at_end:
                    gcloud.delete(slice_)
                return outcome.code
            if outcome.code == 42:
                wait_until_gone(config, slice_)
    except KeyboardInterrupt:
        log("stopped watching; the run on the slice continues, and the same command joins it again")
        return 130
    finally:
        report_cost(slice_)


def acquire_slice(config: LoopConfig) -> Slice:
    """Returns an active slice; tries the accelerator types in turn until the deadline."""
    deadline, attempt = time.monotonic() + config.wait_hours * 3600, 0
    while time.monotonic() < deadline:
        wanted = config.slice._replace(accelerator=config.accelerators[attempt % len(config.accelerators)])
        patience = deadline
        if len(config.accelerators) > 1:
            patience = min(deadline, time.monotonic() + config.patience_minutes * 60)
        found = wait_until_active(config, wanted, patience)
        if found is not None:
            return found
        attempt += 1
    raise LaunchError(f"no slice in {config.wait_hours:g} hours; try another zone, size or --capacity=on-demand")


def wait_until_active(config: LoopConfig, wanted: Slice, patience: float) -> Slice | None:
    """Returns the slice once it is active, or None if there is no capacity for it."""
    backoff, last_state, requested = Backoff(config.poll_seconds), None, False
    while True:
        try:
            state, accelerator_type = gcloud.state(wanted)
            if state is not last_state:
                log(f"{wanted.name} ({accelerator_type or wanted.accelerator.name}) is {state.value}")
            last_state = state
            if state is State.ACTIVE:
                return with_accelerator(wanted, accelerator_type)
            if state is State.LOST:
                gcloud.delete(wanted)
                if requested and len(config.accelerators) > 1:
                    return None
            elif state is State.ABSENT:
                gcloud.create(wanted)
                requested = True
        except NoCapacity as error:
            log(f"no capacity for {wanted.accelerator.name} ({error})")
            if len(config.accelerators) > 1:
                backoff.sleep()
                return None
        except Unreachable as error:
            log(f"no answer ({error}); trying again")
        if time.monotonic() > patience:
            gcloud.delete(wanted)
            return None
        backoff.sleep()


def with_accelerator(slice_: Slice, accelerator_type: str) -> Slice:
    """The slice with the accelerator type that the cloud reports, if it reports one."""
    return slice_._replace(accelerator=accelerator(accelerator_type)) if accelerator_type else slice_


def run_on_slice(config: LoopConfig, slice_: Slice, starts: list[Start]) -> Outcome:
    """Sets up and starts the run on an active slice, or joins it there, and follows it to its end."""
    worker = first_worker_or_none(slice_, config.workdir)
    if worker is not None and worker.state == "running":
        log("the run is in progress; following it")
        return follow_to_end(config, slice_)
    if not set_up(config, slice_):
        if gcloud.state(slice_)[0] is State.ACTIVE:
            gcloud.delete(slice_)  # a machine that cannot be set up would only cost money
        starts.append(Start(time.monotonic(), starts[-1].step if starts else 0))
        check_progress(config, starts, starts[-1].step)
        return Outcome("restart", 1, "the slice could not be set up")
    worker = first_worker_or_none(slice_, config.workdir)
    step = worker.step or 0 if worker is not None else 0
    check_progress(config, starts, step)
    pause = restarts.seconds_to_wait(starts, time.monotonic(), per_hour=config.max_restarts_per_hour)
    if pause:
        log(f"{config.max_restarts_per_hour} starts within an hour; waiting {pause / 60:.0f} minutes")
        time.sleep(pause)
    starts.append(Start(time.monotonic(), step))
    type_ = slice_.accelerator
    log(f"start {len(starts)}, from step {step}, on {type_.hosts} worker(s) of {type_.name}")
    if not gcloud.succeeds(gcloud.train_command(slice_, config.main_flags), SETUP_SECONDS):
        return Outcome("restart", 1, "the run could not be started")
    return follow_to_end(config, slice_)


def check_progress(config: LoopConfig, starts: list[Start], step: int) -> None:
    restarts.check_progress(starts, step, max_without_progress=config.max_restarts_without_progress)


def set_up(config: LoopConfig, slice_: Slice) -> bool:
    """Sets up the workers. Machines accept ssh some time after they become active, so several attempts are usual."""
    backoff = Backoff(config.poll_seconds)
    for attempt in range(SETUP_ATTEMPTS):
        if attempt:
            backoff.sleep()
            if state_or_none(slice_) is State.LOST:
                return False
        if gcloud.succeeds(gcloud.setup_command(slice_, config.setup), SETUP_SECONDS):
            return True
        log(f"setup failed (attempt {attempt + 1} of {SETUP_ATTEMPTS})")
    return False


def follow_to_end(config: LoopConfig, slice_: Slice) -> Outcome:
    """Shows the log until the run ends or its slice is gone."""
    offset, backoff = 0, Backoff(config.poll_seconds)
    while True:
        offset, worker = workers.follow(slice_, offset, seconds=max(1, round(3 * config.poll_seconds)))
        if worker is None:
            if state_or_none(slice_) in (State.LOST, State.ABSENT):
                return Outcome("restart", 1, "the slice was taken away")
            backoff.sleep()
        elif worker.state == "running":
            backoff = Backoff(config.poll_seconds)
        elif worker.state == "exited":
            return collect_outcome(config, slice_, worker)
        else:
            return Outcome("restart", 1, "the machine has no record of the run")


def collect_outcome(config: LoopConfig, slice_: Slice, first: WorkerStatus) -> Outcome:
    """Waits briefly for the other workers to end too, and combines their exit codes."""
    found = [first]
    for _ in range(6):
        try:
            found = workers.statuses(slice_, workdir=config.workdir)
        except Unreachable:
            break
        if all(worker.state != "running" for worker in found):
            break
        time.sleep(config.poll_seconds)
    codes = [worker.code for worker in found]
    deciding = [worker for worker in found if worker.code == restarts.outcome(codes).code] or found
    return restarts.outcome(codes, deciding[0].message)


def wait_until_gone(config: LoopConfig, slice_: Slice) -> None:
    """After SIGTERM a preempted slice is usually gone within a minute; a start before that would be lost with it."""
    for _ in range(4):
        if state_or_none(slice_) in (State.LOST, State.ABSENT):
            return
        time.sleep(config.poll_seconds)


def state_or_none(slice_: Slice) -> State | None:
    try:
        return gcloud.state(slice_)[0]
    except Unreachable:
        return None


def first_worker_or_none(slice_: Slice, workdir: str) -> WorkerStatus | None:
    """Worker 0's status; None if nothing is set up there yet or the connection drops."""
    try:
        return workers.statuses(slice_, 0, workdir)[0]
    except Unreachable:
        return None


def report_cost(slice_: Slice) -> None:
    """Logs what remains and costs money, and the command that deletes it."""
    try:
        state, accelerator_type = gcloud.state(slice_)
    except (Unreachable, LaunchError):
        state, accelerator_type = None, ""
    if state is State.ABSENT:
        log(f"{slice_.name} does not exist, and nothing costs money")
        return
    what = f"{slice_.name} ({accelerator_type or slice_.accelerator.name}, {slice_.capacity}) in {slice_.zone}"
    costs = "may still exist" if state is None else f"is {state.value}, and costs money while it is active"
    log(f"{what} {costs}; to delete it: {shlex.join(gcloud.delete_command(slice_))}")


class Backoff:
    """Waits that double, with jitter, so that many loops do not query at the same moment."""

    def __init__(self, first: float):
        self.first, self.next = first, first

    def sleep(self) -> None:
        time.sleep(self.next * random.uniform(0.8, 1.2))
        self.next = min(2 * self.next, MAX_BACKOFF * self.first)


def log(text: str) -> None:
    print(f"[{time.strftime('%H:%M:%S')}] {text}", flush=True)
