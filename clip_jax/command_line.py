"""What ``main.py`` and ``clip-jax`` share of reading a command line: a config's overrides, before any other parser."""

from collections.abc import Sequence

from clip_jax.errors import UserError


def split_overrides(arguments: Sequence[str]) -> tuple[list[str], dict[str, str]]:
    """``--config.key=value`` and ``--config.key value`` apart from all other arguments."""
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
