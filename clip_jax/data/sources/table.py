"""Tables of images and captions: Parquet, CSV and TSV, by random access.

The image of a row is a path (relative to the table), a URL, or bytes (Parquet; also Hugging Face's ``{bytes, path}``).
The columns have the usual names below, or are named by ``config.data.image`` and ``config.data.caption``. A table,
local or remote, is copied once into Arrow's format in the cache folder and memory-mapped there: Parquet is compressed
and has no random access. So the disk must hold the image bytes of a Parquet table; tar shards are read where they are.

An image behind a URL is fetched each time it is used. A server that does not have it makes a bad example; one that is
slow, throttles or fails is asked again, and then stops the run.
"""

import bisect
import csv
import hashlib
import io
import itertools
import json
import os
import shutil
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from clip_jax.data.sources import boxes as box_files
from clip_jax.data.sources import captions, identity, patterns
from clip_jax.data.sources.sample import BadSampleError, Sample, Source
from clip_jax.errors import UserError, nearest
from clip_jax.storage import atomic, ranges, remote
from clip_jax.storage.ranges import Stat

# The first one in a table is used. Bytes: Hugging Face, img2dataset. Paths: OpenCLIP (filepath, title), metadata.csv.
IMAGE_COLUMNS = (
    *("image", "jpg", "png", "webp", "image_bytes", "filepath", "file_name", "file", "filename", "path"),
    *("url", "image_url"),
)
CAPTION_COLUMNS = ("caption", "captions", "text", "title")
SUFFIXES = {"parquet": (".parquet",), "csv": (".csv", ".tsv")}
FIELD_BYTES = 16 * 1024 * 1024
ROWS = 4000
SAID_BYTES = 1 << 30
"""Copies of tables from this size are reported when they begin."""
RULES = 1
IMAGES = 1000
"""About how many image files behind paths, evenly spaced over the rows, are in the fingerprint: a bounded cost."""


@dataclass(frozen=True, eq=False)
class Table:
    """Made by ``open_parquet`` and ``open_csv``."""

    name: str
    fingerprint: str
    folders: tuple[str, ...]
    """The folder of each file, to which its paths are relative."""
    captions: tuple[captions.Field, ...]
    batches: tuple[Any, ...] = field(repr=False)
    """Arrow record batches with the columns image, file and those of the captions."""
    starts: tuple[int, ...] = field(repr=False)
    """The first row of each batch, and the number of all."""
    boxes: str = ""
    """The column of the boxes, or a dotted path into one; empty: boxes are not read."""
    former_fingerprint: str = ""
    class_names: tuple[str, ...] = ()
    notes: tuple[str, ...] = ()

    def __len__(self) -> int:
        return self.starts[-1]

    def __getitem__(self, index: int) -> Sample:
        if not 0 <= index < len(self):
            raise IndexError(index)
        number = bisect.bisect_right(self.starts, index) - 1
        batch = self.batches[number]
        values = {
            name: batch.column(i)[index - self.starts[number]].as_py() for i, name in enumerate(batch.schema.names)
        }
        image, key = values["image"], f"{self.name}[{index}]"
        if isinstance(image, dict):
            image = image.get("bytes") or image.get("path")
        found = captions.gather(self.captions, lambda name: captions.at(values, name))
        if not found.texts:
            raise BadSampleError("empty caption", key)
        if not image:
            raise BadSampleError("no image", key)
        if isinstance(image, str):
            key = image if remote.is_remote(image) else os.path.join(self.folders[values["file"]], image)
            image = _file(key)
        extras = {"boxes": box_files.parse(captions.at(values, self.boxes), key)} if self.boxes else {}
        return Sample(image, found.texts, key, extras=extras, shares=found.shares)


def _file(where: str) -> bytes:
    """The content of an image file. Raises BadSampleError where there is none."""
    if remote.is_remote(where):
        if not remote.is_supported(where):
            raise BadSampleError(f"a URL that is none of {', '.join(remote.SCHEMES)}", where)
        try:
            return remote.fetch(where)
        except remote.RefusedError as error:
            raise BadSampleError(error.reason, where) from error
    try:
        return Path(where).read_bytes()
    except (FileNotFoundError, IsADirectoryError, ValueError) as error:  # ValueError: a zero byte in the path
        raise BadSampleError("no such file", where) from error


def open_parquet(where: str, *, image: str = "", caption: str = "txt", boxes: str = "") -> Source:
    """Parquet files, by the names that ``patterns.py`` takes. Raises UserError."""
    return _open("parquet", where, image, caption, boxes)


def open_csv(where: str, *, image: str = "", caption: str = "txt", boxes: str = "") -> Source:
    """CSV or TSV files: a header line with a tab in it is separated by tabs, as OpenCLIP's are. Raises UserError."""
    return _open("csv", where, image, caption, boxes)


