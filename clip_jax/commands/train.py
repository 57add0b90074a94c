"""``clip-jax train --config=demo --workdir=runs/demo [--config.some.key=value ...]``; ``python main.py`` is the same.

``--workdir`` alone continues the run in that folder.
"""

import argparse
import faulthandler
import os
import sys
import traceback
from collections.abc import Mapping, Sequence

from clip_jax import errors, interrupts
from clip_jax.command_line import program, split_overrides

HELP = "Pretrain a CLIP, or resume the run in a folder."


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--config", help="a recipe: demo, configs/NAME.py, or either with :ARGUMENT; --config.KEY=VALUE overrides"
    )
    parser.add_argument("--workdir", help="the run's folder: checkpoints, metrics, report; alone: resumes its run")
    parser.add_argument("--print", action="store_true", help="print every setting with its reason, and train nothing")
    # Several processes: by flags, or by environment variables of the same names.
    parser.add_argument(
        "--coordinator",
        default=os.environ.get("CLIP_JAX_COORDINATOR"),
        help="host:port of process 0; auto: ask the cluster (a TPU slice of several hosts)",
    )
    parser.add_argument(
        "--num_processes",
        type=int,
        default=os.environ.get("CLIP_JAX_NUM_PROCESSES"),
        help="how many processes the run has",
    )
    parser.add_argument(
        "--process_id",
        type=int,
        default=os.environ.get("CLIP_JAX_PROCESS_ID"),
        help="which of them this is, from 0",
    )


def run(arguments: argparse.Namespace) -> int:
    """Trains and returns the exit code; every mistake is one line that begins with the program's name."""
    alone, name = arguments.coordinator is None, program()
    interrupts.install()  # before JAX is imported, which takes seconds
    faulthandler.enable(sys.__stderr__)  # a crash in native code shows the Python stack
    try:
        return _leave(_start(arguments, arguments.overrides), alone)
    except errors.UserError as error:
        print(f"{name}: {error}", file=sys.stderr)
        return _leave(errors.EXIT_USER_ERROR, alone)
    except errors.StoppedError as error:
        print(f"{name}: {error}", file=sys.stderr)
        return _leave(error.exit_code, alone)
    except Exception:
        traceback.print_exc()
        return _leave(errors.EXIT_UNEXPECTED, alone)


def main(argv: Sequence[str]) -> int:
    """The command as a program of its own, ``main.py``."""
    parser = argparse.ArgumentParser(prog="main.py", description=HELP, allow_abbrev=False)
    add_arguments(parser)
    try:
        given, overrides = split_overrides(argv)
    except errors.UserError as error:
        parser.error(str(error))
    arguments = parser.parse_args(given)
    arguments.overrides = overrides
    return run(arguments)


def _start(arguments: argparse.Namespace, overrides: Mapping[str, str]) -> int:
    # Imported here, so that a mistyped flag is answered at once.
    from absl import logging

    logging.use_absl_handler()
    logging.set_verbosity(logging.WARNING)  # Orbax and Grain narrate every file at INFO
    if arguments.print:
        from clip_jax.config import reasons

        print(reasons.explained(arguments.config, overrides, arguments.workdir), end="")
        return errors.EXIT_DONE
    from clip_jax.training import loop

    return loop.run(
        workdir=arguments.workdir,
        recipe=arguments.config,
        overrides=overrides,
        processes=(arguments.coordinator, arguments.num_processes, arguments.process_id),
    )


def _leave(code: int, alone: bool) -> int:
    """Returns the exit code, or ends this process at once if it is one of several and failed alone: JAX's own exit
    would wait for minutes for the other processes, which detect by themselves that this one is gone."""
    together = code in (errors.EXIT_DONE, errors.EXIT_PREEMPTED, errors.EXIT_INTERRUPTED, errors.EXIT_NON_FINITE)
    if not together and not alone:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)
    return code
