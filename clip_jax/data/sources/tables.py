"""Tables of captions at the top of a folder: .csv, .tsv and .jsonl, ours and those of other libraries.

Ours are ``captions.csv`` and ``captions.jsonl`` with the columns ``file`` and ``caption``. Where there is none, others
are read too: ``metadata.csv`` and ``metadata.jsonl`` (``file_name`` and ``text``, Hugging Face's image folders) and
OpenCLIP's lists (``filepath`` and ``title``, separated by tabs whatever their name ends in). A file may have several
rows, and a line of JSON a list of captions.
"""

import csv
import io
import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from clip_jax.data.sources import captions as caption_files
from clip_jax.errors import UserError

ENDINGS = (".csv", ".tsv", ".jsonl")
OURS = ("captions.csv", "captions.tsv", "captions.jsonl")
KAGGLE = "captions.txt"
"""Flickr8k as it is downloaded there: columns ``image`` and ``caption``, the images in a folder beside it."""
FILE_COLUMNS = ("file", "file_name", "filepath", "filename", "image", "path")
CAPTION_COLUMNS = ("caption", "captions", "text", "texts", "title")


class Row(NamedTuple):
    line: int
    file: str
    """The path as written: relative to the table's folder, absolute, or relative to the working directory."""
    captions: list[str]
    boxes: Any = None
    """As ``boxes.parse`` takes them; None where there are none."""


def read(path: Path, setting: str, boxes: str = "") -> Iterator[Row]:
    """The rows of a table; ``setting`` (``config.data.caption``) names its column, the first that it has.

    ``boxes`` names the column that has them, or a dotted path in a line of JSON.
    """
    return (_read_jsonl if path.suffix == ".jsonl" else _read_csv)(path, setting, boxes)


def is_table(path: Path, setting: str) -> bool:
    """Whether a file has columns for an image and its caption."""
    return all(columns(path, setting))


def columns(path: Path, setting: str) -> tuple[str, str]:
    """The columns of the file and of the caption by the first line, empty where there is none."""
    try:
        with open(path, encoding="utf-8-sig") as file:
            first = next((line for line in file if line.strip()), "")
        names = json.loads(first) if path.suffix == ".jsonl" else next(csv.reader([first], _dialect(path, first)))
        return _columns(list(names), setting)
    except (OSError, ValueError, TypeError, csv.Error, StopIteration):
        return "", ""


def read_text(path: Path) -> str:
    """Raises UserError."""
    try:
        return path.read_text(encoding="utf-8-sig")  # spreadsheets begin with a byte-order mark
    except UnicodeDecodeError as error:
        raise UserError(f"{path}: not UTF-8 text (byte {error.start}); save it as UTF-8") from error
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({error.strerror}); check its permissions") from error


def _columns(names: Sequence[str], setting: str) -> tuple[str, str]:
    """The columns of the file and of the caption, empty if there is none."""
    wanted = (*(field.name for field in caption_files.named(setting)), *CAPTION_COLUMNS)
    file, caption = (next((c for c in known if c in names), "") for known in (FILE_COLUMNS, wanted))
    return file, caption


def _dialect(path: Path, header: str) -> str:
    return "excel-tab" if path.suffix == ".tsv" or ("\t" in header and "," not in header) else "excel"


def _read_csv(path: Path, setting: str, boxes: str) -> Iterator[Row]:
    text = read_text(path)
    table = csv.DictReader(io.StringIO(text), strict=True, dialect=_dialect(path, text.split("\n", 1)[0]))
    line = 0
    try:
        file, caption = _columns(table.fieldnames or (), setting)
        if not file or not caption:
            found = ", ".join(table.fieldnames or ()) or "none"
            raise UserError(f"{path}, line 1: the columns are {found}; it needs file and caption")
        for row in table:
            line = table.reader.line_num  # DictReader's own line_num does not count empty lines
            if None in row or None in row.values():  # DictReader's signs of too many and of too few fields
                raise UserError(
                    f"{path}, line {line}: not {len(table.fieldnames)} fields; put a caption with commas in it between "
                    '"quotes"'
                )
            yield Row(line, row[file], [row[caption]], row.get(boxes) or None)
    except csv.Error as error:  # an unclosed quote extends to the end of the file: name the line before it
        raise UserError(f"{path}, after line {line or 1}: {error}; close the quotes there") from error


def _read_jsonl(path: Path, setting: str, boxes: str) -> Iterator[Row]:
    for number, line in enumerate(read_text(path).split("\n"), 1):
        if line.strip():
            file, texts, regions = _entry(line, setting, boxes)
            texts = [texts] if isinstance(texts, str) else texts
            if not (isinstance(file, str) and isinstance(texts, list) and all(isinstance(t, str) for t in texts)):
                raise UserError(
                    f'{path}, line {number}: not of the form {{"file": "dog.jpg", "caption": "a dog"}}; a caption may '
                    "also be a list of strings"
                )
            yield Row(number, file, texts, regions)


def _entry(line: str, setting: str, boxes: str) -> tuple[Any, Any, Any]:
    try:
        entry = json.loads(line)
        file, caption = _columns(list(entry), setting)
        return entry[file], entry[caption], caption_files.at(entry, boxes)
    except (ValueError, KeyError, TypeError):
        return None, None, None
