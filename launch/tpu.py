#!/usr/bin/env python3
"""From a laptop to a TPU slice: create, setup, run, status, logs, stop, delete; and loop, which does all of it, again
and again, until the run is done.

    launch/tpu.py loop --name=clip --zone=us-east5-b --accelerator=v5litepod-16 \\
        --config=configs/clip_vit_b32.py --workdir=gs://BUCKET/clip_vit_b32

Flags that start with --config or --workdir are main.py's own. Needs gcloud and Python's standard library alone; over
the shell scripts beside it, which can be run by hand. --dry-run prints every command and runs none.
"""

import argparse
import os
import shlex
import signal
import subprocess
import sys
from pathlib import Path

import gcloud
import plans
import restarts
import spot_loop
from accelerators import LaunchError, accelerator
from gcloud import Setup, Slice

CHECKOUT = Path(__file__).resolve().parents[1]


def create(args: argparse.Namespace) -> int:
    plans.check(CHECKOUT, args.accelerator[0].name, args.main_flags, wanted=args.plan and bool(args.main_flags))
    return perform(args, gcloud.create_command(the_slice(args)))


def setup(args: argparse.Namespace) -> int:
    return perform(args, gcloud.setup_command(the_slice(args), the_setup(args)))


def run(args: argparse.Namespace) -> int:
    """Starts the run, once, and shows its log."""
    need_run(args)
    code = perform(args, gcloud.train_command(the_slice(args), args.main_flags))
    return code or logs(args)


def status(args: argparse.Namespace) -> int:
    slice_ = the_slice(args)
    ask = gcloud.worker_command(slice_, "all", "status")
    if args.dry_run:
        if slice_.provider == "queued":
            perform(args, gcloud.describe_command(slice_, "queued-resources", "state.state"))
        perform(args, gcloud.describe_command(slice_, "tpu-vm", "state,acceleratorType"))
        return perform(args, ask)
    state, kind = gcloud.state(slice_)
    print(f"{slice_.name} is {state.value}" + (f" ({kind})" if kind else ""))
    if state is gcloud.State.ACTIVE:
        try:
            workers = gcloud.statuses(with_kind(slice_, kind))
        except gcloud.Unreachable as error:
            print(f"its workers are not set up, or do not answer: {error}")
            return 0
        for worker in sorted(workers, key=lambda worker: worker.worker.zfill(6)):
            code = "" if worker.code is None else f", exit code {worker.code}"
            step = "no checkpoint" if worker.step is None else f"checkpoint of step {worker.step}"
            print(f"worker {worker.worker}: {worker.state}{code}, {step}  {worker.message}")
    return 0


def logs(args: argparse.Namespace) -> int:
    """Shows worker 0's log to its end; returns the run's exit code."""
    slice_ = the_slice(args)
    if args.dry_run:
        return perform(args, gcloud.worker_command(slice_, 0, "follow", "0", "60"))
    offset, drops = 0, 0
    while drops < 5:
        offset, worker = gcloud.follow(slice_, offset, seconds=60)
        drops = drops + 1 if worker is None else 0
        if worker is not None and worker.state != "running":
            return worker.code or 0
    raise LaunchError(f"{slice_.name} does not answer; see launch/tpu.py status")


def stop(args: argparse.Namespace) -> int:
    """Asks the run to write a checkpoint and end."""
    return perform(args, gcloud.worker_command(the_slice(args), "all", "stop"))


def delete(args: argparse.Namespace) -> int:
    return perform(args, gcloud.delete_command(the_slice(args)))


def loop(args: argparse.Namespace) -> int:
    need_run(args)
    wish = spot_loop.Wish(
        slice=the_slice(args),
        accelerators=tuple(args.accelerator),
        main_flags=args.main_flags,
        workdir=workdir(args.main_flags),
        setup=the_setup(args),
        poll_seconds=args.poll_seconds,
        patience_minutes=args.patience_minutes,
        wait_hours=args.wait_hours,
        restarts_per_hour=args.restarts_per_hour,
        fruitless_restarts=args.fruitless_restarts,
        delete_at_end=args.delete_at_end,
    )
    if args.dry_run:
        return tell(args, wish)
    for wanted in wish.accelerators:
        plans.check(CHECKOUT, wanted.name, wish.main_flags, wanted=args.plan)
    # The scripts find mistakes in their flags before anything is paid for.
    for command in (
        gcloud.setup_command(wish.slice, wish.setup),
        gcloud.train_command(wish.slice, wish.main_flags),
    ):
        rehearse(command, quiet=True)
    for ending in (signal.SIGTERM, signal.SIGHUP):  # as Ctrl-C: it still says what costs money
        if signal.getsignal(ending) is not signal.SIG_IGN:  # as nohup has it
            signal.signal(ending, interrupt)
    return spot_loop.keep_alive(wish)


