"""The captions in a text file or a JSON file that belongs to an image, in a shard or a folder."""

import json
from collections.abc import Iterable, Iterator
from typing import Any

from clip_jax.data.valid_text import valid
from clip_jax.errors import UserError, nearest

TXT, LINES = "txt", "txt_lines"
"""Values of ``config.data.caption``: the text file is one caption, or has one per line. Others are paths in JSON."""


def is_json(setting: str) -> bool:
    return setting not in (TXT, LINES)


def from_text(data: bytes, setting: str) -> tuple[str, ...]:
    """Raises UnicodeDecodeError."""
    text = data.decode("utf-8-sig")  # editors on Windows begin with a byte-order mark
    return clean(text.splitlines() if setting == LINES else [text])


def from_json(data: bytes, path: str) -> tuple[str, ...]:
    """The text, or the list of texts, at a dotted path; empty where there is none. Raises ValueError."""
    found = _at(json.loads(data), path)
    return clean(text for text in (found if isinstance(found, list) else [found]) if isinstance(text, str))


def clean(captions: Iterable[str]) -> tuple[str, ...]:
    """Valid Unicode, stripped, without empty ones."""
    return tuple(filter(None, (valid(caption).strip() for caption in captions)))


def fields(data: bytes) -> list[str]:
    """The dotted paths in a JSON file that have text; empty for what is not JSON."""
    try:
        return sorted(_texts(json.loads(data)))
    except ValueError:
        return []


def check_path(where: str, path: str, files: Iterable[bytes]) -> None:
    """Raises UserError, with the fields that are there, where none of some JSON files has text at ``path``."""
    found: set[str] = set()
    for data in files:
        try:
            if from_json(data, path):
                return
        except ValueError:
            continue
        found |= set(fields(data))
    there = f"with text there are {', '.join(sorted(found))}" if found else "no field has text"
    raise UserError(
        f"{where}: config.data.caption={path}: no .json that was tried has text in this field{nearest(path, found)}; "
        f"{there}"
    )


def _at(value: Any, path: str) -> Any:
    if not isinstance(value, dict):
        return None
    if path in value:
        return value[path]
    head, _, rest = path.partition(".")
    return _at(value.get(head), rest) if rest else None


def _texts(value: Any, path: str = "") -> Iterator[str]:
    if isinstance(value, dict):
        for name, inner in value.items():
            yield from _texts(inner, f"{path}.{name}" if path else name)
    elif path and (isinstance(value, str) or (isinstance(value, list) and any(isinstance(v, str) for v in value))):
        yield path
