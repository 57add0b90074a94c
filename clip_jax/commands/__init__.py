"""``clip-jax COMMAND``: one file per command, with ``HELP``, ``add_arguments(parser)`` and ``run(arguments)``."""

import argparse
import os
import sys

from clip_jax import __version__
from clip_jax.command_line import split_overrides
from clip_jax.commands import classify, export, import_, inspect, pack, plan
from clip_jax.errors import EXIT_USER_ERROR, UserError

COMMANDS = {"classify": classify, "import": import_, "export": export, "inspect": inspect, "pack": pack, "plan": plan}


def main(argv: list[str] | None = None) -> int:
    """Runs one command and returns its exit code; a UserError prints one line and returns 2."""
    parser = argparse.ArgumentParser(prog="clip-jax", description="Plan runs; use, convert and export CLIP models.")
    parser.add_argument("--version", action="version", version=__version__)
    subparsers = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    for name, command in COMMANDS.items():
        command.add_arguments(subparsers.add_parser(name, help=command.HELP, description=command.HELP))
    try:
        given, overrides = split_overrides(sys.argv[1:] if argv is None else argv)
    except UserError as error:
        parser.error(str(error))
    arguments = parser.parse_args(given)
    arguments.overrides = overrides
    try:
        if overrides and "config" not in arguments:
            raise UserError(f"--config.{next(iter(overrides))}: this command takes no --config")
        COMMANDS[arguments.command].run(arguments)
    except UserError as error:
        print(f"clip-jax {arguments.command}: {error}", file=sys.stderr)
        return EXIT_USER_ERROR
    except BrokenPipeError:  # ``| head`` closed the pipe; do not let Python flush to it again at exit
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    return 0
