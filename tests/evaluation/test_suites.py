"""Suites: the results file that DataComp's ``aggregate_scores.py`` reads, and robustness relative to other models."""

import functools
import json

import numpy as np
import pytest

from clip_jax.commands import main
from clip_jax.evaluation import datacomp, runner, suites
from tests.data.shards import jpeg, write_shard
from tests.evaluation.test_groups import WORDS, npy, write_winogavil

SHIFTS = {"ImageNet Sketch", "ImageNet v2", "ImageNet-A", "ImageNet-O", "ImageNet-R", "ObjectNet"}


def test_every_set_has_a_key_and_a_name_of_its_own():
    assert {entry.folder for entry in suites.DATACOMP38} == datacomp.TASKS.keys()
    assert len(set(datacomp.TASKS.values())) == 38
    assert {name for _, name in datacomp.TASKS.values()} >= SHIFTS | {"ImageNet 1k", "Flickr", "MSCOCO"}


def test_each_model_has_a_file_with_main_metrics_under_datacomps_names(tmp_path):
    def record(model, dataset, value):
        return {"model": model, "dataset": dataset, "metrics": {"top1": value}, "main_metric": "top1"}

    records = [record("a", "imagenet1k", 0.5), record("a", "own", 0.1), record("b", "vtab-pets", None)]
    for model in "ab":
        (tmp_path / model).mkdir()
    datacomp.write(tmp_path, records)
    (a,), (b,) = (
        [json.loads(line) for line in (tmp_path / model / datacomp.FILE).read_text().splitlines()] for model in "ab"
    )
    assert a == {"key": "imagenet1k", "dataset": "ImageNet 1k", "metrics": {"top1": 0.5, "main_metric": 0.5}}
    assert (b["dataset"], b["metrics"]["main_metric"]) == ("Oxford-IIIT Pet", None)


def test_effective_robustness_is_relative_to_the_line_of_the_baseline():
    def record(model, dataset, value):
        return {"model": model, "dataset": dataset, "metrics": {"top1": value}}

    def of(model, clean, shifted):
        return [record(model, "imagenet1k", clean), record(model, "imagenetv2", shifted)]

    baseline = [*of("one", 0.5, 0.4), *of("two", 0.7, 0.6)]
    on_the_line, above = suites.effective_robustness([*of("a", 0.5, 0.4), *of("b", 0.7, 0.65)], baseline)
    assert on_the_line == "a  effective robustness on ImageNet-V2  +0.0000 (a line of 2 models)"
    assert above == "b  effective robustness on ImageNet-V2  +0.0500 (a line of 2 models)"
    [line] = suites.effective_robustness(of("a", 0.5, 0.4), baseline[:2])
    assert line.endswith("none: the baseline needs two models with imagenet1k and imagenetv2, and has 1")
    [line] = suites.effective_robustness([record("a", "imagenet1k", 0.5)], baseline)
    assert "needs the results of imagenet1k and of one of its shifts" in line


@pytest.mark.slow
@pytest.mark.parametrize("suite", ["datacomp38", "paper27"])
def test_all_sets_of_a_suite_in_their_layouts_have_an_average(suite, run, tmp_path, capsys):
    for entry in suites.SUITES[suite]:
        folder = tmp_path / "sets" / f"wds_{entry.folder}"
        if entry.folder == "winogavil":
            write_winogavil(folder)
            continue
        (folder / "test").mkdir(parents=True)
        (folder / "test" / "nshards.txt").write_text("1")
        kind = {"mean_recall@1": "retrieval", "mAP_11": "multilabel"}.get(entry.metric, "classification")
        (folder / "dataset_type.txt").write_text(kind)
        count = 2 if entry.metric == "roc_auc" else 6
        (folder / "classnames.txt").write_text("\n".join(WORDS[:count]))
        samples = [{"jpg": jpeg(i), "cls": str(i % count).encode()} for i in range(12)]
        for i, sample in enumerate(samples):
            if kind == "retrieval":
                sample["txt"] = f"picture {i}".encode()
            if kind == "multilabel":
                sample["npy"] = npy(*(i % (2 + c) == 0 for c in range(6)))
            if entry.metric.startswith("worst"):
                sample["npy"] = npy(i % 2, i % 3, i % 4)
            if kind != "classification":
                del sample["cls"]
        write_shard(folder / "test" / "0.tar", samples)
    out = tmp_path / "out"
    command = ["evaluate", f"--model={run}", f"--suite={suite}", f"--data={tmp_path / 'sets'}", f"--output={out}"]
    assert main(command) == 0
    said = capsys.readouterr().out
    records = [json.loads(path.read_text()) for path in out.glob("*/*.json")]
    values = [record["metrics"][record["main_metric"]] for record in records]
    assert len(values) == len(suites.SUITES[suite]) and "missing" not in said
    assert f"{suite} average  {np.mean(values):.4f}" in said
    if suite == "datacomp38":
        lines = [json.loads(line) for line in next(out.glob("*/eval_results.jsonl")).read_text().splitlines()]
        assert len(lines) == 38 and all(line["metrics"]["main_metric"] is not None for line in lines)


@pytest.mark.slow
def test_the_suites_of_the_bundled_scenes_run_without_data(run, tmp_path, monkeypatch):
    for name, count in (("robustness", {"classification": 24}), ("dense_suite", {"pictures": 8})):
        monkeypatch.setattr(runner, name, functools.partial(getattr(runner, name), **count))
    monkeypatch.setattr(runner, "SEVERITIES", (1, 5))
    monkeypatch.setattr(runner, "CORRUPTIONS", ("noise", "blur"))
    found = {}
    for suite in ("robustness", "dense"):
        out = tmp_path / suite
        assert main(["evaluate", f"--model={run}", f"--suite={suite}", f"--output={out}"]) == 0
        found |= {path.stem: json.loads(path.read_text()) for path in out.glob("*/*.json")}
        assert (out / "report.html").stat().st_size > 5_000
    assert set(found) == {
        *(f"shapes_{kind}" for kind in ("corruptions", "typographic", "adversarial", "cues", "dense"))
    }
    assert all(0 <= record["metrics"][record["main_metric"]] <= 1 for record in found.values())
