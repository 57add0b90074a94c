"""What ``main.py`` and ``clip-jax`` share: the overrides of a config, taken out before any other parser runs."""

import sys
from collections.abc import Sequence
from pathlib import Path

from clip_jax.errors import UserError


def program() -> str:
    """The name under which the user started the trainer; its messages begin with it."""
    return "clip-jax train" if Path(sys.argv[0]).stem in ("clip-jax", "__main__") else "main.py"


def split_overrides(arguments: Sequence[str]) -> tuple[list[str], dict[str, str]]:
    """(all other arguments, the value of each ``--config.key=value`` or ``--config.key value``)."""
    rest, overrides, left = [], {}, list(arguments)
    while left:
        argument = left.pop(0)
        if not argument.startswith("--config."):
            rest.append(argument)
            continue
        key, equals, value = argument.removeprefix("--config.").partition("=")
        if not equals:
            if not left:
                raise UserError(f"{argument}: needs a value, as in {argument}=...")
            value = left.pop(0)
        overrides[key] = value
    return rest, overrides