def interrupt(*_: object) -> None:
    raise KeyboardInterrupt


def tell(args: argparse.Namespace, wish: spot_loop.Wish) -> int:
    """The whole life of a run, by the very commands that the loop would run."""
    slice_, kind = wish.slice, wish.slice.accelerator
    longest = spot_loop.LONGEST_POLL * wish.poll_seconds
    others = "".join(
        f"; no room for {wish.patience_minutes:g} minutes: {a.name} instead, and so on" for a in wish.accelerators[1:2]
    )
    describe = [
        gcloud.describe_command(slice_, "queued-resources", "state.state"),
        gcloud.describe_command(slice_, "tpu-vm", "state,acceleratorType"),
    ][slice_.provider != "queued" :]
    print(
        f"# The life of the run in {wish.workdir}: {kind.name} ({kind.hosts} worker(s), {kind.devices} devices), "
        f"{slice_.capacity}, in {slice_.zone}.\n# These commands; none of them is run now."
    )
    kinds_to_plan = wish.accelerators if args.plan and recipe(wish.main_flags) else ()
    steps = (
        (
            "Does it fit? If not, nothing is asked for",
            [plans.command("clip-jax", a.name, wish.main_flags) for a in kinds_to_plan],
        ),
        (f"Ask for a slice{others}", [gcloud.create_command(slice_)]),
        (f"Look every {wish.poll_seconds:g} to {longest:g} s, for up to {wish.wait_hours:g} hours: active?", describe),
        (
            f"Set up its {kind.hosts} worker(s): this revision and pinned dependencies; may be repeated",
            [gcloud.setup_command(slice_, wish.setup)],
        ),
        ("Which checkpoint is the newest? Starts from the same one are counted", [status_command(slice_, 0, wish)]),
        (
            "Start main.py on every worker: it stops what ran before and goes on from that checkpoint",
            [gcloud.train_command(slice_, wish.main_flags)],
        ),
        (
            "Follow the log; a connection that drops is made again, the run does not notice",
            [gcloud.worker_command(slice_, 0, "follow", "0", "60")],
        ),
        ("It ended: why? The exit codes of all workers say it", [status_command(slice_, "all", wish)]),
    )
    for number, (text, commands) in enumerate(steps, 1):
        print(f"\n# {number}. {text}")
        for command in commands:
            perform(args, command)
    words = {"stop": "stop        ", "again": "again from 4"}
    print("#    0      done")
    for code, decision, meaning in sorted(restarts.MEANINGS):
        print(f"#    {code:<6} {words[decision]}  {meaning}")
    print("#    other  again from 4  it broke off")
    print("\n# The slice is taken away, at any moment, or cannot be set up: delete what is left, and again from 2")
    perform(args, gcloud.delete_command(slice_))
    print(
        f"\n# At most {wish.restarts_per_hour} starts an hour; {wish.fruitless_restarts} in a row from the same "
        "checkpoint end it."
        + ("\n# At the end it deletes the slice." if wish.delete_at_end else "")
        + "\n# On every exit it says what is left and costs money, and how to delete it."
    )
    return 0


def status_command(slice_: Slice, worker: int | str, wish: spot_loop.Wish) -> list[str]:
    return gcloud.worker_command(slice_, worker, "status", wish.workdir)


# --- flags ------------------------------------------------------------------------------------------------------------


def the_slice(args: argparse.Namespace) -> Slice:
    return Slice(
        name=args.name,
        zone=args.zone,
        project=args.project,
        provider=args.provider,
        accelerator=args.accelerator[0],
        capacity=args.capacity,
        service_account=args.service_account,
        internal_ips=args.internal_ips,
    )


def the_setup(args: argparse.Namespace) -> Setup:
    return Setup(args.revision, args.env_file, args.prepare)


def with_kind(slice_: Slice, kind: str) -> Slice:
    return slice_._replace(accelerator=accelerator(kind)) if kind else slice_


def workdir(main_flags: list[str]) -> str:
    return next((f.partition("=")[2] for f in main_flags if f.startswith("--workdir=")), "")


