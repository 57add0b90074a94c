#!/usr/bin/env python3
"""Runs clip_jax on a TPU slice from a laptop: create, setup, run, status, logs, stop and delete; or loop, which does
all of it, and again after every preemption, until the run is done.

    launch/tpu.py loop --name=clip --zone=us-east5-b --accelerator=v5litepod-16 \\
        --config=configs/clip_vit_b32.py --workdir=gs://BUCKET/clip_vit_b32

Flags that start with --config or --workdir are passed to main.py. Needs only gcloud and Python's standard library; the
shell scripts in this folder do the work and can be run by hand. --dry-run prints every command and runs none.
"""

import argparse
import os
import shlex
import signal
import subprocess
import sys
from pathlib import Path

import explain
import gcloud
import plans
import spot_loop
import workers
from accelerators import LaunchError, accelerator
from gcloud import Setup, Slice

CHECKOUT = Path(__file__).resolve().parents[1]


def create(args: argparse.Namespace) -> int:
    if args.plan:
        plans.check(CHECKOUT, args.accelerator[0].name, args.main_flags)
    return run_or_print(args, gcloud.create_command(slice_from(args)))


def setup(args: argparse.Namespace) -> int:
    return run_or_print(args, gcloud.setup_command(slice_from(args), setup_from(args)))


def run(args: argparse.Namespace) -> int:
    """Starts the run once and shows its log."""
    check_run_flags(args)
    code = run_or_print(args, gcloud.train_command(slice_from(args), args.main_flags))
    return code or logs(args)


def status(args: argparse.Namespace) -> int:
    slice_ = slice_from(args)
    if args.dry_run:
        for command in (*gcloud.describe_commands(slice_), workers.command(slice_, "all", "status")):
            run_or_print(args, command)
        return 0
    state, accelerator_type = gcloud.state(slice_)
    print(f"{slice_.name} is {state.value}" + (f" ({accelerator_type})" if accelerator_type else ""))
    if state is gcloud.State.ACTIVE:
        try:
            statuses = workers.statuses(spot_loop.with_accelerator(slice_, accelerator_type))
        except gcloud.Unreachable as error:
            print(f"its workers are not set up or do not answer: {error}")
            return 0
        for worker in sorted(statuses, key=lambda worker: worker.worker.zfill(6)):
            code = "" if worker.code is None else f", exit code {worker.code}"
            step = "no checkpoint" if worker.step is None else f"checkpoint of step {worker.step}"
            print(f"worker {worker.worker}: {worker.state}{code}, {step}  {worker.message}")
    return 0


def logs(args: argparse.Namespace) -> int:
    """Shows worker 0's log to its end; returns the run's exit code."""
    slice_ = slice_from(args)
    if args.dry_run:
        return run_or_print(args, workers.command(slice_, 0, "follow", "0", "60"))
    offset, drops = 0, 0
    while drops < 5:
        offset, worker = workers.follow(slice_, offset, seconds=60)
        drops = drops + 1 if worker is None else 0
        if worker is not None and worker.state != "running":
            return worker.code or 0
    raise LaunchError(f"{slice_.name} does not answer; check launch/tpu.py status")


def stop(args: argparse.Namespace) -> int:
    """Makes the run write a checkpoint and end."""
    return run_or_print(args, workers.command(slice_from(args), "all", "stop"))


def delete(args: argparse.Namespace) -> int:
    return run_or_print(args, gcloud.delete_command(slice_from(args)))


def loop(args: argparse.Namespace) -> int:
    check_run_flags(args)
    config = loop_config(args)
    if args.dry_run:
        return explain_loop(args, config)
    if args.plan:
        for wanted in config.accelerators:
            plans.check(CHECKOUT, wanted.name, config.main_flags)
    # The scripts find mistakes in their flags before anything costs money.
    for command in (
        gcloud.setup_command(config.slice, config.setup),
        gcloud.train_command(config.slice, config.main_flags),
    ):
        dry_run_script(command, quiet=True)
    for ending in (signal.SIGTERM, signal.SIGHUP):  # like Ctrl-C, so that the loop still reports what costs money
        if signal.getsignal(ending) is not signal.SIG_IGN:  # nohup ignores SIGHUP
            signal.signal(ending, interrupt)
    return spot_loop.keep_alive(config)


def interrupt(*_: object) -> None:
    raise KeyboardInterrupt


def explain_loop(args: argparse.Namespace, config: spot_loop.LoopConfig) -> int:
    """Prints every step of the loop with the commands that it would run."""
    print(explain.heading(config))
    plan = args.plan and bool(recipe_file(config.main_flags))
    for number, step in enumerate(explain.steps(config, plan=plan), 1):
        print(f"\n# {number}. {step.title}")
        for command in step.commands:
            run_or_print(args, command)
    print(explain.exit_codes())
    print(f"\n# If the slice is taken away or cannot be set up: delete what is left, and restart at {explain.REQUEST}")
    run_or_print(args, gcloud.delete_command(config.slice))
    print(f"\n{explain.limits(config)}")
    return 0


