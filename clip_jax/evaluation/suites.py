"""Suites as data: the sets of the CLIP paper and of DataComp, their metrics, where to get them, and their averages.

An average is over all sets of its suite, and None as soon as one is missing: averages over different sets are not
comparable. Sets are folders in CLIP_benchmark's layout, named as at https://huggingface.co/clip-benchmark.
"""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from clip_jax.errors import UserError
from clip_jax.evaluation import datasets, robustness, runner

HUB = "https://huggingface.co/datasets/clip-benchmark/wds_"
DATACOMP = "https://huggingface.co/datasets/djghosh/wds_"


class Entry(NamedTuple):
    """A set of a suite."""

    title: str
    folder: str
    """CLIP_benchmark's name, with or without ``wds_``, and with ``_test`` as DataComp has it."""
    metric: str
    """The metric in the results."""
    original: str = ""
    """Where the original is, of a set that CLIP_benchmark does not publish; an own folder in its layout is read."""


TOP1, MEAN = "top1", "mean_per_class"

# Radford et al. 2021, table 9 and appendix A; metrics as there (templates: prompts/templates.json, by folder).
PAPER27 = (
    Entry("Food-101", "food101", TOP1),
    Entry("CIFAR-10", "vtab-cifar10", TOP1),
    Entry("CIFAR-100", "vtab-cifar100", TOP1),
    Entry("Birdsnap", "birdsnap", TOP1, "http://thomasberg.org"),
    Entry("SUN397", "sun397", TOP1),
    Entry("Stanford Cars", "cars", TOP1),
    Entry("FGVC Aircraft", "fgvc_aircraft", MEAN),
    Entry("Pascal VOC 2007", "voc2007_multilabel", "mAP_11"),
    Entry("Describable Textures", "vtab-dtd", TOP1),
    Entry("Oxford-IIIT Pets", "vtab-pets", MEAN),
    Entry("Caltech-101", "vtab-caltech101", MEAN),
    Entry("Oxford Flowers 102", "vtab-flowers", MEAN),
    Entry("MNIST", "mnist", TOP1),
    Entry("FER 2013", "fer2013", TOP1),
    Entry("STL-10", "stl10", TOP1),
    Entry("EuroSAT", "vtab-eurosat", TOP1),
    Entry("RESISC45", "vtab-resisc45", TOP1),
    Entry("GTSRB", "gtsrb", TOP1),
    Entry("KITTI distance", "vtab-kitti_closest_vehicle_distance", TOP1),
    Entry("Country211", "country211", TOP1),
    Entry("PatchCamelyon", "vtab-pcam", TOP1),
    Entry("UCF101", "ucf101", TOP1, "https://www.crcv.ucf.edu/data/UCF101.php, the middle frame of each video"),
    Entry(
        *("Kinetics-700", "kinetics700", "top1_top5"),
        "https://github.com/cvdfoundation/kinetics-dataset, the middle frame of each video",
    ),
    Entry("CLEVR counts", "vtab-clevr_count_all", TOP1),
    Entry("Hateful Memes", "hateful_memes", "roc_auc", "https://hatefulmemeschallenge.com"),
    Entry("Rendered SST2", "renderedsst2", TOP1),
    Entry("ImageNet", "imagenet1k", TOP1),
)

IMAGENET = (
    Entry("ImageNet", "imagenet1k", TOP1),
    Entry("ImageNet-V2", "imagenetv2", TOP1),
    Entry("ImageNet-A", "imagenet-a", TOP1),
    Entry("ImageNet-R", "imagenet-r", TOP1),
    Entry("ImageNet-Sketch", "imagenet_sketch", TOP1),
    Entry("ObjectNet", "objectnet", TOP1),
)

