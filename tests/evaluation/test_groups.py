"""Sets whose images belong to groups, and words with associated pictures, in the layouts that are published."""

import io
import json
import shutil

import numpy as np
import pytest

from clip_jax import load
from clip_jax.commands import main
from clip_jax.evaluation import groups, winogavil, zero_shot
from tests.data.shards import jpeg, write_shard

WORDS = ("red circle", "blue star", "green heart", "pink ring", "black cross", "yellow square")
LABELS, REGIONS = [i % 6 for i in range(14)], [0, 0, 0, 1, 1, 1, 1, 5, 5, 2, 2, 2, 2, 2]
CUES = (
    ("owl", (0, 1, 2, 3, 4), (1, 3)),
    ("Moon", tuple(range(10)), (0, 5, 9)),
    ("dog", (7, 8, 9, 10, 11, 99), (7, 99)),  # one of its pictures is missing
)


def npy(*values) -> bytes:
    file = io.BytesIO()
    np.save(file, np.array(values))
    return file.getvalue()


def write_grouped(folder):
    (folder / "test").mkdir(parents=True)
    samples = [
        {"cls": str(label).encode(), "jpg": jpeg(i), "npy": npy(region, 7, label)}
        for i, (label, region) in enumerate(zip(LABELS, REGIONS, strict=True))
    ]
    for shard, part in enumerate((samples[:6], samples[6:])):
        write_shard(folder / "test" / f"{shard}.tar", part)
    (folder / "test" / "nshards.txt").write_text("2")
    (folder / "classnames.txt").write_text("\n".join(WORDS))
    (folder / "zeroshot_classification_templates.txt").write_text("a {c}\n")