# --- flags ------------------------------------------------------------------------------------------------------------


def slice_from(args: argparse.Namespace) -> Slice:
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


def setup_from(args: argparse.Namespace) -> Setup:
    return Setup(args.revision, args.env_file, args.prepare)


def loop_config(args: argparse.Namespace) -> spot_loop.LoopConfig:
    return spot_loop.LoopConfig(
        slice=slice_from(args),
        accelerators=tuple(args.accelerator),
        main_flags=args.main_flags,
        workdir=workdir(args.main_flags),
        setup=setup_from(args),
        poll_seconds=args.poll_seconds,
        patience_minutes=args.patience_minutes,
        wait_hours=args.wait_hours,
        max_restarts_per_hour=args.max_restarts_per_hour,
        max_restarts_without_progress=args.max_restarts_without_progress,
        delete_at_end=args.delete_at_end,
    )


def workdir(main_flags: list[str]) -> str:
    return next((f.partition("=")[2] for f in main_flags if f.startswith("--workdir=")), "")


def recipe_file(main_flags: list[str]) -> str:
    """The recipe's file; empty for a run that resumes from its folder alone."""
    return next((f.partition("=")[2].partition(":")[0] for f in main_flags if f.startswith("--config=")), "")


def check_run_flags(args: argparse.Namespace) -> None:
    """Raises LaunchError for mistakes that would otherwise appear on the slice, where they cost money."""
    if not workdir(args.main_flags):
        raise LaunchError("--workdir=gs://BUCKET/NAME is missing: the folder for the run's checkpoints")
    if workdir(args.main_flags).startswith("s3://"):
        raise LaunchError(f"--workdir={workdir(args.main_flags)}: on Cloud TPU a run is stored in gs://BUCKET/NAME")
    file = recipe_file(args.main_flags)
    listed = ["git", "-C", str(CHECKOUT), "cat-file", "-e", f"{args.revision}:{os.path.normpath(file)}"]
    if file and not args.dry_run and subprocess.run(listed, capture_output=True).returncode:
        raise LaunchError(f"--config={file} is not in {args.revision}: commit it, because workers get a commit")


def run_or_print(args: argparse.Namespace, command: list[str]) -> int:
    """Runs a command, or prints it under --dry-run."""
    if not args.dry_run:
        return subprocess.run(command).returncode
    if command[0] in ("gcloud", "clip-jax"):
        print(f"+ {shlex.join(command)}", flush=True)
        return 0
    return dry_run_script(command)


def dry_run_script(command: list[str], quiet: bool = False) -> int:
    """Runs a script with --dry-run. Raises LaunchError if it rejects its flags."""
    sys.stdout.flush()
    done = subprocess.run([command[0], "--dry-run", *command[1:]], stdout=subprocess.DEVNULL if quiet else None)
    if done.returncode:
        raise LaunchError(f"{Path(command[0]).name} rejected its flags")
    return 0


COMMANDS = (create, setup, run, status, logs, stop, delete, loop)


def parse(arguments: list[str]) -> argparse.Namespace:
    main_flags = [a for a in arguments if a.startswith(("--config", "--workdir"))]
    parser = argparse.ArgumentParser("launch/tpu.py", description=__doc__, allow_abbrev=False)
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.add_argument("command", choices=[command.__name__ for command in COMMANDS])
    add = parser.add_argument
    add("--name", default="clip-jax", help="name of the slice")
    add("--zone", required=True, help="a zone in the bucket's region")
    add("--project", default="", help="Google Cloud project; default: gcloud's own")
    add(
        "--accelerator",
        default="v5litepod-16",
        help="v6e-8, ...; loop: several, comma-separated, by preference",
    )
    add("--capacity", default="spot", choices=("spot", "on-demand", "reserved"))
    add("--provider", default="queued", choices=tuple(gcloud.PROVIDERS))
    add("--service-account", default="", help="the identity of the slice: it needs access to the bucket only")
    add("--internal-ips", action="store_true", help="give the slice no external IP addresses")
    add("--revision", default="HEAD", help="the revision of this checkout to run")
    add("--env-file", default="", help="file of NAME=VALUE lines for the run's environment: the place for secrets")
    add("--prepare", default="", help="script that each worker runs at the end of its setup, e.g. to mount a bucket")
    add("--no-plan", dest="plan", action="store_false", help="do not check with clip-jax plan that the run fits")
    add("--dry-run", action="store_true", help="print every command and run none")
    add("--poll-seconds", type=float, default=20.0, help="loop: the first wait between two queries of the cloud")
    add(
        "--patience-minutes",
        type=float,
        default=30.0,
        help="loop: time before the next accelerator is tried",
    )
    add("--wait-hours", type=float, default=24.0, help="loop: time limit for getting a slice")
    add("--max-restarts-per-hour", type=int, default=6)
    add("--max-restarts-without-progress", type=int, default=3, help="loop: starts without a new checkpoint")
    add("--delete-at-end", action="store_true", help="loop: delete the slice when the loop ends")
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
