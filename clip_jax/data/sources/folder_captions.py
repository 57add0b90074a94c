"""The captions, and the boxes, of the images of a folder, from wherever ``folder.py`` says that they may be."""

import json
import os
import unicodedata
from collections import Counter
from collections.abc import Sequence
from pathlib import Path, PurePosixPath
from typing import Any, NamedTuple

from clip_jax.data import images
from clip_jax.data.sources import captions as caption_files
from clip_jax.data.sources import tables
from clip_jax.data.sources.captions import Captions, Field
from clip_jax.data.sources.folder_files import Files
from clip_jax.data.sources.left_out import LeftOut
from clip_jax.data.valid_text import shown, valid
from clip_jax.errors import UserError, nearest

SPLIT_FOLDERS = {"train", "training", "val", "valid", "validation", "dev", "test", "testing"}
NOT_CAPTIONS = {"readme", "license", "licence", "notice"}  # files of a download that are not captions


class Row(NamedTuple):
    """An image."""

    file: str
    """Relative to the folder, with forward slashes."""
    captions: tuple[str, ...]
    label: int = -1
    shares: tuple[float, ...] = ()
    boxes: Any = None
    """As they are written, for ``boxes.parse``."""


class Opening(NamedTuple):
    """The arguments that all readers of captions share."""

    root: Path
    files: Files
    caption: str
    max_bad_share: float
    left_out: LeftOut
    boxes: str = ""
    """The field that has them; empty: none are read."""


def read(where: str, opening: Opening) -> tuple[list[Row], tuple[str, ...], tuple[str, ...]]:
    """Rows, class names and notes. Raises UserError."""
    rows, class_names, notes = _read_captions(where, opening)
    return _with_boxes(where, opening, rows) if opening.boxes else rows, class_names, notes


def _read_captions(where: str, opening: Opening) -> tuple[list[Row], tuple[str, ...], tuple[str, ...]]:
    root, files, caption = opening.root, opening.files, opening.caption
    beside = [files.texts[key] for key in map(_key, files.images) if key in files.texts]
    with_json = [image for image in files.images if _key(image) in files.jsons]
    if with_json and caption_files.named(caption):
        return _from_jsons(where, opening), (), ()
    found = [name for name in files.tables if name in tables.OURS]
    if not found and not beside:  # tables of other libraries, if there is none of this project's
        candidates = [*files.tables, *(text for text in files.texts.values() if text == tables.KAGGLE)]
        found = [name for name in candidates if tables.is_table(root / name, caption)]
    others = [name for name in files.tables if name not in found]
    if others:
        opening.left_out.other("tables that are not read", shown(others[0]), len(others))
    texts = {
        key: text
        for key, text in files.texts.items()
        if PurePosixPath(text).stem.lower() not in NOT_CAPTIONS or text in beside
    }
    if len(found) + bool(beside) > 1:
        raise UserError(
            f"folder:{where}: captions in {' and in '.join([*found, *beside[:1]])}; remove or rename one of them"
        )
    # The field may belong to another source; the header reports what is read instead.
    fields = [field.name for field in caption_files.named(caption)]
    if found:
        _, column = tables.columns(root / found[0], caption)
        notes = (f"captions are the column {column} of {found[0]}",) if fields and fields != [column] else ()
        return _from_table(root / found[0], opening), (), notes
    if texts:
        notes = (f"captions are the .txt files: no image has a .json with {', '.join(fields)}",) if fields else ()
        return _from_texts(texts, opening), (), notes
    if with_json:
        first = root / files.jsons[_key(with_json[0])]
        there = ", ".join(caption_files.paths(first.read_bytes())) or "none has text"
        raise UserError(
            f"{shown(first)}: a .json beside each image and no captions elsewhere; set config.data.caption to a field "
            f"of it ({there}), or move these files away to take the names of the folders as captions"
        )
    class_names = _class_folders(opening)
    labels = {class_name: label for label, class_name in enumerate(class_names)}
    rows = [Row(file, (_top(file),), labels[_top(file)]) for file in files.images]
    names = ", ".join(class_names[:3]) + (", ..." if class_names[3:] else "")
    return rows, class_names, (f"captions are the names of its {len(class_names)} folders: {names}",)


