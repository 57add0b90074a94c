"""Safetensors and npz files: read as their own libraries read them; a damaged one is one clear error."""

import json
import zipfile

import ml_dtypes
import numpy as np
import pytest
import safetensors.numpy

from clip_jax.errors import UserError
from clip_jax.interop import files

ARRAYS = {
    "weight": np.random.default_rng(0).normal(size=(3, 5)).astype(np.float32),
    "half": np.arange(4, dtype=np.float16),
    "brain": np.arange(6).astype(ml_dtypes.bfloat16).reshape(2, 3),
    "scalar": np.array(2.5, np.float32),
    "ids": np.arange(3, dtype=np.int64),
    "empty": np.zeros((0, 4), np.float32),
}


@pytest.fixture
def path(tmp_path):
    files.write_safetensors(tmp_path / "model.safetensors", ARRAYS)
    return tmp_path / "model.safetensors"


def equal(read, expected):
    assert set(read) == set(expected)
    for name, array in expected.items():
        assert read[name].dtype == array.dtype and read.shape(name) == array.shape == read[name].shape
        np.testing.assert_array_equal(read[name], array)


def test_what_is_written_the_library_reads_and_what_it_writes_is_read(tmp_path, path):
    equal(files.read(path), ARRAYS)
    np.testing.assert_array_equal(safetensors.numpy.load_file(path)["weight"], ARRAYS["weight"])
    safetensors.numpy.save_file(ARRAYS, tmp_path / "theirs.safetensors")
    equal(files.read(tmp_path / "theirs.safetensors"), ARRAYS)
    assert not list(tmp_path.glob(".*"))


def raw(header, data=b"", length=None):
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return (len(text) if length is None else length).to_bytes(8, "little") + text + data


def one(**changes):
    return {"a": {"dtype": "F32", "shape": [2], "data_offsets": [0, 8]} | changes}


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "truncated"),
        (b"1234", "truncated"),
        (raw(one(), b"12345678", length=1 << 40), "truncated"),
        (raw(b"{", b""), "header"),
        (raw(b"[" * 100_000), "header"),
        (raw([1, 2]), "not an object"),
        (raw(one(), b"1234567"), "truncated"),
        (raw(one(), b"123456789"), "after the last tensor"),
        (raw(one(dtype="O"), b"12345678"), "type 'O'"),
        (raw(one(shape=[3]), b"12345678"), "does not fill"),
        (raw(one(shape=[-2]), b"12345678"), "valid shape"),
        (raw(one(shape=[2.0]), b"12345678"), "valid shape"),
        (raw(one(data_offsets=[-8, 0]), b"12345678"), "valid shape"),
        (raw(one(data_offsets=[0]), b"12345678"), "valid description"),
        (raw({"a": 3}), "valid description"),
        (raw({**one(), "b": one()["a"]}, b"12345678"), "overlap"),
        (raw(json.dumps(one()).encode()[:-1] + b"," + json.dumps(one()).encode()[1:], b"12345678"), "twice"),
    ],
)
def test_a_damaged_safetensors_file_is_one_error_that_says_what_is_wrong(tmp_path, content, message):
    file = tmp_path / "bad.safetensors"
    file.write_bytes(content)
    with pytest.raises(UserError, match=message) as caught:
        files.read(file)
    assert str(file) in str(caught.value) and "\n" not in str(caught.value)


def test_a_safetensors_file_cut_off_anywhere_is_an_error(tmp_path, path):
    data = path.read_bytes()
    for kept in range(0, len(data), 7):
        cut = tmp_path / "cut.safetensors"
        cut.write_bytes(data[:kept])
        with pytest.raises(UserError):
            files.read(cut)


def test_shards_are_read_as_one(tmp_path):
    first, second = {"weight": ARRAYS["weight"]}, {k: v for k, v in ARRAYS.items() if k != "weight"}
    files.write_safetensors(tmp_path / "model-1.safetensors", first)
    files.write_safetensors(tmp_path / "model-2.safetensors", second)
    file_of = dict.fromkeys(first, "model-1.safetensors") | dict.fromkeys(second, "model-2.safetensors")
    index = tmp_path / "model.safetensors.index.json"
    index.write_text(json.dumps({"weight_map": file_of}))
    equal(files.read(index), ARRAYS)

    index.write_text(json.dumps({"weight_map": file_of | {"weight": "model-2.safetensors"}}))
    with pytest.raises(UserError, match="weight is missing from model-2"):
        files.read(index)
    index.write_text(json.dumps({"weight_map": {"weight": "../model-1.safetensors"}}))
    with pytest.raises(UserError, match="not a file in the same folder"):
        files.read(index)


def test_npz_is_read_without_pickle(tmp_path):
    arrays = {"params/a/b": ARRAYS["weight"], "params/t": np.ones(1, np.float32), "brain": ARRAYS["brain"]}
    np.savez(tmp_path / "model.npz", **arrays)
    equal(files.read(tmp_path / "model.npz"), arrays)
    np.savez_compressed(tmp_path / "small.npz", **arrays)
    equal(files.read(tmp_path / "small.npz"), arrays)


class Canary:
    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return open, (str(self.path), "w")


def test_an_npz_that_would_run_code_is_refused(tmp_path):
    canary = tmp_path / "canary"
    np.savez(tmp_path / "bad.npz", a=np.array([Canary(canary)], object))
    with pytest.raises(UserError, match="pickle"):
        files.read(tmp_path / "bad.npz")
    assert not canary.exists()


def test_a_damaged_npz_is_an_error(tmp_path):
    np.savez(tmp_path / "model.npz", a=ARRAYS["weight"])
    data = (tmp_path / "model.npz").read_bytes()
    for kept in (0, 10, len(data) // 2, len(data) - 1):
        (tmp_path / "cut.npz").write_bytes(data[:kept])
        with pytest.raises(UserError, match="truncated"):
            files.read(tmp_path / "cut.npz")
    with zipfile.ZipFile(tmp_path / "text.npz", "w") as archive:
        archive.writestr("a.npy", "not an array")
    with pytest.raises(UserError, match="npz"):
        files.read(tmp_path / "text.npz")


def test_a_file_that_is_not_there_or_is_not_weights_is_an_error(tmp_path):
    with pytest.raises(UserError, match="No such file"):
        files.read(tmp_path / "none.safetensors")
    with pytest.raises(UserError, match=r"not a file of weights"):
        files.read(tmp_path / "model.onnx")
