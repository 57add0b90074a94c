"""Reads the tensors of ``.pt``, ``.bin`` and TorchScript archives without torch.

Only ``clip-jax import`` uses this. Such a file is a zip of a pickle and the bytes of its tensors, and a pickle is a
program. This unpickler accepts only a few harmless names (``ALLOWED``) and stops at any other, before anything is
called. The classes of a TorchScript archive (``__torch__...``) become bags of attributes without any behavior, and the
settings, dates and schedules that trainers save beside a model (``DATA``) become nothing at all.
"""

import io
import math
import pickle
import zipfile
from collections import OrderedDict
from pathlib import Path
from typing import Any, NamedTuple

import ml_dtypes
import numpy as np

from clip_jax.errors import UserError
from clip_jax.interop.tensors import Entry, Tensors, unwrapped_names

MAX_PICKLE_BYTES = 64 << 20  # The pickle holds names and shapes: 0.3 MB for the largest CLIP.

STORAGES = {
    "DoubleStorage": np.dtype(np.float64),
    "FloatStorage": np.dtype(np.float32),
    "HalfStorage": np.dtype(np.float16),
    "BFloat16Storage": np.dtype(ml_dtypes.bfloat16),
    "LongStorage": np.dtype(np.int64),
    "IntStorage": np.dtype(np.int32),
    "ShortStorage": np.dtype(np.int16),
    "CharStorage": np.dtype(np.int8),
    "ByteStorage": np.dtype(np.uint8),
    "BoolStorage": np.dtype(np.bool_),
}

WRAPPERS = ("state_dict", "model_state_dict", "model", "module")
"""The keys under which training checkpoints store the model; the rest (optimizer, epoch) is not read."""


class _Storage(NamedTuple):
    dtype: np.dtype
    key: str
    size: int


class _Tensor(NamedTuple):
    storage: _Storage
    offset: int
    shape: tuple[int, ...]
    strides: tuple[int, ...]


class _Bag:
    """An object of a TorchScript archive: attributes without methods."""


class _Nothing:
    """Stands for an object that is not a tensor: takes whatever its pickle does with it, and keeps nothing."""

    def __new__(cls, *_, **__):
        return object.__new__(cls)

    def __init__(self, *_, **__): ...

    def __call__(self, *_, **__):
        return self

    def __setstate__(self, _): ...

    def __setitem__(self, _, __): ...

    def append(self, _): ...

    def extend(self, _): ...

    def add(self, _): ...


def _tensor(storage, offset, shape, strides, requires_grad=False, hooks=None, metadata=None) -> _Tensor:
    del requires_grad, hooks, metadata
    tensor = _Tensor(storage, offset, tuple(shape), tuple(strides))
    numbers = (offset, *tensor.shape, *tensor.strides)
    if not isinstance(storage, _Storage) or not all(type(n) is int and n >= 0 for n in numbers):
        raise pickle.UnpicklingError("a tensor without a valid shape")
    if len(tensor.shape) != len(tensor.strides):
        raise pickle.UnpicklingError("a tensor whose strides do not match its dimensions")
    last = offset + sum((n - 1) * stride for n, stride in zip(tensor.shape, tensor.strides, strict=True))
    if math.prod(tensor.shape) and last >= storage.size:
        raise pickle.UnpicklingError("a tensor that exceeds its storage")
    return tensor


def _same(value, *_) -> Any:
    return value


ALLOWED = {
    ("collections", "OrderedDict"): OrderedDict,
    ("torch._utils", "_rebuild_tensor_v2"): _tensor,
    ("torch._utils", "_rebuild_parameter"): _same,
    ("torch", "Size"): tuple,
    ("torch.jit._pickle", "build_intlist"): list,
    ("torch.jit._pickle", "restore_type_tag"): _same,
}


DATA = (
    *("argparse", "collections", "datetime", "decimal", "enum", "functools", "pathlib", "types", "typing", "uuid"),
    *("easydict", "ml_collections", "numpy", "omegaconf", "yacs"),
    *("torch.optim", "torch.amp", "torch.cuda.amp", "torch.torch_version"),
    *("copyreg", "_codecs", "__main__"),
)
"""Modules whose objects lie beside the tensors of training checkpoints. Nothing of theirs is imported or called, only
``_Nothing`` is; so this is a list of what is expected, and what is not stops the reading."""
BUILTINS = (
    *("bool", "bytearray", "bytes", "complex", "dict", "float", "frozenset", "int", "list"),
    *("object", "range", "set", "slice", "str", "tuple"),
    *("Ellipsis", "NotImplemented", "long", "unicode", "xrange"),  # protocol 2, torch.save's, has Python 2's names
)


def _is_data(module: str, name: str) -> bool:
    if module in ("builtins", "__builtin__"):
        return name in BUILTINS
    if module == "torch":  # dtypes, devices, layouts; an unknown storage would be a tensor that is left out
        return not name.endswith("Storage")
    return any(f"{module}.".startswith(f"{known}.") for known in DATA)