# DataComp's tasklist (Gadre et al. 2023, table 20), with its main metrics.
DATACOMP38 = (
    *IMAGENET,
    Entry("ImageNet-O", "imagenet-o", TOP1),
    Entry("Caltech-101", "vtab-caltech101", MEAN),
    Entry("CIFAR-10", "vtab-cifar10", TOP1),
    Entry("CIFAR-100", "vtab-cifar100", TOP1),
    Entry("CLEVR counts", "vtab-clevr_count_all", TOP1),
    Entry("CLEVR distance", "vtab-clevr_closest_object_distance", TOP1),
    Entry("Country211", "country211", TOP1),
    Entry("Describable Textures", "vtab-dtd", TOP1),
    Entry("EuroSAT", "vtab-eurosat", TOP1),
    Entry("FGVC Aircraft", "fgvc_aircraft", MEAN),
    Entry("Food-101", "food101", TOP1),
    Entry("GTSRB", "gtsrb", TOP1),
    Entry("KITTI distance", "vtab-kitti_closest_vehicle_distance", TOP1),
    Entry("MNIST", "mnist", TOP1),
    Entry("Oxford Flowers 102", "vtab-flowers", MEAN),
    Entry("Oxford-IIIT Pets", "vtab-pets", MEAN),
    Entry("Pascal VOC 2007", "voc2007", TOP1),
    Entry("PatchCamelyon", "vtab-pcam", TOP1),
    Entry("Rendered SST2", "renderedsst2", TOP1),
    Entry("RESISC45", "vtab-resisc45", TOP1),
    Entry("Stanford Cars", "cars", TOP1),
    Entry("STL-10", "stl10", TOP1),
    Entry("SUN397", "sun397", TOP1),
    Entry("SVHN", "vtab-svhn", TOP1),
    Entry("Flickr30k", "flickr30k", "mean_recall@1"),
    Entry("MS-COCO", "mscoco_captions", "mean_recall@1"),
    Entry("WinoGAViL", "winogavil", "jaccard_10_12", "https://huggingface.co/datasets/nlphuji/winogavil"),
    Entry("iWildCam", "wilds-iwildcam", "f1_macro"),
    Entry("Camelyon17", "wilds-camelyon17", TOP1),
    Entry("FMoW", "wilds-fmow", "worst_region_top1", f"{DATACOMP}wilds-fmow_test"),
    Entry("Dollar Street", "dollar_street", "worst_income_top5", f"{DATACOMP}dollar_street_test"),
    Entry("GeoDE", "geode", "worst_region_top1", f"{DATACOMP}geode_test"),
)

OTHERS = (
    ("Winoground", "winoground", "https://huggingface.co/datasets/facebook/winoground"),
    ("SugarCrepe", "sugar_crepe", "https://github.com/RAIVNLab/sugar-crepe"),
    ("ARO", "aro", "https://github.com/mertyg/vision-language-models-are-bows"),
)
"""(title, protocol, address) of sets that ``full`` has besides those of its average."""

SHIFTED_FROM = "imagenet1k"

SUITES = {"imagenet": IMAGENET, "paper27": PAPER27, "datacomp38": DATACOMP38}
SUITES["full"] = tuple(dict.fromkeys((*PAPER27, *DATACOMP38)))
"""Every other given set is evaluated too, but does not count for the average."""


def tasks(
    suite: str,
    data: Sequence[str],
    image_size: int,
    templates: str | None,
    class_names: str | None,
    **options: str | None,
) -> tuple[tuple[runner.Task, ...], list[str]]:
    """(the tasks of a suite that can be run, a line for each set that cannot). Raises UserError where there is none.

    ``options`` are those of ``datasets.open_dataset``.
    """
    found: list[runner.Task] = []
    missing: list[str] = []
    if suite == "quick":
        found += runner.quick(image_size)
    opened = [d for where in data for d in datasets.open_dataset(where, templates, class_names, **options)]
    if suite == "robustness":
        found += runner.robustness(image_size, map(runner.task_of, opened))
    elif suite == "dense":
        found += runner.dense_suite(image_size, map(runner.task_of, opened))
    elif suite in ("quick", "data"):
        found += map(runner.task_of, opened)
        if not found:
            raise UserError("--suite=data: name the data, as in --data=folder:photos")
    else:
        by_folder = {_plain(d.name): d for d in opened}
        others = [d for d in opened if _plain(d.name) not in {_plain(entry.folder) for entry in SUITES[suite]}]
        for entry in SUITES[suite]:
            dataset = by_folder.get(_plain(entry.folder))
            if dataset is None:
                missing.append(_where_to_get(entry))
            else:
                found.append(runner.task_of(dataset)._replace(name=entry.folder, metric=entry.metric))
        if suite == "full":
            found += map(runner.task_of, others)
            there = {task.protocol for task in found}
            missing += [f"{title}: missing; {where}" for title, protocol, where in OTHERS if protocol not in there]
        else:
            missing += [f"{d.name}: no set of {suite}, so not evaluated; --suite=full does" for d in others]
        if not found:
            roots = ", ".join(map(str, data)) or "--data"
            raise UserError(
                f"--suite={suite}: none of its {len(SUITES[suite])} sets is in {roots}; the first: {missing[0]}"
            )
    names = [task.name for task in found]
    if len(set(names)) < len(names):
        raise UserError(f"--data: two sets are called {next(n for n in names if names.count(n) > 1)}")
    return tuple(found), missing