def write_winogavil(folder, ending="csv"):
    (folder / "winogavil_images").mkdir(parents=True)
    for i in range(12):
        (folder / f"winogavil_images/{i}.jpg").write_bytes(jpeg(i))
    rows = [
        {"cue": cue, "candidates": [str(i) for i in candidates], "associations": [str(i) for i in associated]}
        for cue, candidates, associated in CUES
    ]
    if ending == "jsonl":
        (folder / "winogavil.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    else:
        lines = [f'{i},{r["cue"]},"{r["candidates"]}","{r["associations"]}"' for i, r in enumerate(rows)]
        (folder / "winogavil_dataset.csv").write_text("\n".join(("ID,cue,candidates,associations", *lines)))


@pytest.fixture(scope="module")
def found(run, tmp_path_factory):
    root = tmp_path_factory.mktemp("sets")
    write_grouped(root / "wds_wilds-fmow_test")
    write_winogavil(root / "any name")
    command = ["evaluate", f"--model={run}", "--suite=datacomp38", f"--data={root}", f"--output={root / 'out'}"]
    assert main(command) == 0
    return {path.stem: json.loads(path.read_text()) for path in (root / "out").glob("*/*.json")}, root


def test_the_worst_region_is_that_of_the_lowest_accuracy_without_other(found, run):
    record, model = found[0]["wilds-fmow"], load(run)
    images = model.encode_image([jpeg(i) for i in (*range(6), *range(8))])  # pictures of a shard count from 0
    predicted = (images @ model.encode_text([f"a {name}" for name in WORDS]).T).argmax(axis=1)
    hits = predicted == np.array(LABELS)
    by_region = {g: hits[np.array(REGIONS) == g].mean() for g in (0, 1, 2)}
    assert record["metrics"]["worst_region_top1"] == pytest.approx(min(by_region.values()))
    assert record["metrics"]["top1"] == record["metrics"]["worst_year_top1"] == pytest.approx(hits.mean())
    assert record["main_metric"] == "worst_region_top1" and record["examples"] == 14
    table = {name: (top1, count) for name, top1, count in record["details"]["by_group"]}
    assert table == {f"region {g}": (pytest.approx(by_region[g]), REGIONS.count(g)) for g in by_region} | {
        "year 7": (pytest.approx(hits.mean()), 14)
    }


def test_a_group_without_images_has_no_accuracy_and_top_5_needs_five_classes():
    judged = zero_shot.judge(np.eye(4)[:2], np.array([0, 0]), np.eye(4))
    metrics, table = groups.worst(judged, np.array([[5, 1], [5, 2]]), groups.SETS["wilds-fmow"])
    assert metrics == {
        "worst_region_top1": None, "worst_region_top5": None, "worst_year_top1": 0.0, "worst_year_top5": None,
    }  # fmt: skip
    assert table == [("year 1", 1.0, 1), ("year 2", 0.0, 1)]


def test_as_many_pictures_as_are_associated_are_the_answer(found, run):
    record, model = found[0]["winogavil"], load(run)
    pictures = model.encode_image([jpeg(i) for i in range(12)])
    expected = []
    for (_, candidates, associated), text in zip(CUES[:2], ("An owl", "A moon"), strict=True):
        cosines = pictures[list(candidates)] @ model.encode_text([text])[0]
        answer = {candidates[i] for i in np.argsort(-cosines)[: len(associated)]}
        expected.append(len(answer & set(associated)) / len(answer | set(associated)))
    assert record["metrics"]["jaccard"] == pytest.approx(np.mean(expected))
    assert record["metrics"]["jaccard_5_6"] == pytest.approx(expected[0])
    assert record["metrics"]["jaccard_10_12"] == pytest.approx(expected[1])
    assert (record["examples"], record["skipped"], record["metrics"]["rows_left_out"]) == (2, 1, 1)


def test_the_jaccard_index_is_intersection_over_union():
    rng = np.random.default_rng(0)
    for count in (2, 3, 5):
        cosines, right = rng.normal(size=10), set(rng.permutation(10)[:count].tolist())
        answer = set(np.argsort(cosines)[-count:].tolist())
        expected = len(answer & right) / len(answer | right)
        assert winogavil.jaccard(cosines, np.isin(np.arange(10), list(right))) == pytest.approx(expected)
    assert winogavil.jaccard(np.zeros(4), np.array([True, False, False, False])) == 0.0  # ties: against the model


def test_both_forms_of_its_table_are_read_alike(tmp_path):
    for ending in ("csv", "jsonl"):
        write_winogavil(tmp_path / ending, ending)
    csv, jsonl = (winogavil.open_winogavil(tmp_path / ending) for ending in ("csv", "jsonl"))
    assert csv.cues == jsonl.cues and len(csv) == len(jsonl) == 13
    for ours, theirs in zip((*csv.candidates, *csv.associated), (*jsonl.candidates, *jsonl.associated), strict=True):
        np.testing.assert_array_equal(ours, theirs)


def spoil_npy(folder, data):
    write_shard(folder / "test" / "1.tar", [{"jpg": jpeg(0), "cls": b"1", "npy": data}])


@pytest.mark.parametrize(
    ("write", "spoil", "message"),
    [
        (write_grouped, lambda f: spoil_npy(f, b"x"), "not an array"),
        (write_grouped, lambda f: spoil_npy(f, npy(0.5, 1.5, 2.5)), "it needs a list of whole numbers, the groups"),
        (write_grouped, lambda f: spoil_npy(f, npy(1)), "different shapes"),
        (
            write_grouped,
            lambda f: write_shard(f / "test" / "1.tar", [{"jpg": jpeg(0), "npy": npy(1, 2, 3)}]),
            "no image or no .cls",
        ),
        (write_winogavil, lambda f: shutil.rmtree(f / "winogavil_images"), "none of its 13 images is there"),
        (write_winogavil, lambda f: (f / "winogavil_dataset.csv").write_text("cue,candidates\nowl,[]"), "associations"),
        (
            write_winogavil,
            lambda f: (f / "winogavil_dataset.csv").write_text("cue,candidates,associations\nowl,a b,[]"),
            "candidates is not a list",
        ),
    ],
)
def test_a_set_that_is_not_whole_is_one_line(write, spoil, message, run, tmp_path, capsys):
    write(tmp_path / "wds_geode_test")
    spoil(tmp_path / "wds_geode_test")
    data = f"--data={tmp_path / 'wds_geode_test'}"
    assert main(["evaluate", f"--model={run}", data, f"--output={tmp_path / 'out'}"]) == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1 and message in error, error
