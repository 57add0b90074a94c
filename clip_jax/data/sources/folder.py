"""A folder of images with their captions, with all its subfolders.

Captions are in exactly one of these:

- a text file beside each image: ``dog.jpg``, ``dog.txt``;
- a JSON file beside each image, where ``config.data.caption`` is a path into it (img2dataset's ``files`` layout);
- a table at the top of the folder: ``captions.csv``, ``captions.jsonl`` or one of another library (``tables.py``).

With none of them, subfolders are classes, as for torchvision's ImageFolder, and the class name is the caption.
Boxes (``config.data.boxes``) are a field of that table, or of the JSON file beside an image.
Captions are read once, when the folder is opened, and images each time they are indexed. Names that start with a dot
are ignored; links are followed where they lead into the folder or below ``config.data.links_to``.
"""

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath

from clip_jax.data import images
from clip_jax.data.sources import boxes as box_files
from clip_jax.data.sources import captions, folder_captions, identity
from clip_jax.data.sources.folder_captions import NOT_CAPTIONS, Opening, Row
from clip_jax.data.sources.folder_files import find_files
from clip_jax.data.sources.left_out import MAX_SHARE, LeftOut
from clip_jax.data.sources.sample import BadSampleError, Sample, Source
from clip_jax.data.valid_text import shown
from clip_jax.errors import UserError


@dataclass(frozen=True, eq=False)
class _Folder:
    name: str
    fingerprint: str
    former_fingerprint: str
    class_names: tuple[str, ...]
    notes: tuple[str, ...]
    root: Path
    rows: tuple[Row, ...] = field(repr=False)
    boxes: str = ""
    """The field of the boxes; empty: boxes are not read."""

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: int) -> Sample:
        row = self.rows[index]
        path = self.root / row.file
        if not row.captions:
            raise BadSampleError("empty caption", shown(path))
        extras = {"boxes": box_files.parse(row.boxes, shown(path))} if self.boxes else {}
        return Sample(path.read_bytes(), row.captions, shown(path), row.label, extras, row.shares)


def open_folder(
    where: str,
    *,
    caption: str = captions.TXT,
    links_to: str = "",
    max_bad_share: float = MAX_SHARE,
    boxes: str = "",
) -> Source:
    """The images of a folder in the order of their names, each with its captions and, in class folders, a label.

    ``boxes``: a column of the table of captions, or a dotted path in its lines of JSON or in the JSON beside an image.

    Raises UserError for a folder without usable images, and if too many images or captions have no counterpart.
    """
    root = Path(where).expanduser()
    if not where or not root.is_dir():
        problem = "is a file" if where and root.exists() else "no such folder"
        raise UserError(f"folder:{where}: {problem}; give a folder of images, such as folder:photos")
    files = find_files(root, links_to)
    if not files.images:
        raise UserError(
            f"folder:{where}: no images in it or below it; images end in "
            f"{', '.join(f'.{ending}' for ending in images.ENDINGS)}"
        )
    opening = Opening(root, files, caption, max_bad_share, LeftOut(), boxes)
    rows, class_names, notes = folder_captions.read(where, opening)
    for name in files.others:
        if PurePosixPath(name).stem.lower() not in NOT_CAPTIONS:
            ending = PurePosixPath(name).suffix
            opening.left_out.other(
                f"files that are not read, {f'ending in {ending}' if ending else 'without an ending'}", shown(name)
            )
    content = dict(zip(files.images, identity.of_files([root / file for file in files.images]), strict=True))
    return _Folder(
        name=f"folder:{where}",
        fingerprint=_fingerprint(rows, content)[:24],
        # Older code used the size of an image in place of its content.
        former_fingerprint=_fingerprint(rows, files.images)[:16],
        class_names=class_names,
        notes=(*notes, *opening.left_out.notes()),
        root=root,
        rows=tuple(rows),
        boxes=boxes,
    )


def _fingerprint(rows: Sequence[Row], images_: Mapping[str, int | str]) -> str:
    digest = hashlib.sha256()
    for row in rows:
        more = [part for part in (row.shares, row.boxes) if part]
        digest.update(json.dumps([row.file, images_[row.file], row.captions, *more]).encode())
    return digest.hexdigest()