def _key(file: str) -> str:
    return file.rpartition(".")[0]


def _top(file: str) -> str:
    return file.split("/", 1)[0]


def _from_texts(texts: dict[str, str], opening: Opening) -> list[Row]:
    root, files = opening.root, opening.files
    known = set(map(_key, files.images))
    used = [image for image in files.images if _key(image) in texts]
    orphans = [text for key, text in texts.items() if key not in known]
    missing = [image for image in files.images if _key(image) not in texts]
    if orphans and not _count(opening, "captions without an image", orphans, len(used)) and not missing:
        first, beside = orphans[0], [name for name in files.others if _key(name) == _key(orphans[0])]
        unread = f" ({beside[0]} is not read; images end in {', '.join(images.ENDINGS)})" if beside else ""
        raise UserError(
            f"{shown(root / first)}: {len(orphans)} text files have no image of the same name beside them, this is the "
            f"first{unread}; add the image or remove the text"
        )
    _refuse_images_without_captions(opening, missing, orphans, len(used))
    # A path in JSON is the setting of another source of a mixture: here the text file is the caption.
    wanted = [f for f in caption_files.fields(opening.caption) if f.name in caption_files.TEXT_FILE]
    wanted = wanted or caption_files.fields(caption_files.TXT)
    read = [caption_files.of_files(wanted, tables.read_text(root / texts[_key(i)]).encode(), b"") for i in used]
    return [Row(image, found.texts, shares=found.shares) for image, found in zip(used, read, strict=True)]


def _from_jsons(where: str, opening: Opening) -> list[Row]:
    root, files = opening.root, opening.files
    wanted = caption_files.fields(opening.caption)
    used = [image for image in files.images if _key(image) in files.jsons]
    beside = [root / files.jsons[_key(image)] for image in used]
    read = [_beside(wanted, root, files, image) for image in used]
    if not any(found.texts for found in read):
        caption_files.check_paths(
            f"folder:{where}", caption_files.named(opening.caption), (file.read_bytes() for file in beside[:100])
        )
    missing = [image for image in files.images if _key(image) not in files.jsons]
    _refuse_images_without_captions(opening, missing, [files.jsons[_key(used[0])]], len(used))
    return [Row(image, found.texts, shares=found.shares) for image, found in zip(used, read, strict=True)]


def _beside(wanted: Sequence[Field], root: Path, files: Files, image: str) -> Captions:
    found = (files.texts.get(_key(image)), files.jsons[_key(image)])
    txt, about = ((root / name).read_bytes() if name else b"" for name in found)
    try:
        return caption_files.of_files(wanted, txt, about)
    except ValueError:
        return Captions((), ())


def _from_table(path: Path, opening: Opening) -> list[Row]:
    """Rows in the order of the images, whatever the order of the table."""
    # macOS spells an accented letter in two characters, a spreadsheet in one.
    by_name = {unicodedata.normalize("NFC", image): image for image in opening.files.images}
    bases = Counter(name.rpartition("/")[2] for name in by_name)
    by_name = {base: image for name, image in by_name.items() if bases[base := name.rpartition("/")[2]] == 1} | by_name
    found: dict[str, list[str]] = {}
    regions: dict[str, Any] = {}
    absent: list[tuple[int, str]] = []
    top = os.path.abspath(path.parent)
    for line, file, texts, boxes in tables.read(path, opening.caption, opening.boxes):
        # As we write it; as OpenCLIP does: absolute, or relative to the working directory; or without its folder, where
        # only one file has that name (Flickr8k).
        names = (os.path.normpath(file), os.path.relpath(os.path.abspath(file), top))
        image = next((by_name[n] for n in (unicodedata.normalize("NFC", name) for name in names) if n in by_name), None)
        if image is None:
            absent.append((line, file))
        else:
            found.setdefault(image, []).extend(texts)
            regions[image] = regions.get(image) or boxes  # a table with a row per caption may repeat them
    if absent and not _count(
        opening, f"lines of {path.name} without an image", [f"line {absent[0][0]}"] * len(absent), len(found)
    ):
        line, file = absent[0]
        raise UserError(
            f"{path}, line {line}: {shown(file)} is not an image in {path.parent} ({len(absent)} such lines); add the "
            "file, correct its name (relative to the folder) or remove the line"
        )
    missing = [image for image in opening.files.images if image not in found]
    _refuse_images_without_captions(opening, missing, [path.name], len(found))
    used = [image for image in opening.files.images if image in found]
    return [Row(image, caption_files.clean(found[image]), boxes=regions[image]) for image in used]


