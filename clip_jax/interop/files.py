"""Files of tensors that hold nothing but tensors: safetensors and npz, in and out.

Neither torch nor pickle is involved; a file that would need them (``.pt``, ``.bin``) is named as such, and
``clip-jax import`` turns it into one that does not (``torch_files.py``).

The header of a safetensors file is checked here, not by the library: its reader maps the file, so that every page it
touches counts as this process's memory, and it takes the last of two tensors with one name. Formats:
https://huggingface.co/docs/safetensors and https://numpy.org/neps/nep-0001-npy-format.html
"""

import itertools
import json
import math
import os
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
from clip_jax.interop.state import Entry, State

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
    """Whether it is, or names, what only ``clip-jax import`` opens."""
    return path.name.removesuffix(INDEX).endswith(PICKLED)


def read(path: str | Path) -> State:
    """The tensors of a ``.safetensors``, ``.safetensors.index.json`` or ``.npz`` file. Raises UserError."""
    path = Path(path)
    if is_pickled(path):
        raise UserError(f"{path}: a pickle, which is never opened here; `clip-jax import {path} --to=DIR` converts it")
    if path.name.endswith(INDEX):
        return read_shards(path, _read_safetensors)
    if path.suffix == ".safetensors":
        return _read_safetensors(path)
    if path.suffix == ".npz":
        return _read_npz(path)
    raise UserError(f"{path}: not a file of weights that is known (.safetensors, .safetensors.index.json, .npz)")


def write_safetensors(path: Path, arrays: Mapping[str, np.ndarray], metadata: dict[str, str] | None = None) -> None:
    """Writes the file in one go: it appears whole or not at all. ``format: pt`` is what Transformers insists on."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    contiguous = {name: np.ascontiguousarray(x).reshape(x.shape) for name, x in arrays.items()}
    try:
        save_file(contiguous, temporary, {"format": "pt", **(metadata or {})})
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)


def write_npz(path: Path, arrays: Mapping[str, np.ndarray]) -> None:
    """An uncompressed npz, in one go."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}.npz")
    try:
        np.savez(temporary, **arrays)
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)


def _read_safetensors(path: Path) -> State:
    header, data_start, data_bytes = _header(path)
    header.pop("__metadata__", None)
    entries, spans = {}, []
    for name, described in header.items():
        dtype, shape, start, stop = _described(path, name, described)
        if stop > data_bytes:
            raise UserError(
                f"{path}: {name} ends {stop - data_bytes} bytes behind the end of the file: it is truncated; copy or "
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
        raise UserError(f"{path}: {data_bytes - used} bytes behind the last tensor: not a valid safetensors file")
    return State(str(path), entries)


def _header(path: Path) -> tuple[dict[str, Any], int, int]:
    """The header of a safetensors file, where its data starts, and how many bytes of data the file has."""
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
        raise ValueError(f"{next(name for name in names if names.count(name) > 1)} comes twice")
    return values


def _described(path: Path, name: str, described: Any) -> tuple[np.dtype, tuple[int, ...], int, int]:
    """One tensor's dtype, shape, start and stop, or a UserError that says what is wrong with them."""
    try:
        kind, shape, (start, stop) = described["dtype"], tuple(described["shape"]), described["data_offsets"]
    except (TypeError, KeyError, ValueError):
        raise UserError(f"{path}: {name} is not described as safetensors does it: {described!r:.100}") from None
    if kind not in DTYPES:
        raise UserError(f"{path}: {name} has the type {kind!r:.30}; known are {', '.join(DTYPES)}")
    if not all(type(n) is int and n >= 0 for n in (*shape, start, stop)):
        raise UserError(f"{path}: {name} has no valid shape and place: {described!r:.100}")
    if stop - start != math.prod(shape) * DTYPES[kind].itemsize:
        raise UserError(f"{path}: {name} of shape {shape} in {kind} does not fill its {stop - start} bytes")
    return DTYPES[kind], shape, start, stop


def _reader(path: Path, dtype: np.dtype, shape: tuple[int, ...], offset: int):
    def read() -> np.ndarray:
        array = np.fromfile(path, dtype.newbyteorder("<"), math.prod(shape), offset=offset)
        if array.size != math.prod(shape):
            raise UserError(f"{path}: became shorter while it was read")
        return array.reshape(shape)

    return read


def read_shards(index: Path, read_one: Callable[[Path], State]) -> State:
    """The files that an index (``model.safetensors.index.json``) names, as one. Raises UserError."""
    try:
        places = json.loads(index.read_text(encoding="utf-8"))["weight_map"]
        names = sorted(set(places.values()))
    except OSError as error:
        raise UserError(f"{index}: cannot be read ({error.strerror})") from error
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise UserError(f"{index}: not an index of files of weights ({error})") from error
    if outside := [name for name in names if Path(name).name != name]:
        raise UserError(f"{index}: names {outside[0]}, which is not a file beside it")
    shards = {name: read_one(index.parent / name) for name in names}
    for tensor, name in places.items():
        if tensor not in shards[name]:
            raise UserError(f"{index}: {tensor} should be in {name} and is not there")
    return State(str(index), {tensor: shards[name].entries[tensor] for tensor, name in places.items()})


def _read_npz(path: Path) -> State:
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
                        raise UserError(f"{path}: {name} of shape {shape} does not fill its place; the file is damaged")
                # NumPy writes bfloat16 as two bytes of no type; big_vision stores some of its checkpoints so.
                dtype = np.dtype(ml_dtypes.bfloat16) if dtype == np.dtype("V2") else dtype
                entries[name] = Entry(shape, dtype, _npz_reader(path, member, dtype))
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({error.strerror or error})") from error
    except (zipfile.BadZipFile, ValueError, EOFError, zlib.error, SyntaxError, tokenize.TokenError) as error:
        raise UserError(f"{path}: not an npz file, or a truncated one ({error})") from error
    return State(str(path), entries)


def _npz_reader(path: Path, member: zipfile.ZipInfo, dtype: np.dtype):
    def read() -> np.ndarray:
        try:
            with zipfile.ZipFile(path) as archive, archive.open(member) as file:
                return np.lib.format.read_array(file, allow_pickle=False).view(dtype)
        except (OSError, ValueError, EOFError, zipfile.BadZipFile, zlib.error) as error:
            raise UserError(f"{path}: {member.filename} cannot be read ({error})") from error

    return read