def _open(kind: str, where: str, image: str, caption: str, boxes: str) -> Source:
    import pyarrow as pa

    named = patterns.files(where, SUFFIXES[kind])
    files = [file if remote.is_remote(file) else os.path.abspath(file) for file in named]
    wanted = captions.named(caption)
    more = [boxes] if boxes else []
    with ThreadPoolExecutor(identity.THREADS) as pool:
        stats = list(pool.map(ranges.stat, files))
    settings = [files, stats, image, caption, RULES, *more]
    copy = identity.cache_folder() / "tables" / hashlib.sha256(json.dumps(settings).encode()).hexdigest()[:24]
    if not copy.is_dir():
        columns = [_columns(kind, file, image, wanted, boxes) for file in files]
        _copy(kind, files, stats, columns, copy)
    mapped = pa.ipc.open_file(pa.memory_map(str(copy / "rows.arrow")))
    names = [name for name in mapped.schema.names if name not in ("image", "file")]
    batches = tuple(mapped.get_batch(i) for i in range(mapped.num_record_batches))
    folders = tuple(os.path.dirname(file) for file in files)
    content = [identity.of_files(files), [os.path.splitext(f)[1] for f in files], image, caption, *more]
    behind = _behind_paths(batches, folders)
    first = next(iter(batches[0].column("image").slice(0, 1).to_pylist()), None)
    first = first.get("path") if isinstance(first, dict) and not first.get("bytes") else first
    distant = isinstance(first, str) and remote.is_remote(os.path.join(os.path.dirname(files[0]), first))
    return Table(
        name=f"{kind}:{where}",
        fingerprint=_digest([*content, behind] if behind else content),
        folders=folders,
        captions=wanted or captions.fields(names[0]),
        boxes=boxes,
        batches=batches,
        starts=tuple(itertools.accumulate((batch.num_rows for batch in batches), initial=0)),
        former_fingerprint=_digest(content) if behind else "",
        notes=(f"images are fetched one by one when they are used (first: {first})",) if distant else (),
    )


def _digest(content: list[Any]) -> str:
    return hashlib.sha256(json.dumps(content).encode()).hexdigest()[:24]


