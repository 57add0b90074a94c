"""The results file that DataComp's ``aggregate_scores.py`` reads."""

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
