"""Reads published sets in the layouts in which they are distributed: Winoground, SugarCrepe, multi-label tar shards.

    DIR/examples.jsonl, DIR/images/ex_0_img_0.png       Winoground (facebook/winoground with its images.zip unpacked)
    DIR/add_att.json ... swap_obj.json, DIR/val2017/    SugarCrepe (its folder data, with COCO's images beside)
    DIR/test/0.tar with .jpg and .npy                   CLIP_benchmark's multi-label sets (wds_voc2007_multilabel)
    DIR/test/0.tar with .jpg, .cls and .npy             DataComp's sets with groups (wds_wilds-fmow, wds_geode)

``aro.py`` has those of ARO. Only what is there is read: nothing is downloaded, and no array is unpickled.
"""

import dataclasses
import hashlib
import io
import json
import tarfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Bool, Int

from clip_jax.data.images import ENDINGS, BadImageError, decode
from clip_jax.data.sources.captions import clean
from clip_jax.data.sources.sample import BadSampleError, Sample
from clip_jax.errors import UserError
from clip_jax.evaluation.groups import Grouping

SUGAR_CREPE = tuple(f"{how}_{what}" for how in ("add", "replace", "swap") for what in ("att", "obj", "rel"))
IMAGE_FOLDERS = ("images", "winogavil_images", "val2017", "coco/val2017", "val2014", "flickr30k-images", ".")


@dataclass(frozen=True)
class Captioned:
    """Image files with captions; the number and the order of an image's captions have a meaning to its protocol."""

    name: str
    fingerprint: str
    files: tuple[Path, ...] = field(repr=False)
    captions: tuple[tuple[str, ...], ...] = field(repr=False)
    groups: tuple[str, ...] = field(repr=False)
    """The part of the set to which each image belongs."""
    crops: tuple[tuple[int, int, int, int], ...] = field(default=(), repr=False)
    """Left, top, right and bottom, in pixels, of the part of each image that is shown; empty: all of it."""

    class_names = ()

    def __len__(self) -> int:
        return len(self.files)

    def __getitem__(self, index: int) -> Sample:
        file = self.files[index]
        data = read_image(file)
        if self.crops:
            try:
                data = np.asarray(decode(data).crop(self.crops[index]))
            except BadImageError as error:
                raise BadSampleError(str(error), str(file)) from error
        return Sample(data, self.captions[index], file.name)


def read_image(file: Path) -> bytes:
    """Raises BadSampleError if the file is missing."""
    try:
        return file.read_bytes()
    except FileNotFoundError as error:
        raise BadSampleError("no such file", str(file)) from error


def is_winoground(folder: Path) -> bool:
    return (folder / "examples.jsonl").is_file() or (folder / "data" / "examples.jsonl").is_file()


def open_winoground(folder: Path) -> Captioned:
    """Images 2i and 2i + 1 are those of example i, each with its caption. Raises UserError."""
    root = folder if (folder / "examples.jsonl").is_file() else folder / "data"
    lines = (root / "examples.jsonl").read_text(encoding="utf-8").splitlines()
    rows = [_row(line, f"{root}/examples.jsonl, line {i}") for i, line in enumerate(lines, 1) if line.strip()]
    files, texts, groups = [], [], []
    for i, row in enumerate(rows, 1):
        where = f"{root}/examples.jsonl, line {i}"
        for k in "01":
            files.append(image_file(root, text(row, f"image_{k}", where)))
            texts.append((text(row, f"caption_{k}", where),))
            groups.append(str(row.get("collapsed_tag") or row.get("tag") or ""))
    return captioned("winoground", folder, files, texts, groups)


def is_sugar_crepe(folder: Path) -> bool:
    return bool(_sugar_crepe_files(folder))


def open_sugar_crepe(folder: Path) -> Captioned:
    """Every image with its true and its false caption, in this order; groups are the tasks. Raises UserError."""
    files, texts, groups = [], [], []
    for path in _sugar_crepe_files(folder):
        content = _row(path.read_text(encoding="utf-8"), str(path))
        for key, row in content.items():
            where = f"{path}, {key}"
            files.append(image_file(folder, text(row, "filename", where)))
            texts.append((text(row, "caption", where), text(row, "negative_caption", where)))
            groups.append(path.stem)
    return captioned("sugar_crepe", folder, files, texts, groups)


@dataclass(frozen=True)
class Annotated:
    """Images of tar shards, each with a row of numbers: its classes, or the groups to which it belongs."""

    name: str
    fingerprint: str
    class_names: tuple[str, ...]
    spans: tuple[tuple[Path, int, int], ...] = field(repr=False)
    """Shard, offset and size of every image."""
    rows: Bool[np.ndarray, "images classes"] | Int[np.ndarray, "images columns"] = field(repr=False)
    labels: Int[np.ndarray, " images"] | None = field(default=None, repr=False)
    grouping: Grouping | None = None
    """The meaning of the columns of ``rows``, where they are groups."""

    def __len__(self) -> int:
        return len(self.spans)

    def __getitem__(self, index: int) -> Sample:
        shard, offset, size = self.spans[index]
        label = -1 if self.labels is None else int(self.labels[index])
        with shard.open("rb") as file:
            file.seek(offset)
            return Sample(file.read(size), ("",), f"{shard.name}[{index}]", label)


def open_multi_label(name: str, shards: Sequence[Path], class_names: tuple[str, ...]) -> Annotated:
    """Members ``KEY.npy`` are a 0 or 1 for each class. Raises UserError for a pair that is not complete or not so."""
    return _open_annotated(name, shards, class_names, ("npy",), lambda data, where: _labels(data, where, class_names))


