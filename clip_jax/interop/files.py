"""Reads and writes files that hold nothing but tensors: safetensors and npz.

Neither torch nor pickle is involved; a file that needs them (``.pt``, ``.bin``) is refused with the advice to convert
it by ``clip-jax import`` (``torch_files.py``).

The header of a safetensors file is parsed here and not by the library, whose reader maps the file into memory, so that
every page it touches counts as this process's memory, and which silently takes the last of two tensors with one name.
Formats:
https://huggingface.co/docs/safetensors and https://numpy.org/neps/nep-0001-npy-format.html
"""

import itertools
import json
import math
import tokenize
import zipfile
import zlib
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
from safetensors.numpy import save_file

from clip_jax.errors import UserError
from clip_jax.interop.tensors import Entry, Tensors, unwrapped
from clip_jax.storage import atomic

MAX_HEADER_BYTES = 100 << 20  # The limit of the safetensors library; the header of the largest CLIP has 0.2 MB.

DTYPES = {
    "F64": np.dtype(np.float64),
    "F32": np.dtype(np.float32),
    "F16": np.dtype(np.float16),
    "BF16": np.dtype(ml_dtypes.bfloat16),
    "I64": np.dtype(np.int64),
    "I32": np.dtype(np.int32),
    "I16": np.dtype(np.int16),
    "I8": np.dtype(np.int8),
    "U8": np.dtype(np.uint8),
    "BOOL": np.dtype(np.bool_),
}

PICKLED = (".pt", ".pth", ".bin", ".ckpt", ".pkl", ".pickle")
INDEX = ".index.json"


def is_pickled(path: Path) -> bool:
    """Whether a file is a pickle, or an index of pickles, which only ``clip-jax import`` opens."""
    return path.name.removesuffix(INDEX).endswith(PICKLED)


def read(path: str | Path) -> Tensors:
    """The tensors of a ``.safetensors``, ``.safetensors.index.json`` or ``.npz`` file, by the names of the bare model.

    Raises UserError.
    """
    path = Path(path)
    if is_pickled(path):
        raise UserError(f"{path}: a pickle, which is never opened here; `clip-jax import {path} --to=DIR` converts it")
    if path.name.endswith(INDEX):
        return unwrapped(read_shards(path, _read_safetensors))
    if path.suffix == ".safetensors":
        return unwrapped(_read_safetensors(path))
    if path.suffix == ".npz":
        return unwrapped(_read_npz(path))
    raise UserError(f"{path}: not a file of weights (.safetensors, .safetensors.index.json, .npz)")


def write_safetensors(path: Path, arrays: Mapping[str, np.ndarray], metadata: dict[str, str] | None = None) -> None:
    """Writes the file atomically. Transformers requires ``format: pt`` in its metadata."""
    contiguous = {name: np.ascontiguousarray(x).reshape(x.shape) for name, x in arrays.items()}
    with atomic.replacing(path) as temporary:
        save_file(contiguous, temporary, {"format": "pt", **(metadata or {})})


def write_npz(path: Path, arrays: Mapping[str, np.ndarray]) -> None:
    """Writes an uncompressed npz atomically."""
    with atomic.replacing(path) as temporary:
        np.savez(temporary, **arrays)


def write_json(path: Path, value: Any, indent: int | None = 2) -> None:
    """Writes JSON as UTF-8 with a final newline."""
    path.write_text(json.dumps(value, indent=indent, ensure_ascii=False) + "\n", encoding="utf-8")


def _read_safetensors(path: Path) -> Tensors:
    header, data_start, data_bytes = _header(path)
    header.pop("__metadata__", None)
    entries, spans = {}, []
    for name, described in header.items():
        dtype, shape, start, stop = _described(path, name, described)
        if stop > data_bytes:
            raise UserError(
                f"{path}: {name} ends {stop - data_bytes} bytes after the end of the file: it is truncated; copy or "
                "download it again"
            )
        spans.append((start, stop, name))
        entries[name] = Entry(shape, dtype, _reader(path, dtype, shape, data_start + start))
    spans.sort()
    for (_, stop, one), (start, _, other) in itertools.pairwise(spans):
        if start < stop:
            raise UserError(f"{path}: {one} and {other} overlap: not a valid safetensors file")
    used = max((stop for _, stop, _ in spans), default=0)
    if used != data_bytes:
        raise UserError(f"{path}: {data_bytes - used} bytes after the last tensor: not a valid safetensors file")
    return Tensors(str(path), entries)


