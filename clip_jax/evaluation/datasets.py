"""Reads folders in CLIP_benchmark's webdataset layout, without converting them.

    DIR/test/nshards.txt  0.tar  1.tar ...                 images with .cls, or with .txt of one caption per line
    DIR/classnames.txt                                     one class per line, in the order of the labels
    DIR/zeroshot_classification_templates.txt              prompts with {c} for the class
    DIR/dataset_type.txt                                   "retrieval"; without it, classification

Many sets are published in it: https://huggingface.co/clip-benchmark (``wds_imagenet1k``, ``wds_mscoco_captions`` ...).
"""

import dataclasses
from pathlib import Path
from typing import NamedTuple

from clip_jax.data.sources import captions, open_source
from clip_jax.data.sources.sample import Source
from clip_jax.data.sources.tar import TarSource, open_tar
from clip_jax.errors import UserError
from clip_jax.evaluation import aro, groups, label_maps, layouts, masks, prompts, winogavil
from clip_jax.evaluation.label_maps import LabelMap
from clip_jax.evaluation.prompts import Prompts

DEFAULT_TEMPLATES = ("a photo of a {}.",)
LIKE_IMAGENET = ("imagenetv2", "imagenet-a", "imagenet-r", "imagenet-o", "imagenet_sketch", "objectnet")
"""Sets with ImageNet's prompts."""


class Dataset(NamedTuple):
    """A source, and what is measured on it."""

    name: str
    protocol: str
    """A key of ``runner.PROTOCOLS``."""
    source: Source
    prompts: Prompts | None
    """The prompts for zero-shot classification; None for retrieval."""
    labels: LabelMap | None = None
    """Right classes other than the data's own."""
    language: str = "en"
    """The captions' language, in results: the end of a field such as ``captions.de``."""


def is_benchmark(folder: Path) -> bool:
    """Whether a folder is in CLIP_benchmark's layout."""
    return (folder / "test" / "nshards.txt").is_file()


def open_benchmark(folder: Path) -> Dataset:
    """The test split of a folder in CLIP_benchmark's layout. Raises UserError for what is missing."""
    name = folder.name.removeprefix("wds_").removesuffix("_test")  # the suffix is in DataComp's names
    kind = _read(folder / "dataset_type.txt").strip().lower() or "classification"
    if kind not in ("classification", "retrieval", "multilabel"):
        raise UserError(
            f"{folder}/dataset_type.txt: {kind} sets are not read; classification, retrieval, multilabel are"
        )
    files, shards = _shards(folder / "test"), str(folder / "test")
    if kind == "retrieval":
        source = dataclasses.replace(open_tar(shards, caption=captions.LINES), name=f"benchmark:{name}")
        return Dataset(name, "retrieval", source, None)
    names = _lines(folder / "classnames.txt") or tuple(prompts.published("class_names").get(_base(name), ()))
    if not names:
        raise UserError(f"{folder}/classnames.txt: missing; it has one class per line, in the order of the labels")
    file = folder / "zeroshot_classification_templates.txt"
    published = "imagenet1k" if name in LIKE_IMAGENET else _base(name)
    lines = _lines(file) or prompts.published("templates").get(published, DEFAULT_TEMPLATES)
    templates = prompts.read_templates(lines, str(file))
    if kind == "multilabel":
        return Dataset(name, "multi_label", layouts.open_multi_label(name, files, names), Prompts(names, templates))
    if name in groups.SETS:
        grouped = layouts.open_grouped(name, files, names, groups.SETS[name])
        return Dataset(name, "grouped", grouped, Prompts(names, templates))
    source = dataclasses.replace(open_tar(shards, class_names=names), name=f"benchmark:{name}")
    return Dataset(name, "zero_shot", source, Prompts(names, templates))


def open_train(source: Source) -> Source | None:
    """The split ``train`` of a classification set whose test split ``open_benchmark`` opened, if it has one."""
    if not (isinstance(source, TarSource) and source.name.startswith("benchmark:")):
        return None
    folder = Path(source.shards[0]).parents[1] / "train"
    if not (folder / "nshards.txt").is_file():
        return None
    _shards(folder)
    opened = open_tar(str(folder), class_names=source.class_names)
    return dataclasses.replace(opened, name=f"{source.name} train")


