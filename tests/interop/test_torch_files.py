"""Files of torch.save: tensors come out as they went in; whatever else is in a pickle is refused and never run."""

import collections
import pickle
import zipfile

import numpy as np
import pytest

from clip_jax.errors import UserError
from clip_jax.interop import files, torch_files
from tests.interop import pickles
from tests.interop.pickles import Bag, Call, Named, tensor


def numbers(*shape, dtype=np.float32):
    return np.random.default_rng(0).normal(size=shape).astype(dtype)


def test_a_state_dict_comes_out_as_it_went_in(tmp_path):
    weight, half, count = numbers(3, 4), numbers(5, dtype=np.float16), np.array(7, np.int64)
    state = collections.OrderedDict(a=tensor(weight), b=tensor(half), c=tensor(count))
    read = torch_files.read(pickles.write(tmp_path / "model.pt", state))
    assert list(read) == ["a", "b", "c"]
    for name, array in {"a": weight, "b": half, "c": count}.items():
        assert read[name].dtype == array.dtype and read.shape(name) == array.shape
        np.testing.assert_array_equal(read[name], array)


def test_views_of_one_storage_are_read_with_their_strides(tmp_path):
    base = numbers(24)
    state = {"transposed": tensor(base, 0, (4, 6), (1, 4)), "tail": tensor(base, 20, (4,), (1,))}
    read = torch_files.read(pickles.write(tmp_path / "model.pt", state))
    np.testing.assert_array_equal(read["transposed"], base.reshape(6, 4).T)
    np.testing.assert_array_equal(read["tail"], base[20:])


def test_a_training_checkpoint_gives_its_model_without_the_optimizer(tmp_path):
    weight = numbers(2)
    checkpoint = {
        "epoch": 3,
        "state_dict": collections.OrderedDict({"module.visual.proj": tensor(weight)}),
        "optimizer": {"state": {0: {"exp_avg": tensor(numbers(2))}}, "param_groups": [{"lr": 0.1}]},
    }
    read = torch_files.read(pickles.write(tmp_path / "epoch_3.pt", checkpoint))
    assert list(read) == ["visual.proj"]


def test_a_torchscript_archive_is_flattened_to_dotted_names(tmp_path):
    weight = numbers(2, 2)
    module = Bag(training=False, visual=Bag(conv1=Bag(weight=tensor(weight))), logit_scale=tensor(numbers(1)))
    path = pickles.write(tmp_path / "ViT-B-32.pt", module, torchscript=True)
    read = torch_files.read(path)
    assert list(read) == ["visual.conv1.weight", "logit_scale"]
    np.testing.assert_array_equal(read["visual.conv1.weight"], weight)
    assert torch_files.is_torchscript(path)


@pytest.mark.parametrize(
    ("module", "name"), [("os", "system"), ("posix", "system"), ("builtins", "eval"), ("subprocess", "call")]
)
def test_a_pickle_that_would_run_code_is_refused_by_name_and_not_run(tmp_path, module, name):
    canary = tmp_path / "canary"
    command = f"open({str(canary)!r}, 'w')" if name == "eval" else f"touch '{canary}'"
    path = pickles.write(tmp_path / "model.pt", {"a": tensor(numbers(2)), "b": Call(module, name, command)})
    with pytest.raises(UserError, match=rf"{module}\.{name}"):
        torch_files.read(path)
    assert not canary.exists()


def test_the_canary_does_appear_where_the_same_pickle_is_opened_as_usual(tmp_path):
    """Otherwise the test above could not fail."""
    canary = tmp_path / "canary"
    path = pickles.write(tmp_path / "model.pt", {"b": Call("os", "system", f"touch '{canary}'")})
    with zipfile.ZipFile(path) as archive:
        pickle.loads(archive.read("archive/data.pkl"))
    assert canary.exists()


@pytest.mark.parametrize(
    "value",
    [
        Named("torch.nn.modules.linear", "Linear"),
        Named("torch._utils", "_rebuild_sparse_tensor"),
        Named("torch", "Float8_e4m3fnStorage"),
        Named("torchvision.models", "resnet50"),
        Named("os", "PathLike"),
        Named("builtins", "getattr"),
        Named("torch.hub", "load"),
    ],
)
def test_any_name_that_is_not_a_tensors_is_refused(tmp_path, value):
    with pytest.raises(UserError, match=f"{value.module}.{value.name}"):
        torch_files.read(pickles.write(tmp_path / "model.pt", {"a": value}))