def _behind_paths(batches: tuple[Any, ...], folders: tuple[str, ...]) -> list[str]:
    """Digests of a sample of the image files; none for a table that holds the bytes of its images."""
    import pyarrow as pa

    every = max(1, sum(batch.num_rows for batch in batches) // IMAGES)
    files, row = [], 0
    for batch in batches:
        images = batch.column("image")
        if pa.types.is_struct(images.type) and {"bytes", "path"} <= {inner.name for inner in images.type}:
            images = pa.compute.if_else(images.field("bytes").is_valid(), None, images.field("path"))
        if not pa.types.is_large_string(images.type):
            return []
        for i in range(-row % every, batch.num_rows, every):
            if image := images[i].as_py():
                files.append(os.path.join(folders[batch.column("file")[i].as_py()], image))
        row += batch.num_rows
    present = [file for file in files if not remote.is_remote(file) and os.path.isfile(file)]
    digests = dict(zip(present, identity.of_files(present), strict=True)) if present else {}
    return [digests.get(file, "") for file in files]


def _columns(kind: str, file: str, image: str, wanted: tuple[captions.Field, ...], boxes: str) -> dict[str, str]:
    """Name in the copy -> column of the file."""
    import pyarrow.parquet as pq

    try:
        if kind == "parquet":
            with ranges.binary_file(file) as opened:
                names = pq.read_schema(opened).names
        else:
            names = next(_csv_rows(file))
    except (OSError, ValueError, StopIteration) as error:  # Arrow's errors are ValueErrors
        raise UserError(
            f"{file}: cannot be read as {kind} ({str(error).splitlines()[0] if str(error) else 'empty'})"
        ) from error

    def pick(given: str, usual: tuple[str, ...], setting: str) -> str:
        if given and given not in names:
            raise UserError(f"{file}: no column {given}{nearest(given, names)}; its columns are {', '.join(names)}")
        found = given or next((name for name in usual if name in names), "")
        if not found:
            raise UserError(
                f"{file}: none of its columns ({', '.join(names)}) is called {', '.join(usual)}; "
                f"name one with {setting}"
            )
        return found

    def column(path: str) -> str:
        return path if path in names else path.partition(".")[0]

    texts = [column(name) for name, _ in wanted] or [pick("", CAPTION_COLUMNS, "config.data.caption")]
    texts = [pick(name, (), "config.data.caption") for name in texts]
    more = [pick(column(boxes), (), "config.data.boxes")] if boxes else []
    return {"image": pick(image, IMAGE_COLUMNS, "config.data.image"), **{name: name for name in (*texts, *more)}}


def _copy(kind: str, files: list[str], stats: list[Stat], columns: list[dict[str, str]], to: Path) -> None:
    """The columns of all files as one Arrow file; as with the index of tar shards, the first copy stays."""
    import pyarrow as pa

    to.parent.mkdir(parents=True, exist_ok=True)
    size, free = sum(stat.size for stat in stats), shutil.disk_usage(to.parent).free
    if size > SAID_BYTES:
        print(f"{files[0]}: copying {len(files)} files of {size / 1e9:.1f} GB, once, to {to.parent}", flush=True)
    if size > free:
        raise UserError(
            f"{files[0]}: the copies of {len(files)} files, of {size / 1e9:.1f} GB, do not fit in {to.parent}, which "
            f"has {free / 1e9:.1f} GB; name another folder with CLIP_JAX_CACHE, or use tar shards, which need no copy"
        )
    read = _parquet_batches if kind == "parquet" else _csv_batches
    writer = schema = left = None
    with atomic.first_folder(to) as temporary, pa.OSFile(str(temporary / "rows.arrow"), "wb") as sink:
        for number, (file, names) in enumerate(zip(files, columns, strict=True)):
            if list(names) != list(columns[0]):
                raise UserError(f"{file}: other columns than {files[0]}; name them with config.data.caption")
            for table in read(file, names):
                table = table.append_column("file", pa.array([number] * len(table), pa.int32()))
                if writer is None:
                    schema = table.schema
                    writer = pa.ipc.new_file(sink, schema)
                try:
                    left = table if left is None else pa.concat_tables([left, table.cast(schema)])
                except (ValueError, pa.ArrowInvalid) as error:
                    raise UserError(f"{file}: columns of other types than in {files[0]} ({error})") from error
                while len(left) >= ROWS:
                    writer.write_table(left.slice(0, ROWS).combine_chunks())
                    left = left.slice(ROWS)
        if writer is None:
            raise UserError(f"{files[0]}: no rows")
        if len(left):
            writer.write_table(left.combine_chunks())
        writer.close()


def _parquet_batches(file: str, names: dict[str, str]) -> Iterator[Any]:
    import pyarrow as pa
    import pyarrow.parquet as pq

    columns = list(dict.fromkeys(names.values()))
    with ranges.binary_file(file) as opened:
        batches = pq.ParquetFile(opened).iter_batches(batch_size=1000, columns=columns)
        while True:
            try:
                batch = next(batches, None)
            except (OSError, ValueError) as error:  # Arrow's errors are among them
                raise UserError(f"{file}: damaged ({str(error).splitlines()[0]}); download it again") from error
            if batch is None:
                return
            yield pa.table({new: _large(batch.column(old)) for new, old in names.items()})


def _csv_batches(file: str, names: dict[str, str]) -> Iterator[Any]:
    import pyarrow as pa

    lines = _csv_rows(file)
    header = next(lines)
    indices, rows = {new: header.index(old) for new, old in names.items()}, []
    for number, row in enumerate(lines, 2):
        if len(row) != len(header):
            raise UserError(
                f'{file}, row {number}: {len(row)} fields, not {len(header)}; put a text with the separator in "quotes"'
            )
        rows.append(row)
        if len(rows) == ROWS:
            yield pa.table({name: pa.array([r[i] for r in rows], pa.large_string()) for name, i in indices.items()})
            rows = []
    if rows:
        yield pa.table({name: pa.array([r[i] for r in rows], pa.large_string()) for name, i in indices.items()})


def _csv_rows(file: str) -> Iterator[list[str]]:
    csv.field_size_limit(FIELD_BYTES)
    try:
        with io.TextIOWrapper(ranges.binary_file(file), encoding="utf-8-sig", newline="") as text:
            first = text.readline()
            text.seek(0)
            yield from csv.reader(text, delimiter="\t" if "\t" in first else ",", strict=True)
    except UnicodeDecodeError as error:
        raise UserError(f"{file}: not UTF-8 text (byte {error.start}); save it as UTF-8") from error
    except csv.Error as error:
        raise UserError(f"{file}: {error}; check its quotes") from error


def _large(column: Any) -> Any:
    """Types with 64-bit offsets, because the texts or bytes of many files together may exceed 2 GiB."""
    import pyarrow as pa

    larger = {pa.binary(): pa.large_binary(), pa.string(): pa.large_string()}
    if pa.types.is_struct(column.type):
        fields = [(inner.name, larger.get(inner.type, inner.type)) for inner in column.type]
        return column.cast(pa.struct(fields))
    return column.cast(larger[column.type]) if column.type in larger else column
