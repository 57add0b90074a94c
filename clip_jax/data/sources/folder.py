"""A folder of images with their captions, with all its subfolders.

Captions are in exactly one of these:

- a text file beside each image: ``dog.jpg``, ``dog.txt``;
- ``captions.csv`` at the top of the folder, with the columns ``file`` and ``caption``; a file may have several rows;
- ``captions.jsonl`` there, with lines like ``{"file": "pets/dog.jpg", "caption": "a dog"}``, or a list of captions.

With none of them, subfolders are classes, as for torchvision's ImageFolder, and the class name is the caption.
Captions are read once, when the folder is opened, and images each time they are indexed. Names that start with a dot
are ignored, and links are followed only where they stay in the folder.
"""

import csv
import hashlib
import io
import json
import os
import unicodedata
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath
from typing import NamedTuple

from clip_jax.data.sources import identity
from clip_jax.data.sources.sample import BadSampleError, Sample, Source
from clip_jax.errors import UserError

IMAGE_SUFFIXES = (".jpg", ".jpeg", ".png", ".webp")
CAPTION_FILES = ("captions.csv", "captions.jsonl")
SPLIT_FOLDERS = {"train", "training", "val", "valid", "validation", "dev", "test", "testing"}
NOT_CAPTIONS = {"readme", "license", "licence", "notice"}  # .txt files of a download that are not captions


class _Row(NamedTuple):
    file: str
    """Relative to the folder, with forward slashes."""
    captions: tuple[str, ...]
    label: int = -1


@dataclass(frozen=True, eq=False)
class _Folder:
    name: str
    fingerprint: str
    former_fingerprint: str
    class_names: tuple[str, ...]
    root: Path
    rows: tuple[_Row, ...] = field(repr=False)

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: int) -> Sample:
        row = self.rows[index]
        path = self.root / row.file
        if not row.captions:
            raise BadSampleError("empty caption", str(path))
        return Sample(image=path.read_bytes(), captions=row.captions, key=str(path), label=row.label)


def open_folder(where: str) -> Source:
    """The images of a folder in the order of their names, each with its captions and, in class folders, a label."""
    root = Path(where).expanduser()
    if not where or not root.is_dir():
        problem = "is a file" if where and root.exists() else "no such folder"
        raise UserError(f"folder:{where}: {problem}; give a folder of images, such as folder:photos")
    sizes, texts = _search(root)
    if not sizes:
        raise UserError(f"folder:{where}: no images in it or below it; images end in {', '.join(IMAGE_SUFFIXES)}")

    tables = [name for name in CAPTION_FILES if (root / name).is_file()]
    beside = sorted({_text_beside(image) for image in sizes} & set(texts))
    texts = [text for text in texts if PurePosixPath(text).stem.lower() not in NOT_CAPTIONS or text in beside]
    found = tables + beside[:1]
    class_names: tuple[str, ...] = ()
    if len(found) > 1:
        raise UserError(f"folder:{where}: captions in {' and in '.join(found)}; remove or rename one of them")
    if tables:
        rows = _from_table(root / tables[0], sizes)
    elif texts:
        rows = _from_texts(root, texts, sizes)
    else:
        class_names = _class_folders(root, sizes)
        labels = {class_name: label for label, class_name in enumerate(class_names)}
        rows = [_Row(file, (_top(file),), labels[_top(file)]) for file in sizes]

    images = dict(zip(sizes, identity.of_files([root / file for file in sizes]), strict=True))
    return _Folder(
        name=f"folder:{where}",
        fingerprint=_fingerprint(rows, images)[:24],
        former_fingerprint=_fingerprint(rows, sizes)[:16],  # older code took the size of an image for its content
        class_names=class_names,
        root=root,
        rows=tuple(rows),
    )


def _fingerprint(rows: Iterable[_Row], images: Mapping[str, int | str]) -> str:
    digest = hashlib.sha256()
    for row in rows:
        digest.update(json.dumps([row.file, images[row.file], row.captions]).encode())
    return digest.hexdigest()


def _search(root: Path) -> tuple[dict[str, int], list[str]]:
    """Image -> size in bytes, and the text files that may be captions; sorted by name, in the same order anywhere.

    Raises UserError for links that are broken or lead out of the folder: a copy of the folder would be other data.
    """

    def refuse(error: OSError):
        raise UserError(f"{error.filename}: cannot be read ({error.strerror}); check its permissions") from error

    def leads_out(path: Path) -> bool:
        return path.is_symlink() and not (path.exists() and path.resolve().is_relative_to(inside))

    sizes, texts, links = {}, [], []
    inside = root.resolve()
    for folder, subfolders, files in os.walk(root, onerror=refuse):
        subfolders[:] = [s for s in subfolders if not s.startswith(".")]
        links += [path for s in subfolders if leads_out(path := Path(folder, s))]
        for name in files:
            path = Path(folder, name)
            is_image, is_text = path.suffix.lower() in IMAGE_SUFFIXES, path.suffix.lower() == ".txt"
            if name.startswith(".") or not (is_image or is_text):
                continue
            if leads_out(path):
                links.append(path)
            elif is_image:
                sizes[path.relative_to(root).as_posix()] = path.stat().st_size
            else:
                texts.append(path.relative_to(root).as_posix())
    if links:
        raise UserError(
            f"{min(links)}: a link that is broken or leads out of {root} ({len(links)} in all); copy the files there"
        )
    return dict(sorted(sizes.items())), sorted(texts)