def test_harmless_objects_beside_the_tensors_are_passed_over(tmp_path):
    """What trainers save with a model; nothing of it is imported or called."""
    weight = numbers(3)
    beside = {
        "args": Call("argparse", "Namespace"),
        "best": Call("numpy._core.multiarray", "scalar", Named("numpy", "dtype"), b"12345678"),
        "folder": Call("pathlib", "PosixPath", "/", "runs"),
        "started": Call("datetime", "datetime", b"0123456789"),
        "config": Call("omegaconf.dictconfig", "DictConfig"),
        "mine": Call("__main__", "Settings", 1, 2),
        "dtype": Named("torch", "bfloat16"),
        "device": Call("torch", "device", "cuda", 0),
        "schedule": Call("torch.optim.lr_scheduler", "CosineAnnealingLR"),
        "seen": Call("builtins", "set", [1, 2]),
        "history": Call("collections", "defaultdict", Named("builtins", "list")),
        "counts": Call("collections", "defaultdict", Named("__builtin__", "long")),  # int, as torch.save spells it
        "names": Call("collections", "defaultdict", Named("__builtin__", "unicode")),
        "steps": Call("__builtin__", "xrange", 0, 3, 1),
        "warmup": Call("functools", "partial", Named("__main__", "warmup")),
    }
    state = collections.OrderedDict({"visual.proj": tensor(weight)})
    read = torch_files.read(pickles.write(tmp_path / "model.pt", {"state_dict": state, **beside}))
    assert list(read) == ["visual.proj"]
    np.testing.assert_array_equal(read["visual.proj"], weight)


PREFIXES = ("module.", "_orig_mod.module.", "module.module.", "_orig_mod.", "module._orig_mod.", "model.", "")


@pytest.mark.parametrize("prefix", PREFIXES)
def test_the_names_of_a_wrapped_model_are_those_of_the_bare_one(tmp_path, prefix):
    """Compiled, parallel, averaged (with its count), sharded; in a .pt, a safetensors and an npz."""
    arrays = {f"{prefix}visual.proj": numbers(2), f"{prefix}transformer._fsdp_wrapped_module.ln.weight": numbers(3)}
    state = {name: tensor(array) for name, array in arrays.items()}
    pickles.write(tmp_path / "model.pt", state | {"n_averaged": tensor(np.array(7, np.int64))})
    files.write_safetensors(tmp_path / "model.safetensors", arrays)
    files.write_npz(tmp_path / "model.npz", arrays)
    for read in (
        torch_files.read(tmp_path / "model.pt"),
        files.read(tmp_path / "model.safetensors"),
        files.read(tmp_path / "model.npz"),
    ):
        assert set(read) == {"visual.proj", "transformer.ln.weight"}
        np.testing.assert_array_equal(read["visual.proj"], numbers(2))


def test_names_that_would_meet_stay_as_they_are(tmp_path):
    arrays = {"a._orig_mod.weight": numbers(2), "a.weight": numbers(3)}
    files.write_safetensors(tmp_path / "model.safetensors", arrays)
    assert set(files.read(tmp_path / "model.safetensors")) == set(arrays)


@pytest.mark.parametrize(
    ("offset", "shape", "strides"),
    [(0, (7,), (1,)), (1, (6,), (1,)), (0, (2, 6), (6, 1)), (-1, (2,), (1,)), (0, (2,), (-1,)), (0, (2,), (1, 1))],
)
def test_a_tensor_that_reaches_beyond_its_storage_is_an_error(tmp_path, offset, shape, strides):
    path = pickles.write(tmp_path / "model.pt", {"a": tensor(numbers(6), offset, shape, strides)})
    with pytest.raises(UserError, match="damaged"):
        torch_files.read(path)


@pytest.mark.parametrize("kept", [0.0, 0.3, 0.9, 0.999])
def test_a_truncated_file_is_one_clear_error(tmp_path, kept):
    path = pickles.write(tmp_path / "model.pt", {"a": tensor(numbers(1000))})
    data = path.read_bytes()
    path.write_bytes(data[: int(len(data) * kept)])
    with pytest.raises(UserError, match="truncated"):
        torch_files.read(path)


def test_a_tensor_whose_bytes_are_missing_or_too_few_is_an_error(tmp_path):
    path = pickles.write(tmp_path / "model.pt", {"a": tensor(numbers(8))})
    for name, replaced in (("missing", None), ("short", b"1234")):
        damaged = tmp_path / f"{name}.pt"
        with zipfile.ZipFile(path) as old, zipfile.ZipFile(damaged, "w") as new:
            for member in old.namelist():
                data = replaced if member.endswith("data/0") else old.read(member)
                if data is not None:
                    new.writestr(member, data)
        with pytest.raises(UserError, match="damaged"):
            torch_files.read(damaged)


def test_a_bare_pickle_of_old_torch_is_refused_with_the_way_out(tmp_path):
    path = tmp_path / "old.pt"
    path.write_bytes(pickle.dumps({"a": 1}))
    with pytest.raises(UserError, match="save it again"):
        torch_files.read(path)


def test_load_never_opens_a_pickle_but_names_the_command_that_converts_it(tmp_path):
    path = pickles.write(tmp_path / "model.pt", {"a": tensor(numbers(2))})
    with pytest.raises(UserError, match="clip-jax import"):
        files.read(path)
