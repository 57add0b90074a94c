"""``clip-jax COMMAND``: one file a command, each with ``HELP``, ``add_arguments(parser)`` and ``run(arguments)``."""

import argparse
import os
import sys

from clip_jax import __version__
from clip_jax.command_line import split_overrides
from clip_jax.commands import classify, export, import_, plan
from clip_jax.errors import EXIT_USER_ERROR, UserError

COMMANDS = {"classify": classify, "import": import_, "export": export, "plan": plan}


def main(argv: list[str] | None = None) -> int:
    """Runs one command; a user's mistake is one line and exit code 2."""
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
    except BrokenPipeError:  # ``| head`` has read enough; nothing is left to be written when Python ends
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    return 0
