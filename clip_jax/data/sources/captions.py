"""Which texts of a sample are its captions, and how often training takes each.

A caption setting names fields, separated by commas, each with a share: ``caption``, ``captions.en=3,captions.de=1``.
``txt`` is the text beside the image, ``lines`` that text with a caption on every line; anything else is a dotted path
into the sample's JSON, or a column of a table.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

from clip_jax.errors import UserError


class Field(NamedTuple):
    name: str
    share: float


class Captions(NamedTuple):
    texts: tuple[str, ...]
    """Stripped, none of them empty."""
    shares: tuple[float, ...]
    """Of each text, summing to 1; empty where all are equal."""


def fields(setting: str) -> tuple[Field, ...]:
    """The fields of a caption setting. Raises UserError."""
    found = []
    for part in setting.split(","):
        name, equals, share = (word.strip() for word in part.partition("="))
        try:
            value = float(share) if equals else 1.0
        except ValueError:
            value = 0.0
        if not name or not 0 < value < float("inf"):
            raise UserError(
                f"config.data.caption={setting}: {part!r} is not a field with a share, such as captions.de=2"
            )
        found.append(Field(name, value))
    return tuple(found)


def gather(wanted: tuple[Field, ...], get: Callable[[str], Any]) -> Captions:
    """The captions of one sample; ``get`` returns what a field has: a text, a list of texts or nothing.

    A list divides the share of its field; a field without a text leaves its share to the others.
    """
    texts, shares = [], []
    for name, share in wanted:
        value = get(name)
        found = [
            text for v in (value if isinstance(value, list) else [value]) if isinstance(v, str) and (text := v.strip())
        ]
        texts += found
        shares += [share / max(1, len(found))] * len(found)
    if len({round(share, 12) for share in shares}) <= 1:
        return Captions(tuple(texts), ())
    total = sum(shares)
    return Captions(tuple(texts), tuple(share / total for share in shares))


def path(value: Any, name: str) -> Any:
    """What is at a dotted path in nested dictionaries; None where it ends early."""
    for part in name.split("."):
        value = value.get(part) if isinstance(value, dict) else None
    return value