def open_grouped(name: str, shards: Sequence[Path], class_names: tuple[str, ...], grouping: Grouping) -> Annotated:
    """Members ``KEY.cls`` are labels, members ``KEY.npy`` the group of an image by each of several columns.

    Raises UserError for an image without one of them, or with other content.
    """
    found = _open_annotated(name, shards, class_names, ("npy", "cls"), _groups)
    if found.rows.shape[1] < len(grouping.columns):
        columns = ", ".join(grouping.columns)
        raise UserError(f"{shards[0].parent}: arrays of {found.rows.shape[1]} numbers; they need {columns}")
    return dataclasses.replace(found, grouping=grouping)


def _open_annotated(
    name: str,
    shards: Sequence[Path],
    class_names: tuple[str, ...],
    needed: tuple[str, ...],
    read: Callable[[bytes, str], np.ndarray],
) -> Annotated:
    spans, rows, labels, digest = [], [], [], hashlib.sha256(json.dumps(class_names).encode())
    for shard in shards:
        images, texts = {}, {ending: {} for ending in needed}
        with tarfile.open(shard) as archive:
            for member in archive:
                key, _, ending = member.name.rpartition(".")
                if ending in texts:
                    texts[ending][key] = archive.extractfile(member).read()
                elif ending in ENDINGS:
                    images[key] = (shard, member.offset_data, member.size)
                digest.update(f"{member.name} {member.size}".encode())
        for ending, there in texts.items():
            if alone := sorted(images.keys() ^ there.keys()):
                raise UserError(f"{shard}: {alone[0]} has no image or no .{ending}")
        spans += images.values()
        rows += [read(texts["npy"][key], f"{shard}, {key}.npy") for key in images]
        labels += [_label(texts["cls"][key], f"{shard}, {key}.cls") for key in images if "cls" in texts]
    if len({row.shape for row in rows}) > 1:
        raise UserError(f"{shards[0].parent}: the arrays of its images have different shapes")
    stacked = np.stack(rows) if rows else np.zeros((0, len(class_names)), bool)
    digest.update(stacked.tobytes() + json.dumps(labels).encode())
    fingerprint = digest.hexdigest()[:24]
    numbers = np.array(labels, int) if "cls" in needed else None
    return Annotated(f"benchmark:{name}", fingerprint, class_names, tuple(spans), stacked, numbers)


def _label(data: bytes, where: str) -> int:
    text = data.decode("ascii", "replace").strip()
    if not text.isdigit():
        raise UserError(f"{where}: {text[:40]!r} is not a class number")
    return int(text)


def _groups(data: bytes, where: str) -> Int[np.ndarray, " columns"]:
    found = _array(data, where)
    if found.ndim != 1 or found.dtype.kind not in "iu":
        raise UserError(f"{where}: {found.dtype}{list(found.shape)}; it needs a list of whole numbers, the groups")
    return found.astype(int)


def _labels(data: bytes, where: str, class_names: tuple[str, ...]) -> Bool[np.ndarray, " classes"]:
    found = _array(data, where)
    if found.shape != (len(class_names),) or not np.isin(found, (0, 1)).all():
        shape = list(found.shape)
        raise UserError(f"{where}: {found.dtype}{shape}; it needs a 0 or 1 for each of {len(class_names)} classes")
    return found.astype(bool)


def _array(data: bytes, where: str) -> np.ndarray:
    try:
        return np.load(io.BytesIO(data), allow_pickle=False)
    except (ValueError, EOFError) as error:
        raise UserError(f"{where}: not an array ({error})") from error


def captioned(
    kind: str,
    folder: Path,
    files: list[Path],
    texts: list[tuple[str, ...]],
    groups: list[str],
    crops: Sequence[tuple[int, int, int, int]] = (),
) -> Captioned:
    """Raises UserError if none of the images is there."""
    if not any(file.is_file() for file in files):
        raise UserError(f"{folder}: none of its {len(files)} images is there, such as {files[0] if files else 'any'}")
    content = [
        [f.name, f.stat().st_size if f.is_file() else -1, t, g] for f, t, g in zip(files, texts, groups, strict=True)
    ]
    content += [crops] if crops else []
    fingerprint = hashlib.sha256(json.dumps(content).encode()).hexdigest()[:24]
    return Captioned(f"{kind}:{folder.name}", fingerprint, tuple(files), tuple(texts), tuple(groups), tuple(crops))


def _sugar_crepe_files(folder: Path) -> list[Path]:
    named = [root / f"{task}.json" for root in (folder, folder / "data") for task in SUGAR_CREPE]
    return [path for path in named if path.is_file()]


def image_file(root: Path, name: str) -> Path:
    """The file of an image whose name may lack its ending, in one of the usual folders; the first if there is none."""
    endings = ("",) if "." in name else tuple(f".{ending}" for ending in ("png", "jpg", "jpeg"))
    options = [root / folder / (name + ending) for folder in IMAGE_FOLDERS for ending in endings]
    return next((path for path in options if path.is_file()), options[0])


def _row(text: str, where: str) -> Mapping[str, Any]:
    try:
        found = json.loads(text)
    except ValueError as error:
        raise UserError(f"{where}: not JSON ({error})") from error
    if not isinstance(found, dict):
        raise UserError(f"{where}: not an object with fields")
    return found


def text(row: Any, name: str, where: str) -> str:
    value = row.get(name) if isinstance(row, dict) else None
    found = clean([value]) if isinstance(value, str) else ()
    if not found:
        raise UserError(f"{where}: no text in the field {name}")
    return found[0]
