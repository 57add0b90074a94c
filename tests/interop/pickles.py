"""Files as torch writes them, made by hand: the project has no torch, and a hostile one could not be had from it."""

import collections
import pickle
import zipfile
from pathlib import Path
from typing import ClassVar

import numpy as np

STORAGES = {
    np.dtype(np.float32): "FloatStorage",
    np.dtype(np.float16): "HalfStorage",
    np.dtype(np.int64): "LongStorage",
}


class Named:
    """Pickled as a global of that name, whether or not it exists here."""

    def __init__(self, module: str, name: str):
        self.module, self.name = module, name


class Call:
    """Pickled as a call of that global: what makes a pickle a program."""

    def __init__(self, module: str, name: str, *arguments):
        self.function, self.arguments = Named(module, name), arguments

    def __reduce__(self):
        return _PLACEHOLDER, self.arguments


def _PLACEHOLDER(*_):
    raise AssertionError("never called: it only stands for a name while pickling")


class Pickler(pickle._Pickler):
    """The pickler in Python, which lets a global be written without importing it."""

    dispatch: ClassVar = dict(pickle._Pickler.dispatch)

    def __init__(self, file):
        super().__init__(file, protocol=2)
        self.arrays: list[np.ndarray] = []

    def persistent_id(self, value):
        if isinstance(value, np.ndarray):
            self.arrays.append(value)
            key = str(len(self.arrays) - 1)
            return ("storage", Named("torch", STORAGES[value.dtype]), key, "cpu", value.size)
        return None

    def save_named(self, value):
        self.write(pickle.GLOBAL + f"{value.module}\n{value.name}\n".encode())

    def save_call(self, value):
        self.save_named(value.function)
        self.save(value.arguments)
        self.write(pickle.REDUCE)

    def save_bag(self, value):
        self.write(pickle.GLOBAL + f"{value.module}\nModule\n".encode())
        self.write(pickle.EMPTY_TUPLE + pickle.NEWOBJ)
        self.save(value.attributes)
        self.write(pickle.BUILD)


class Bag:
    """An object of a TorchScript archive."""

    def __init__(self, **attributes):
        self.module, self.attributes = "__torch__.model.___torch_mangle_1", attributes


Pickler.dispatch |= {Named: Pickler.save_named, Call: Pickler.save_call, Bag: Pickler.save_bag}


def tensor(array: np.ndarray, offset=0, shape=None, strides=None) -> Call:
    """What torch pickles for a tensor; the array is its storage."""
    shape = array.shape if shape is None else shape
    strides = tuple(s // array.itemsize for s in array.strides) if strides is None else strides
    hooks = collections.OrderedDict()
    return Call("torch._utils", "_rebuild_tensor_v2", array, offset, tuple(shape), tuple(strides), False, hooks)


def write(path: Path, value, *, torchscript: bool = False) -> Path:
    """``torch.save(value, path)``."""
    with zipfile.ZipFile(path, "w") as archive:
        with archive.open("archive/data.pkl", "w") as file:
            pickler = Pickler(file)
            pickler.dump(value)
        for key, array in enumerate(pickler.arrays):
            archive.writestr(f"archive/data/{key}", np.ascontiguousarray(array).tobytes())
        archive.writestr("archive/byteorder", "little")
        if torchscript:
            archive.writestr("archive/constants.pkl", b"")
    return path


def write_torchscript(path: Path, arrays: dict[str, np.ndarray]) -> Path:
    """The archive of a module with these tensors, as OpenAI published CLIP."""
    root = {}
    for name, array in arrays.items():
        *modules, last = name.split(".")
        node = root
        for module in modules:
            node = node.setdefault(module, {})
        node[last] = tensor(array)

    def bag(node):
        return Bag(**{name: bag(below) if isinstance(below, dict) else below for name, below in node.items()})

    return write(path, bag(root), torchscript=True)