class _Unpickler(pickle.Unpickler):
    def find_class(self, module: str, name: str) -> Any:
        if (module, name) in ALLOWED:
            return ALLOWED[module, name]
        if module == "torch" and name in STORAGES:
            return STORAGES[name]
        if module.startswith("__torch__."):
            return type(name, (_Bag,), {})
        if _is_data(module, name):
            return type(name.split(".")[-1], (_Nothing,), {})
        raise _Refused(f"{module}.{name}")

    def persistent_load(self, pid: Any) -> _Storage:
        kind, dtype, key, _, size = pid
        if kind != "storage" or not isinstance(dtype, np.dtype) or not isinstance(key, str) or type(size) is not int:
            raise pickle.UnpicklingError(f"not a storage: {pid!r:.100}")
        return _Storage(dtype, key, size)


class _Refused(Exception):
    pass


def read(path: str | Path) -> Tensors:
    """The tensors of a file written by torch. Raises UserError, naming the reason, if it holds anything else."""
    path = Path(path)
    found = _unpickle(path)
    tensors = _flatten(_model(found.root))
    if not tensors:
        raise UserError(f"{path}: holds no tensors")
    entries = {}
    for bare, name in unwrapped_names(tensors).items():
        tensor = tensors[name]
        member = found.members.get(f"{found.folder}data/{tensor.storage.key}")
        if member is None:
            raise UserError(f"{path}: the data of {name} is missing; the file is damaged")
        if member.compress_type != zipfile.ZIP_STORED or member.file_size != _storage_bytes(tensor.storage):
            raise UserError(f"{path}: the data of {name} has the wrong size; the file is damaged")
        entries[bare] = Entry(tensor.shape, tensor.storage.dtype, _reader(path, member.filename, tensor))
    return Tensors(str(path), entries)


class _Archive(NamedTuple):
    root: Any
    members: dict[str, zipfile.ZipInfo]
    folder: str
    """The prefix of the name of every member."""


def is_torchscript(path: str | Path) -> bool:
    """Whether the file is a TorchScript archive, as OpenAI published CLIP."""
    try:
        with zipfile.ZipFile(path) as archive:
            return any(name.endswith("/constants.pkl") for name in archive.namelist())
    except (OSError, zipfile.BadZipFile):
        return False


def _unpickle(path: Path) -> _Archive:
    try:
        with zipfile.ZipFile(path) as archive:
            members = {member.filename: member for member in archive.infolist()}
            pickles = [name for name in members if name == "data.pkl" or name.endswith("/data.pkl")]
            if len(pickles) != 1:
                raise UserError(f"{path}: not a file of torch.save (a zip with one data.pkl)")
            folder = pickles[0].removesuffix("data.pkl")
            order = members.get(f"{folder}byteorder")
            if order is not None and archive.read(order).strip() != b"little":
                raise UserError(f"{path}: was written on a big-endian machine, which is not supported")
            if members[pickles[0]].file_size > MAX_PICKLE_BYTES:
                raise UserError(f"{path}: its pickle is larger than that of any model, and was not opened")
            return _Archive(_Unpickler(io.BytesIO(archive.read(pickles[0]))).load(), members, folder)
    except _Refused as refused:
        raise UserError(
            f"{path}: refused, because its pickle needs {refused}, which is not a tensor; none of it was run. "
            "Save only the state_dict, as safetensors, where the file was made"
        ) from None
    except zipfile.BadZipFile as error:
        raise UserError(
            f"{path}: not a zip of torch.save (truncated, or older than PyTorch 1.6: save it again): {error}"
        ) from error
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({error.strerror or error})") from error
    except Exception as error:  # A hostile pickle can raise anything from the unpickler's own operations.
        if isinstance(error, UserError):
            raise
        raise UserError(f"{path}: its pickle is damaged ({type(error).__name__}: {error})") from error


def _model(root: Any) -> Any:
    if isinstance(root, dict):
        for name in WRAPPERS:
            if isinstance(root.get(name), dict):
                return root[name]
    return root


def _flatten(value: Any) -> dict[str, _Tensor]:
    """The tensors of nested dicts and bags under dotted names; other values are not weights and are skipped."""
    tensors, stack, seen = {}, [("", value)], set()
    while stack:
        prefix, value = stack.pop()
        if isinstance(value, _Tensor):
            tensors[prefix.removesuffix(".")] = value
            continue
        children = value if isinstance(value, dict) else vars(value) if isinstance(value, _Bag) else {}
        if children and id(value) not in seen:  # A pickle can contain itself.
            seen.add(id(value))
            stack += [(f"{prefix}{name}.", child) for name, child in reversed(list(children.items()))]
    return tensors


def _storage_bytes(storage: _Storage) -> int:
    return storage.size * storage.dtype.itemsize


def _reader(path: Path, member: str, tensor: _Tensor):
    def read() -> np.ndarray:
        try:
            with zipfile.ZipFile(path) as archive:
                data = np.frombuffer(archive.read(member), tensor.storage.dtype)
        except (OSError, zipfile.BadZipFile) as error:
            raise UserError(f"{path}: {member} cannot be read ({error})") from error
        strides = tuple(stride * data.itemsize for stride in tensor.strides)
        # Shape and strides were checked against the storage, and the storage against the file.
        return np.lib.stride_tricks.as_strided(data[tensor.offset :], tensor.shape, strides, writeable=False).copy()

    return read