def _text_beside(image: str) -> str:
    return str(PurePosixPath(image).with_suffix(".txt"))


def _top(file: str) -> str:
    return file.split("/", 1)[0]


def _from_texts(root: Path, texts: list[str], sizes: Iterable[str]) -> list[_Row]:
    known = {_text_beside(image) for image in sizes}
    orphans, present = [text for text in texts if text not in known], set(texts)
    _refuse_images_without_captions(root, [image for image in sizes if _text_beside(image) not in present], orphans)
    if orphans:
        raise UserError(
            f"{root / orphans[0]}: {len(orphans)} text files have no image of the same name beside them, this is the "
            "first; add the image or remove the text"
        )
    return [_Row(image, _clean([_read_text(root / _text_beside(image))])) for image in sizes]


def _from_table(path: Path, sizes: Iterable[str]) -> list[_Row]:
    """Rows in the order of the images, whatever the order of the table."""
    # macOS spells an accented letter in two characters, a spreadsheet in one.
    by_name = {unicodedata.normalize("NFC", image): image for image in sizes}
    captions: dict[str, list[str]] = {}
    absent: list[tuple[int, str]] = []
    read = _read_csv if path.suffix == ".csv" else _read_jsonl
    for line, file, texts in read(path):
        image = by_name.get(unicodedata.normalize("NFC", os.path.normpath(file)))
        if image is None:
            absent.append((line, file))
        else:
            captions.setdefault(image, []).extend(texts)
    if absent:
        line, file = absent[0]
        raise UserError(
            f"{path}, line {line}: {file} is not an image in {path.parent} ({len(absent)} such lines); add the file, "
            "correct its name (relative to the folder) or remove the line"
        )
    _refuse_images_without_captions(path.parent, [image for image in sizes if image not in captions], [path.name])
    return [_Row(image, _clean(captions[image])) for image in sizes]


def _refuse_images_without_captions(root: Path, images: list[str], captions_in: list[str]) -> None:
    if images:
        other = f"; because of {captions_in[0]}, subfolders are not read as classes" if captions_in else ""
        raise UserError(
            f"{root / images[0]}: {len(images)} images have no caption, this is the first; write "
            f"{Path(images[0]).with_suffix('.txt').name} beside it, or list it in {root / 'captions.csv'}{other}"
        )


def _read_csv(path: Path) -> Iterator[tuple[int, str, list[str]]]:
    """Line, file, captions."""
    table = csv.DictReader(io.StringIO(_read_text(path)), strict=True)
    line = 0
    try:
        if not {"file", "caption"} <= set(table.fieldnames or ()):
            found = ", ".join(table.fieldnames or ()) or "none"
            raise UserError(f"{path}, line 1: the columns are {found}; it needs file and caption")
        for row in table:
            line = table.reader.line_num  # DictReader's own line_num does not count empty lines.
            if None in row or None in row.values():  # DictReader's signs of too many and of too few fields.
                raise UserError(
                    f"{path}, line {line}: not {len(table.fieldnames)} fields; put a caption with commas in it between "
                    '"quotes"'
                )
            yield line, row["file"], [row["caption"]]
    except csv.Error as error:  # An unclosed quote extends to the end of the file: name the line before it.
        raise UserError(f"{path}, after line {line or 1}: {error}; close the quotes there") from error


def _read_jsonl(path: Path) -> Iterator[tuple[int, str, list[str]]]:
    """Line, file, captions."""
    for number, line in enumerate(_read_text(path).split("\n"), 1):
        if not line.strip():
            continue
        try:
            entry = json.loads(line)
            file, texts = entry["file"], entry["caption"]
        except (ValueError, KeyError, TypeError) as error:
            file = texts = error
        texts = [texts] if isinstance(texts, str) else texts
        if not (isinstance(file, str) and isinstance(texts, list) and all(isinstance(t, str) for t in texts)):
            raise UserError(
                f'{path}, line {number}: not of the form {{"file": "dog.jpg", "caption": "a dog"}}; a caption may also '
                "be a list of strings"
            )
        yield number, file, texts


def _read_text(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8-sig")  # Spreadsheets begin with a byte-order mark.
    except UnicodeDecodeError as error:
        raise UserError(f"{path}: not UTF-8 text (byte {error.start}); save it as UTF-8") from error
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({error.strerror}); check its permissions") from error


def _clean(captions: Iterable[str]) -> tuple[str, ...]:
    return tuple(filter(None, (caption.strip() for caption in captions)))


def _class_folders(root: Path, sizes: Iterable[str]) -> tuple[str, ...]:
    """The subfolders, sorted, as classes; UserError where they cannot be classes."""
    names = sorted(path.name for path in root.iterdir() if path.is_dir() and not path.name.startswith("."))
    loose = [image for image in sizes if "/" not in image]
    if loose or len(names) < 2:
        _refuse_images_without_captions(root, loose or list(sizes), [])
    if set(map(str.lower, names)) <= SPLIT_FOLDERS:
        raise UserError(
            f"{root}: {', '.join(names)} are splits, not classes; name one of them: folder:{root / names[0]}"
        )
    used = {_top(image) for image in sizes}
    empty = [name for name in names if name not in used]
    if empty:  # Left out, it would give every later class another number than in a sibling folder.
        raise UserError(
            f"{root / empty[0]}: a class without images ({len(empty)} such); add images or remove the folder"
        )
    return tuple(names)
