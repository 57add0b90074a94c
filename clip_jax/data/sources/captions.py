"""Which texts of a sample are its captions, and how often training uses each.

A caption setting (``config.data.caption``) names fields, separated by commas, each with a share: ``caption``,
``captions.en=3,captions.de=1``. ``txt`` is the text beside the image, ``txt_lines`` that text with a caption on every
line; anything else is a dotted path into the JSON beside the image, or a column of a table.
"""

import json
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any, NamedTuple

from clip_jax.data.valid_text import valid
from clip_jax.errors import UserError, nearest

TXT, LINES = "txt", "txt_lines"
TEXT_FILE = (TXT, LINES)
"""Fields of the text file beside an image; all others belong to JSON or a table."""


class Field(NamedTuple):
    name: str
    share: float


class Captions(NamedTuple):
    texts: tuple[str, ...]
    """Valid Unicode, stripped, none of them empty."""
    shares: tuple[float, ...]
    """The share of each text, summing to 1; empty if all are equal."""


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


def named(setting: str) -> tuple[Field, ...]:
    """The fields that do not belong to a text file: columns, or paths in JSON."""
    return tuple(field for field in fields(setting) if field.name not in TEXT_FILE)


def gather(wanted: Sequence[Field], get: Callable[[str], Any]) -> Captions:
    """The captions of one sample; ``get`` returns the content of a field: a text, a list of texts or nothing.

    A list divides the share of its field; a field without a text leaves its share to the others.
    """
    texts, shares = [], []
    for name, share in wanted:
        value = get(name)
        found = clean(text for text in (value if isinstance(value, list) else [value]) if isinstance(text, str))
        texts += found
        shares += [share / max(1, len(found))] * len(found)
    if len({round(share, 12) for share in shares}) <= 1:
        return Captions(tuple(texts), ())
    total = sum(shares)
    return Captions(tuple(texts), tuple(share / total for share in shares))


def of_files(wanted: Sequence[Field], txt: bytes, json_: bytes) -> Captions:
    """The captions in the files beside an image, empty for one that is not there. Raises ValueError."""
    about = _parsed(json_ or b"{}") if any(name not in TEXT_FILE for name, _ in wanted) else {}

    def get(name: str) -> Any:
        if name not in TEXT_FILE:
            return at(about, name)
        text = txt.decode("utf-8-sig")  # editors on Windows begin with a byte-order mark
        return text.splitlines() if name == LINES else text

    return gather(wanted, get)


def _parsed(data: bytes) -> Any:
    """Raises ValueError, for too many brackets in each other too."""
    try:
        return json.loads(data)
    except RecursionError as error:
        raise ValueError("nested too deeply") from error


def clean(captions: Iterable[str]) -> tuple[str, ...]:
    """Valid Unicode, stripped, without empty ones."""
    return tuple(filter(None, (valid(caption).strip() for caption in captions)))


def at(value: Any, path: str) -> Any:
    """The value at a dotted path in nested dictionaries, or under the whole path as a key; None if there is none."""
    if not isinstance(value, dict):
        return None
    if path in value:
        return value[path]
    head, _, rest = path.partition(".")
    return at(value.get(head), rest) if rest else None


def paths(data: bytes) -> list[str]:
    """The dotted paths in a JSON file that have text; empty for what is not JSON."""
    try:
        return sorted(_paths(_parsed(data)))
    except (ValueError, RecursionError):
        return []


def has(data: bytes, path: str) -> bool:
    """Whether a JSON file has something at a dotted path."""
    try:
        return at(json.loads(data), path) is not None
    except ValueError:
        return False


def lists(data: bytes) -> list[str]:
    """The fields at the top of a JSON file that are lists of objects; empty for what is not JSON."""
    try:
        about = json.loads(data)
    except ValueError:
        return []
    fields = about.items() if isinstance(about, dict) else ()
    return [name for name, value in fields if isinstance(value, list) and any(isinstance(v, dict) for v in value)]


def check_paths(where: str, wanted: Sequence[Field], files: Iterable[bytes]) -> tuple[str, ...]:
    """A note for each path of ``wanted`` at which none of some JSON files has text.

    Raises UserError, with the fields that have text, if this is so for all of ``wanted``.
    """
    missing, there = [name for name, _ in wanted if name not in TEXT_FILE], set()
    for data in files:
        missing = [path for path in missing if not _has(data, path)]
        if not missing:
            return ()
        there |= set(paths(data))
    with_text = f"with text there are {', '.join(sorted(there))}" if there else "no field has text"
    notes = tuple(
        f"config.data.caption={path}: no .json that was tried has text in this field{nearest(path, there)}; {with_text}"
        for path in missing
    )
    if len(missing) == len(wanted):
        raise UserError(f"{where}: {notes[0]}")
    return notes


def _has(data: bytes, path: str) -> bool:
    try:
        return bool(of_files([Field(path, 1.0)], b"", data).texts)
    except ValueError:
        return False


def _paths(value: Any, path: str = "") -> Iterator[str]:
    if isinstance(value, dict):
        for name, inner in value.items():
            yield from _paths(inner, f"{path}.{name}" if path else name)
    elif path and (isinstance(value, str) or (isinstance(value, list) and any(isinstance(v, str) for v in value))):
        yield path