def averages(suite: str, records: Sequence[Mapping[str, Any]]) -> list[str]:
    """A line per model: the mean of a suite's metrics, or why there is none."""
    if suite not in SUITES:
        return []
    metric = {_plain(entry.folder): entry.metric for entry in SUITES[suite]}
    lines = []
    for model in dict.fromkeys(r["model"] for r in records):
        values = [r["metrics"].get(metric.get(_plain(r["dataset"]), "")) for r in records if r["model"] == model]
        mean = average(values, len(SUITES[suite]))
        absent = len(SUITES[suite]) - sum(value is not None for value in values)
        why = f"null: {absent} of {len(SUITES[suite])} sets are missing"
        lines.append(f"{model}  {suite} average  {why if mean is None else f'{mean:.4f}'}")
    return lines


def effective_robustness(records: Sequence[Mapping[str, Any]], baseline: Sequence[Mapping[str, Any]]) -> list[str]:
    """A line per model and shift of ImageNet: top-1 beyond that of the baseline's models at the same ImageNet top-1."""
    lines = []
    ours, theirs = _top1_by_model(records), _top1_by_model(baseline)
    for model, found in ours.items():
        for entry in IMAGENET[1:]:
            shift = _plain(entry.folder)
            if SHIFTED_FROM not in found or shift not in found:
                continue
            line = [(of[SHIFTED_FROM], of[shift]) for of in theirs.values() if {SHIFTED_FROM, shift} <= of.keys()]
            line = [pair for pair in line if all(0 < value < 1 for value in pair)]
            if len(line) < 2:
                needed = f"the baseline needs two models with imagenet1k and {entry.folder}, and has {len(line)}"
                lines.append(f"{model}  effective robustness on {entry.title}  none: {needed}")
                continue
            value = robustness.effective_robustness(found[SHIFTED_FROM], found[shift], np.array(line))
            shown = f"{round(value, 4) + 0.0:+.4f} (a line of {len(line)} models)"  # + 0.0: no -0.0000
            lines.append(f"{model}  effective robustness on {entry.title}  {shown}")
    return lines or ["effective robustness: needs the results of imagenet1k and of one of its shifts"]


def _top1_by_model(records: Sequence[Mapping[str, Any]]) -> dict[str, dict[str, float]]:
    found: dict[str, dict[str, float]] = {}
    for record in records:
        if record["metrics"].get(TOP1) is not None:
            found.setdefault(record["model"], {})[_plain(record["dataset"])] = record["metrics"][TOP1]
    return found


def average(values: Sequence[float | None], expected: int) -> float | None:
    """The mean of all values; None if one is missing."""
    there = [value for value in values if value is not None]
    return sum(there) / expected if len(there) == expected else None


def _plain(name: str) -> str:
    return Path(name).name.removeprefix("wds_").replace("_", "-").replace("/", "-")


def _where_to_get(entry: Entry) -> str:
    if entry.original:
        return f"{entry.title}: missing; {entry.original}; a folder {entry.folder} in CLIP_benchmark's layout is read"
    return f"{entry.title}: missing; {HUB}{entry.folder}"
