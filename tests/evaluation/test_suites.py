"""Suites: the results file that DataComp's ``aggregate_scores.py`` reads, and robustness relative to other models."""

import json

from clip_jax.evaluation import datacomp, suites

SHIFTS = {"ImageNet Sketch", "ImageNet v2", "ImageNet-A", "ImageNet-O", "ImageNet-R", "ObjectNet"}
NOT_COMPUTED = {"WinoGAViL", "FMoW", "Dollar Street", "GeoDE"}


def test_every_set_with_a_metric_has_a_key_and_a_name_of_its_own():
    computed = [entry for entry in suites.DATACOMP38 if entry.metric]
    assert [entry.folder for entry in computed if entry.folder not in datacomp.TASKS] == []
    assert {entry.title for entry in suites.DATACOMP38 if not entry.metric} == NOT_COMPUTED
    assert len(datacomp.TASKS) == len(set(datacomp.TASKS.values())) == 38 - len(NOT_COMPUTED)
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