def open_dataset(
    where: str,
    templates: str | None = None,
    class_names: str | None = None,
    labels: str | None = None,
    only: str | None = None,
    **columns: str,
) -> list[Dataset]:
    """The sets that ``--data`` names: a folder in a published layout, one of such folders, or a source.

    A source with labels is classified, any other is searched, by each of several fields of captions on its own: they
    are languages of one picture. ``templates`` and ``class_names`` are names of published sets or files, and win over
    what the data itself says; ``labels`` and ``only`` are files of ``label_maps``. ``columns`` are options of
    ``open_source``. Raises UserError.
    """
    folder = Path(where).expanduser()
    if folder.is_dir():
        found = [opened for f in (folder, *sorted(folder.iterdir())) if (opened := open_folder(f)) is not None]
        if not found:
            raise UserError(
                f"{where}: neither it nor a folder in it has test/nshards.txt; name a source as in folder:{where}"
            )
    else:
        source = open_source(where, **columns)
        fields = captions.fields(columns.get("caption", captions.TXT))
        if source.class_names:
            found = [Dataset(source.name, "zero_shot", source, Prompts(tuple(source.class_names), DEFAULT_TEMPLATES))]
        elif len(fields) == 1:
            found = [Dataset(source.name, "retrieval", source, None, language=_language(fields[0].name))]
        else:
            by_field = {field.name: open_source(where, **columns | {"caption": field.name}) for field in fields}
            found = [
                Dataset(f"{s.name} {name}", "retrieval", s, None, language=_language(name))
                for name, s in by_field.items()
            ]
    return [_with_prompts(dataset, templates, class_names, labels, only) for dataset in found]


def _language(field: str) -> str:
    """``captions.de`` -> ``de``; a field that does not end in a code of two or three letters is taken for English."""
    _, dot, code = field.rpartition(".")
    return code if dot and len(code) in (2, 3) and code.islower() else "en"


def open_folder(folder: Path) -> Dataset | None:
    """A folder in a published layout; None for any other. Raises UserError for what is missing in it."""
    if is_benchmark(folder):
        return open_benchmark(folder)
    if layouts.is_winoground(folder):
        return Dataset(folder.name, "winoground", layouts.open_winoground(folder), None)
    if layouts.is_sugar_crepe(folder):
        return Dataset(folder.name, "sugar_crepe", layouts.open_sugar_crepe(folder), None)
    if aro.is_aro(folder):
        return Dataset(folder.name, "aro", aro.open_aro(folder), None)
    if aro.is_captions(folder):
        return Dataset(folder.name, "caption_order", aro.open_captions(folder), None)
    if winogavil.is_winogavil(folder):
        return Dataset("winogavil", "winogavil", winogavil.open_winogavil(folder), None)
    if masks.is_masked(folder):
        source = masks.open_masked(folder)
        return Dataset(folder.name, "dense", source, Prompts(source.class_names, DEFAULT_TEMPLATES))
    return None


def _with_prompts(
    dataset: Dataset, templates: str | None, class_names: str | None, labels: str | None, only: str | None
) -> Dataset:
    if dataset.prompts is None:
        return dataset
    names, mapped = dataset.prompts.class_names, labels or only
    if class_names:
        names = prompts.class_names(class_names)
        if len(names) != len(dataset.prompts.class_names) and not labels:
            count = len(dataset.prompts.class_names)
            raise UserError(f"{class_names}: {len(names)} class names for {count} classes of {dataset.name}")
    chosen = prompts.templates(templates) if templates else dataset.prompts.templates
    dataset = dataset._replace(prompts=Prompts(names, chosen))
    if not mapped or dataset.protocol != "zero_shot":
        return dataset
    found = label_maps.read(labels, only, dataset.source.class_names, names, len(dataset.source))
    return dataset._replace(protocol="labels", labels=found)


def _base(name: str) -> str:
    """CLIP_benchmark's name of a set without its task group: ``vtab-flowers`` -> ``flowers``."""
    return name.split("-", 1)[-1] if name.startswith("vtab-") else name


def _shards(folder: Path) -> list[Path]:
    """The shards of a split. Raises UserError for those that are missing."""
    text = _read(folder / "nshards.txt").strip()
    files = [folder / f"{number}.tar" for number in range(int(text) if text.isdigit() else 0)]
    missing = sum(not file.is_file() for file in files)
    if missing or not files:
        raise UserError(f"{folder}: {missing} of {text or 0} shards are missing; download the set again")
    return files


def _read(path: Path) -> str:
    return path.read_text(encoding="utf-8") if path.is_file() else ""


def _lines(path: Path) -> tuple[str, ...]:
    return tuple(line.strip() for line in _read(path).splitlines())
