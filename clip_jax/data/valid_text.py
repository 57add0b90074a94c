"""Makes text valid Unicode where it enters the program: captions, texts passed to the API, and file names.

Python keeps a byte of a file name or an argument that is not UTF-8 as half of a surrogate pair, and JSON can spell
such halves too. Tokenizers, files and terminals refuse them, usually much later than where they came from.
"""

import os
import unicodedata
from pathlib import PurePath


def valid(text: str) -> str:
    """The text with pairs of surrogates joined and every lone one replaced by U+FFFD."""
    if text.isascii():
        return text
    return text.encode("utf-16-le", "surrogatepass").decode("utf-16-le", "replace")


def shown(name: str | bytes | PurePath) -> str:
    """A file's name for messages, in full on one line: bytes that are not UTF-8 and control characters as ``\\xe9``."""
    if isinstance(name, str) and name.isprintable():  # which half of a surrogate pair is not
        return name
    raw = name if isinstance(name, bytes) else os.fsencode(name)
    text = raw.decode("utf-8", "backslashreplace")
    return "".join(c if _is_shown(c) else c.encode("unicode_escape").decode() for c in text)


def _is_shown(character: str) -> bool:
    """Spaces of other kinds (macOS has one in "10.15 PM") and the joiner in emoji are not "printable" in Python."""
    return character.isprintable() or character == "\u200d" or unicodedata.category(character) == "Zs"
