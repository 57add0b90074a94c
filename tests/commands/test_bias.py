"""``clip-jax bias`` on a small table in FairFace's layout: numbers by hand, a page, and one line for a mistake."""

import csv
import json
import shutil
from pathlib import Path

import numpy as np
import pytest

from clip_jax import load
from clip_jax.commands import main
from clip_jax.evaluation import bias
from tests.data.shards import jpeg

OLD_RUNS = Path(__file__).parents[1] / "data" / "old_runs"


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    folder = tmp_path_factory.mktemp("faces")
    shutil.copytree(OLD_RUNS / "vit", folder / "run")
    shutil.copytree(OLD_RUNS / "tokenizer", folder / "run" / "tokenizer")
    (folder / "val").mkdir()
    with (folder / "fairface_label_val.csv").open("w", newline="") as file:
        table = csv.writer(file)
        table.writerow(["file", "age", "gender", "race", "service_test"])
        for i in range(12):
            (folder / f"val/{i}.jpg").write_bytes(jpeg(i))
            race = ("East Asian", "<b>", "Black")[i % 3]
            table.writerow([f"val/{i}.jpg", "3-9", ("Male", "Female")[i % 2], race, "True"])
        table.writerow(["val/missing.jpg", "3-9", "Male", "Black", "True"])
    return folder


def audit(root, output, *more):
    model, data = f"--model={root / 'run'}", f"--data={root / 'fairface_label_val.csv'}"
    return main(["bias", model, data, f"--output={output}", "--target=gender", "--groups=race,age", *more])


def test_the_numbers_are_those_of_brute_force_and_the_page_is_escaped(root, tmp_path, capsys):
    names = ("--names=Male=a red circle,Female=a blue star", "--template=a {} person.")
    assert audit(root, tmp_path, *names, "-k4", "--query=a heart") == 0
    found = json.loads((tmp_path / "bias.json").read_text())
    model = load(root / "run")
    images = model.encode_image([jpeg(i) for i in range(12)])
    classes = model.encode_text(["a a blue star person.", "a a red circle person."])  # Female, Male
    right = (images @ classes.T).argmax(axis=1) == np.array([1, 0] * 6)
    race = np.array(["East Asian", "<b>", "Black"] * 4)
    assert found["images"] == 12 and found["skipped"] == 1 and found["accuracy"] == pytest.approx(right.mean())
    for group, values in found["by"]["race"]["groups"].items():
        assert values == {"accuracy": pytest.approx(right[race == group].mean()), "images": 4}
    assert set(found["by"]) == {"race", "age", "race x age"} and "Black x 3-9" in found["by"]["race x age"]["groups"]
    order = np.argsort(-(images @ model.encode_text("a heart")[0]))
    number = np.array([sorted(set(race)).index(r) for r in race])[order]
    skew = found["retrieval"]["race"]["a heart"]
    assert skew["max_skew@4"] == pytest.approx(bias.max_skew(number, np.full(3, 1 / 3), 4))
    assert skew["ndkl@4"] == pytest.approx(bias.ndkl(number[:4], np.full(3, 1 / 3)))
    assert all(v["low"] <= v["effect"] <= v["high"] for v in found["association"]["race"].values())
    assert found["association"]["age"] == {}  # one group has no others
    page = (tmp_path / "bias.html").read_text()
    assert "What they do not say" in page and "&lt;b&gt;" in page and "<b>" not in page.split("<main>")[1]
    assert "gap" in capsys.readouterr().out


def test_an_association_is_large_for_separate_groups_and_0_for_a_constant_model():
    rng = np.random.default_rng(0)
    x, y = np.eye(4)[:1], np.eye(4)[1:2]
    a, b = np.array([[0.9, 0.1, 0, 0]] * 20), np.array([[0.1, 0.9, 0, 0]] * 20)
    noise = 0.05 * rng.normal(size=(20, 4))
    found = bias.association(a + noise, b + noise, x, y)
    assert 1.9 < found.low <= found.effect <= found.high <= 2.0001
    assert bias.association(b + noise, a + noise, x, y).effect == pytest.approx(-found.effect)
    assert bias.association(a, a, x, y) == (0, 0, 0)
    with pytest.raises(ValueError, match="without images"):
        bias.association(a, b[:0], x, y)


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (["--target=gendre"], "no column gendre (nearest: gender)"),
        (["--target=age"], "one value"),
        (["--names=Male"], "pairs such as"),
        (["--names=Man=man"], "no value of gender"),
        (["--template=a"], "write {} once"),
        (["-k0"], "at least 1"),
    ],
)
def test_a_mistake_is_one_line(more, message, root, tmp_path, capsys):
    assert audit(root, tmp_path, *more) == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1 and message in error
