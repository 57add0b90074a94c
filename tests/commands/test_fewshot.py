"""``clip-jax fewshot`` on features of other libraries, before the projection, and with all images."""

import shutil
from pathlib import Path

import numpy as np
import pytest

from clip_jax.commands import main
from clip_jax.evaluation import probe
from tests.data.shards import jpeg
from tests.evaluation.test_probe import blobs

OLD_RUNS = Path(__file__).parents[1] / "data" / "old_runs"


def save(folder, **arrays):
    for name, array in arrays.items():
        np.save(folder / f"{name}.npy", array)


@pytest.fixture
def files(tmp_path):
    (x, y), (x_test, y_test) = blobs(90), blobs(30, seed=1)
    save(tmp_path, x=x.astype(np.float16), y=10 * y - 10, x_test=x_test, y_test=10 * y_test - 10)
    return tmp_path


def fewshot(folder, *more, x="x", y="y"):
    return main(["fewshot", f"--features={folder / x}.npy", f"--labels={folder / y}.npy", *more])


def test_features_and_labels_of_any_library_get_the_papers_probe(files, capsys):
    test = f"--test-features={files / 'x_test.npy'}", f"--test-labels={files / 'y_test.npy'}"
    assert fewshot(files, "--shots=1,4,all", f"--head={files / 'head.npz'}", *test) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == "30 test examples, 4 classes, 6 features"
    assert [line.split()[0] for line in lines[1:4]] == ["1", "4", "all"]
    (x, y), tested = blobs(90), blobs(30, seed=1)
    found = probe.linear_probe_of(x.astype(np.float16).astype(np.float32), y, 4)
    assert lines[3].startswith(f"all 90 examples  {found.head.accuracy(*tested):.4f}  (C = {found.c:.3g}, ")
    head = np.load(files / "head.npz")
    assert head["class_names"].tolist() == ["-10", "0", "10", "20"]
    np.testing.assert_allclose(head["weights"], found.head.weights, atol=1e-5)
    assert lines[4] == f"{files / 'head.npz'}: logits = features @ weights + bias" and len(lines) == 5


def test_without_test_features_a_fifth_of_each_class_is_held_out(files, capsys):
    assert fewshot(files, "--shots=all") == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].startswith("16 test examples") and lines[1].startswith("all 74 examples") and len(lines) == 2


@pytest.mark.parametrize(
    ("changed", "more", "message"),
    [
        ({"y": np.arange(7)}, (), "has 90 examples and"),
        ({"x": np.zeros((90, 2, 3), np.float32)}, (), "float32[90, 2, 3]; features are float32[examples, features]"),
        ({"x": np.full((90, 2), np.nan, np.float32)}, (), "90 of 90 rows are not finite, the first is 0"),
        ({"y": np.zeros(90)}, (), "float64[90]; labels are int64[examples]"),
        ({"y": np.zeros(90, int)}, (), "all examples have the label 0"),
        ({"x": np.array([None])}, (), "not an array of NumPy"),
        ({"x_test": np.zeros((30, 5), np.float32)}, ("x_test", "y_test"), "5 features, but those to fit on have 6"),
        ({"y_test": np.full(30, 7)}, ("x_test", "y_test"), "label 7 is not among those to fit on"),
        ({}, ("x_test", "nothing"), "nothing.npy: No such file"),
    ],
)
def test_arrays_that_do_not_fit_are_one_line(files, capsys, changed, more, message):
    save(files, **changed)
    test = [f"--test-{name}={files / file}.npy" for name, file in zip(("features", "labels"), more, strict=False)]
    assert fewshot(files, *test) == 2
    error = capsys.readouterr().err
    assert message in error and error.count("\n") == 1


def test_mistakes_of_arguments_are_one_line(files, capsys):
    x = f"--features={files / 'x.npy'}"
    for arguments, message in (
        ([x], "give --model and --data, or --features and --labels"),
        (["--model=runs/demo"], "give --model and --data, or --features and --labels"),
        ([x, f"--labels={files / 'y.npy'}", "--template={}"], "give --model and --data, or --features and --labels"),
        ([x, f"--labels={files / 'y.npy'}", f"--test-labels={files / 'y.npy'}"], "both or neither"),
        ([x, f"--labels={files / 'nothing.npy'}"], "nothing.npy: No such file"),
        (["--model=m", "--data=folder:x", "--pooled", "--head=h"], "leave out --pooled"),
    ):
        assert main(["fewshot", *arguments]) == 2
        error = capsys.readouterr().err
        assert message in error and error.count("\n") == 1


@pytest.mark.slow
def test_pooled_features_are_compared_with_the_zero_shot_accuracy_of_embeddings(tmp_path, capsys):
    shutil.copytree(OLD_RUNS / "vit", tmp_path / "run")
    shutil.copytree(OLD_RUNS / "tokenizer", tmp_path / "run" / "tokenizer")
    for i in range(20):
        path = tmp_path / "photos" / ("one", "two")[i % 2] / f"{i}.jpg"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(jpeg(i))
    command = ["fewshot", f"--model={tmp_path / 'run'}", f"--data=folder:{tmp_path / 'photos'}", "--shots=1"]
    found = []
    for more in ([], ["--pooled"]):
        assert main([*command, *more]) == 0
        found.append(capsys.readouterr().out.splitlines())
    assert found[0][0] == found[1][0] and found[0][0].startswith("zero-shot ")
    assert [line.split(",")[0] for line in found[0][1:3]] != [line.split(",")[0] for line in found[1][1:3]]
