"""DataComp's results file, which its ``aggregate_scores.py`` reads: one line per set, under the names of its task list.

``key`` and ``dataset`` are those of tasklist.yml of github.com/mlfoundations/datacomp. A value that is missing is null:
the aggregation then refuses the file, as it must, for averages over different sets cannot be compared.
"""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from clip_jax.evaluation import results
from clip_jax.storage import atomic

FILE = "eval_results.jsonl"
TASKS = {
    "imagenet1k": ("imagenet1k", "ImageNet 1k"),
    "imagenetv2": ("imagenetv2", "ImageNet v2"),
    "imagenet-a": ("imagenet-a", "ImageNet-A"),
    "imagenet-r": ("imagenet-r", "ImageNet-R"),
    "imagenet_sketch": ("imagenet_sketch", "ImageNet Sketch"),
    "objectnet": ("objectnet", "ObjectNet"),
    "imagenet-o": ("imagenet-o", "ImageNet-O"),
    "vtab-caltech101": ("vtab/caltech101", "Caltech-101"),
    "vtab-cifar10": ("cifar10", "CIFAR-10"),
    "vtab-cifar100": ("vtab/cifar100", "CIFAR-100"),
    "vtab-clevr_count_all": ("vtab/clevr_count_all", "CLEVR Counts"),
    "vtab-clevr_closest_object_distance": ("vtab/clevr_closest_object_distance", "CLEVR Distance"),
    "country211": ("country211", "Country211"),
    "vtab-dtd": ("vtab/dtd", "Describable Textures"),
    "vtab-eurosat": ("vtab/eurosat", "EuroSAT"),
    "fgvc_aircraft": ("fgvc_aircraft", "FGVC Aircraft"),
    "food101": ("food101", "Food-101"),
    "gtsrb": ("gtsrb", "GTSRB"),
    "vtab-kitti_closest_vehicle_distance": ("vtab/kitti_closest_vehicle_distance", "KITTI Vehicle Distance"),
    "mnist": ("mnist", "MNIST"),
    "vtab-flowers": ("vtab/flowers", "Oxford Flowers-102"),
    "vtab-pets": ("vtab/pets", "Oxford-IIIT Pet"),
    "voc2007": ("voc2007", "Pascal VOC 2007"),
    "vtab-pcam": ("vtab/pcam", "PatchCamelyon"),
    "renderedsst2": ("renderedsst2", "Rendered SST2"),
    "vtab-resisc45": ("vtab/resisc45", "RESISC45"),
    "cars": ("cars", "Stanford Cars"),
    "stl10": ("stl10", "STL-10"),
    "sun397": ("sun397", "SUN397"),
    "vtab-svhn": ("vtab/svhn", "SVHN"),
    "flickr30k": ("retrieval/flickr30k", "Flickr"),
    "mscoco_captions": ("retrieval/mscoco_2014_5k_test_image_text_retrieval", "MSCOCO"),
    "wilds-iwildcam": ("wilds/iwildcam", "iWildCam"),
    "wilds-camelyon17": ("wilds/camelyon17", "Camelyon17"),
    "wilds-fmow": ("wilds/fmow", "FMoW"),
    "dollar_street": ("fairness/dollar_street", "Dollar Street"),
    "geode": ("fairness/geode", "GeoDE"),
    "winogavil": ("misc/winogavil", "WinoGAViL"),
}
"""Folder in ``suites.DATACOMP38`` -> (key, dataset)."""


def write(output: Path, records: Sequence[Mapping[str, Any]]) -> None:
    """``MODEL/eval_results.jsonl`` for each model of the records."""
    for model in dict.fromkeys(record["model"] for record in records):
        lines = []
        for record in records:
            if record["model"] != model or record["dataset"] not in TASKS:
                continue
            key, dataset = TASKS[record["dataset"]]
            metrics = record["metrics"] | {"main_metric": results.main_value(record)}
            lines.append(json.dumps({"key": key, "dataset": dataset, "metrics": metrics}, allow_nan=False) + "\n")
        atomic.write_text(output / results.file_name(model) / FILE, "".join(lines))