def _with_boxes(where: str, opening: Opening, rows: list[Row]) -> list[Row]:
    """The rows with the boxes in the .json beside each image, where the table of captions has none for it."""
    root, jsons, there = opening.root, opening.files.jsons, set()
    found = []
    for row in rows:
        if row.boxes is None and (beside := jsons.get(_key(row.file))):
            data = (root / beside).read_bytes()
            there.update(caption_files.lists(data))
            try:
                row = row._replace(boxes=caption_files.at(json.loads(data), opening.boxes))
            except ValueError:  # a fault of this example, which ``boxes.parse`` finds
                row = row._replace(boxes=data.decode(errors="replace"))
        found.append(row)
    if all(row.boxes is None for row in found):
        lists = f"; lists there are {', '.join(sorted(there))}" if there else ""
        raise UserError(
            f"folder:{where}: config.data.boxes={opening.boxes}: no row of the captions' table and no .json beside an "
            f"image has this field{nearest(opening.boxes, there)}{lists}"
        )
    return found


def _count(opening: Opening, reason: str, names: Sequence[str], used: int) -> bool:
    """Counts images or captions without a counterpart; False if there are too many."""
    if names:
        opening.left_out.pair(reason, shown(names[0]), len(names))
    return not opening.left_out.is_too_much(used, opening.max_bad_share)


def _refuse_images_without_captions(
    opening: Opening, missing: Sequence[str], captions_in: Sequence[str], used: int
) -> None:
    if missing and not _count(opening, "images without a caption", missing, used):
        root, first = opening.root, missing[0]
        other = f"; because of {captions_in[0]}, subfolders are not read as classes" if captions_in else ""
        raise UserError(
            f"{shown(root / first)}: {len(missing)} images have no caption, this is the first; write "
            f"{shown(PurePosixPath(first).with_suffix('.txt').name)} beside it, or list it in "
            f"{root / 'captions.csv'}{other}"
        )


def _class_folders(opening: Opening) -> tuple[str, ...]:
    """The subfolders, sorted, as classes. Raises UserError if they cannot be classes."""
    root, files = opening.root, opening.files
    names = sorted(path.name for path in root.iterdir() if path.is_dir() and not path.name.startswith("."))
    loose = [image for image in files.images if "/" not in image]
    if loose or len(names) < 2:
        _refuse_images_without_captions(opening, loose or list(files.images), [], 0)
    if {name.lower().rstrip("0123456789") for name in names} <= SPLIT_FOLDERS:  # COCO has train2017
        raise UserError(
            f"{root}: {', '.join(names)} are splits, not classes; name one of them: folder:{root / names[0]}"
        )
    for name in names:
        if valid(name) != name:
            raise UserError(f"{shown(root / name)}: the name of a class is not valid text; rename the folder")
    used = {_top(image) for image in files.images}
    empty = [name for name in names if name not in used]
    if empty:  # left out, it would give every later class another number than in a sibling folder
        raise UserError(
            f"{root / empty[0]}: a class without images ({len(empty)} such); add images or remove the folder"
        )
    return tuple(names)