def recipe(main_flags: list[str]) -> str:
    """The recipe's file; none for a run that goes on by its folder alone."""
    return next((f.partition("=")[2].partition(":")[0] for f in main_flags if f.startswith("--config=")), "")


def need_run(args: argparse.Namespace) -> None:
    """Mistakes that would otherwise be found on the slice, after it was paid for."""
    if not workdir(args.main_flags):
        raise LaunchError("--workdir=gs://BUCKET/NAME is missing: the folder where the run keeps its checkpoints")
    if workdir(args.main_flags).startswith("s3://"):
        raise LaunchError(f"--workdir={workdir(args.main_flags)}: Cloud TPU's machines keep a run in gs://BUCKET/NAME")
    file = recipe(args.main_flags)
    listed = ["git", "-C", str(CHECKOUT), "cat-file", "-e", f"{args.revision}:{os.path.normpath(file)}"]
    if file and not args.dry_run and subprocess.run(listed, capture_output=True).returncode:
        raise LaunchError(f"--config={file} is not a file of {args.revision}: commit it, for workers get commits only")


def perform(args: argparse.Namespace, command: list[str]) -> int:
    """Runs a command, or prints what it would run."""
    if not args.dry_run:
        return subprocess.run(command).returncode
    if command[0] in ("gcloud", "clip-jax"):
        print(f"+ {shlex.join(command)}", flush=True)
        return 0
    return rehearse(command)


def rehearse(command: list[str], quiet: bool = False) -> int:
    """A script's own dry run."""
    sys.stdout.flush()
    done = subprocess.run([command[0], "--dry-run", *command[1:]], stdout=subprocess.DEVNULL if quiet else None)
    if done.returncode:
        raise LaunchError(f"{Path(command[0]).name} refuses this")
    return 0


COMMANDS = (create, setup, run, status, logs, stop, delete, loop)


def parse(arguments: list[str]) -> argparse.Namespace:
    main_flags = [a for a in arguments if a.startswith(("--config", "--workdir"))]
    parser = argparse.ArgumentParser("launch/tpu.py", description=__doc__, allow_abbrev=False)
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.add_argument("command", choices=[command.__name__ for command in COMMANDS])
    add = parser.add_argument
    add("--name", default="clip-jax", help="of the slice")
    add("--zone", required=True, help="the one that the bucket's region has")
    add("--project", default="", help="gcloud's own default, if left out")
    add("--accelerator", default="v5litepod-16", help="v5litepod-16, v6e-8, ...; loop: several, by preference, with ,")
    add("--capacity", default="spot", choices=("spot", "on-demand", "reserved"))
    add("--provider", default="queued", choices=tuple(gcloud.PROVIDERS))
    add("--service-account", default="", help="whom the slice acts as: it needs the bucket, and nothing else")
    add("--internal-ips", action="store_true", help="no addresses on the internet")
    add("--revision", default="HEAD", help="of this checkout, to run")
    add("--env-file", default="", help="NAME=VALUE lines for the run's environment: the place for secrets")
    add("--prepare", default="", help="a script that each worker runs at the end of its setup: mounts a bucket, ...")
    add("--no-plan", dest="plan", action="store_false", help="do not ask clip-jax plan whether the run fits")
    add("--dry-run", action="store_true", help="print every command, run none")
    add("--poll-seconds", type=float, default=20.0, help="loop: the first wait between two looks at the cloud")
    add("--patience-minutes", type=float, default=30.0, help="loop: before the next of several accelerators is tried")
    add("--wait-hours", type=float, default=24.0, help="loop: for any slice, before it gives up")
    add("--restarts-per-hour", type=int, default=6)
    add("--fruitless-restarts", type=int, default=3, help="loop: so many starts without a new checkpoint are enough")
    add("--delete-at-end", action="store_true", help="loop: delete the slice when the run is done or cannot go on")
    args = parser.parse_args([a for a in arguments if a not in main_flags])
    args.main_flags = main_flags
    args.accelerator = [accelerator(name) for name in args.accelerator.split(",")]
    return args


def main(arguments: list[str]) -> int:
    try:
        args = parse(arguments)
        return next(command for command in COMMANDS if command.__name__ == args.command)(args)
    except (LaunchError, gcloud.Unreachable, gcloud.NoCapacity) as error:
        print(f"launch/tpu.py: {error}", file=sys.stderr)
        return 2


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