def _header(path: Path) -> tuple[dict[str, Any], int, int]:
    """The header of a safetensors file, the offset of its data, and the number of bytes of data."""
    try:
        size = path.stat().st_size
        with path.open("rb") as file:
            length = int.from_bytes(file.read(8), "little")
            if size < 8 or length > min(MAX_HEADER_BYTES, size - 8):
                raise UserError(
                    f"{path}: not a safetensors file, or a truncated one (a header of {length} bytes in a file of "
                    f"{size}); copy or download it again"
                )
            header = json.loads(file.read(length), object_pairs_hook=_without_duplicates)
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({error.strerror})") from error
    except (ValueError, RecursionError) as error:
        raise UserError(f"{path}: not a safetensors file (its header: {error})") from error
    if not isinstance(header, dict):
        raise UserError(f"{path}: not a safetensors file (its header is not an object)")
    return header, 8 + length, size - 8 - length


def _without_duplicates(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    values = dict(pairs)
    if len(values) < len(pairs):
        names = [name for name, _ in pairs]
        raise ValueError(f"{next(name for name in names if names.count(name) > 1)} appears twice")
    return values


def _described(path: Path, name: str, described: Any) -> tuple[np.dtype, tuple[int, ...], int, int]:
    """Dtype, shape, start and stop of one tensor. Raises UserError for an invalid description."""
    try:
        kind, shape, (start, stop) = described["dtype"], tuple(described["shape"]), described["data_offsets"]
    except (TypeError, KeyError, ValueError):
        raise UserError(f"{path}: {name} has no valid description: {described!r:.100}") from None
    if kind not in DTYPES:
        raise UserError(f"{path}: {name} has the type {kind!r:.30}; supported are {', '.join(DTYPES)}")
    if not all(type(n) is int and n >= 0 for n in (*shape, start, stop)):
        raise UserError(f"{path}: {name} has no valid shape and offsets: {described!r:.100}")
    if stop - start != math.prod(shape) * DTYPES[kind].itemsize:
        raise UserError(f"{path}: {name} of shape {shape} in {kind} does not fill its {stop - start} bytes")
    return DTYPES[kind], shape, start, stop


def _reader(path: Path, dtype: np.dtype, shape: tuple[int, ...], offset: int):
    def read() -> np.ndarray:
        array = np.fromfile(path, dtype.newbyteorder("<"), math.prod(shape), offset=offset)
        if array.size != math.prod(shape):
            raise UserError(f"{path}: shrank while it was read")
        return array.reshape(shape)

    return read


def read_shards(index: Path, read_one: Callable[[Path], Tensors]) -> Tensors:
    """The tensors of all files in an index (``model.safetensors.index.json``). Raises UserError."""
    try:
        file_of = json.loads(index.read_text(encoding="utf-8"))["weight_map"]
        names = sorted(set(file_of.values()))
    except OSError as error:
        raise UserError(f"{index}: cannot be read ({error.strerror})") from error
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise UserError(f"{index}: not an index of files of weights ({error})") from error
    if outside := [name for name in names if Path(name).name != name]:
        raise UserError(f"{index}: names {outside[0]}, which is not a file in the same folder")
    shards = {name: read_one(index.parent / name) for name in names}
    for tensor, name in file_of.items():
        if tensor not in shards[name]:
            raise UserError(f"{index}: {tensor} is missing from {name}")
    return Tensors(str(index), {tensor: shards[name].entries[tensor] for tensor, name in file_of.items()})


def _read_npz(path: Path) -> Tensors:
    entries = {}
    try:
        with zipfile.ZipFile(path) as archive:
            for member in archive.infolist():
                name = member.filename.removesuffix(".npy")
                with archive.open(member) as file:
                    major, _ = np.lib.format.read_magic(file)
                    reader = np.lib.format.read_array_header_1_0 if major == 1 else np.lib.format.read_array_header_2_0
                    shape, _, dtype = reader(file)
                    if dtype.hasobject:
                        raise UserError(f"{path}: {name} holds Python objects, a pickle, which is never opened here")
                    if file.tell() + math.prod(shape) * dtype.itemsize != member.file_size:
                        raise UserError(
                            f"{path}: {name} of shape {shape} does not have that many bytes; the file is damaged"
                        )
                # NumPy writes bfloat16 as two bytes without a type, as in some of big_vision's checkpoints.
                dtype = np.dtype(ml_dtypes.bfloat16) if dtype == np.dtype("V2") else dtype
                entries[name] = Entry(shape, dtype, _npz_reader(path, member, dtype))
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({error.strerror or error})") from error
    except (zipfile.BadZipFile, ValueError, EOFError, zlib.error, SyntaxError, tokenize.TokenError) as error:
        raise UserError(f"{path}: not an npz file, or a truncated one ({error})") from error
    return Tensors(str(path), entries)


def _npz_reader(path: Path, member: zipfile.ZipInfo, dtype: np.dtype):
    def read() -> np.ndarray:
        try:
            with zipfile.ZipFile(path) as archive, archive.open(member) as file:
                return np.lib.format.read_array(file, allow_pickle=False).view(dtype)
        except (OSError, ValueError, EOFError, zipfile.BadZipFile, zlib.error) as error:
            raise UserError(f"{path}: {member.filename} cannot be read ({error})") from error

    return read
