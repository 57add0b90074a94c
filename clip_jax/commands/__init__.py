"""``clip-jax COMMAND``: one file per command, with ``HELP``, ``add_arguments(parser)`` and ``run(arguments)``.

``run`` returns an exit code, or None for 0.
"""

import argparse
import errno
import os
import sys

from clip_jax import __version__, interrupts
from clip_jax.command_line import split_overrides
from clip_jax.commands import (
    bias,
    caption,
    classify,
    compare,
    doctor,
    embed,
    evaluate,
    export,
    fewshot,
    import_,
    inspect,
    models,
    pack,
    plan,
    push,
    reinforce,
    search,
    segment,
    serve,
    train,
)
from clip_jax.errors import EXIT_OUT_OF_MEMORY, EXIT_USER_ERROR, NO_ACCESS, UserError, out_of_memory

COMMANDS = {
    "train": train,
    "plan": plan,
    "doctor": doctor,
    "models": models,
    "classify": classify,
    "caption": caption,
    "evaluate": evaluate,
    "compare": compare,
    "bias": bias,
    "fewshot": fewshot,
    "embed": embed,
    "reinforce": reinforce,
    "search": search,
    "serve": serve,
    "segment": segment,
    "inspect": inspect,
    "pack": pack,
    "import": import_,
    "export": export,
    "push": push,
}

OF_THE_USER = (*NO_ACCESS, errno.EEXIST, errno.EISDIR, errno.ENOSPC, errno.EDQUOT)
"""Errors of the system that need no traceback: a file that cannot be written, a full disk."""


def main(argv: list[str] | None = None) -> int:
    """Runs one command and returns its exit code; a UserError prints one line and returns 2.

    Without ``argv`` this is a program of its own, which answers Ctrl-C with a line and ends; ``train`` does it itself.
    """
    parser = argparse.ArgumentParser(
        prog="clip-jax", description="Plan and train, use, evaluate and convert CLIP models."
    )
    parser.add_argument("--version", action="version", version=__version__)
    subparsers = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    for name, command in COMMANDS.items():
        command.add_arguments(
            subparsers.add_parser(name, help=command.HELP, description=command.HELP, allow_abbrev=False)
        )
    try:
        given, overrides = split_overrides(sys.argv[1:] if argv is None else argv)
    except UserError as error:
        parser.error(str(error))
    arguments = parser.parse_args(given)
    arguments.overrides = overrides
    if argv is None and arguments.command != "train":
        interrupts.install(f"clip-jax {arguments.command}: interrupted")
    try:
        if overrides and "config" not in arguments:
            raise UserError(f"--config.{next(iter(overrides))}: this command takes no --config")
        return COMMANDS[arguments.command].run(arguments) or 0
    except UserError as error:
        print(f"clip-jax {arguments.command}: {error}", file=sys.stderr)
        return EXIT_USER_ERROR
    except BrokenPipeError:  # ``| head`` closed the pipe; do not let Python flush to it again at exit
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    except OSError as error:
        if error.errno not in OF_THE_USER:
            raise
        origin = f"{error.filename}: " if error.filename else ""
        print(f"clip-jax {arguments.command}: {origin}{error.strerror}", file=sys.stderr)
        return EXIT_USER_ERROR
    except Exception as error:
        if not (reason := out_of_memory(error)):
            raise
        smaller = "lower --batch-size, or " if "batch_size" in arguments else ""
        print(
            f"clip-jax {arguments.command}: out of memory ({reason}): {smaller}end other programs on this device or "
            "machine, or take a larger one",
            file=sys.stderr,
        )
        return EXIT_OUT_OF_MEMORY
    return 0
