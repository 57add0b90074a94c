"""The options with which ``inspect`` and ``pack`` open a source: the settings ``config.data.*`` of the same names."""

import argparse
from typing import Any

from clip_jax.errors import UserError

NAMES = ("truncated", "max_bad_share", "links_to", "tfds_dir")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--truncated", choices=("stop", "keep"), help="like config.data.truncated (stop)")
    parser.add_argument("--max-bad-share", type=float, help="like config.data.max_bad_share (0.01)")
    parser.add_argument("--links-to", help="like config.data.links_to")
    parser.add_argument("--tfds-dir", help="like config.data.tfds_dir")


def given(arguments: argparse.Namespace) -> dict[str, Any]:
    """The options for ``open_source`` that the user gave. Raises UserError."""
    share = arguments.max_bad_share
    if share is not None and not 0 <= share <= 1:
        raise UserError(f"--max-bad-share={share:g} must be at least 0 and at most 1")
    return {name: getattr(arguments, name) for name in NAMES if getattr(arguments, name) is not None}
