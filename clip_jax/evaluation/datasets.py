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
from clip_jax.data.sources.tar import open_tar
from clip_jax.errors import UserError
from clip_jax.evaluation import prompts
from clip_jax.evaluation.prompts import Prompts

DEFAULT_TEMPLATES = ("a photo of a {}.",)


class Dataset(NamedTuple):
    """A source, and what is measured on it."""

    name: str
    protocol: str
    """``zero_shot`` or ``retrieval``."""
    source: Source
    prompts: Prompts | None
    """The prompts for zero-shot classification; None for retrieval."""


def is_benchmark(folder: Path) -> bool:
    """Whether a folder is in CLIP_benchmark's layout."""
    return (folder / "test" / "nshards.txt").is_file()


def open_benchmark(folder: Path) -> Dataset:
    """The test split of a folder in CLIP_benchmark's layout. Raises UserError for what is missing."""
    name = folder.name.removeprefix("wds_")
    kind = _read(folder / "dataset_type.txt").strip().lower() or "classification"
    if kind not in ("classification", "retrieval"):
        raise UserError(f"{folder}/dataset_type.txt: {kind} sets are not read; classification and retrieval are")
    text = _read(folder / "test" / "nshards.txt").strip()
    count = int(text) if text.isdigit() else 0
    missing = [number for number in range(count) if not (folder / "test" / f"{number}.tar").is_file()]
    if missing or not count:
        raise UserError(f"{folder}/test: {len(missing)} of {text or 0} shards are missing; download the set again")
    shards = str(folder / "test")
    if kind == "retrieval":
        source = dataclasses.replace(open_tar(shards, caption=captions.LINES), name=f"benchmark:{name}")
        return Dataset(name, "retrieval", source, None)
    names = _lines(folder / "classnames.txt") or tuple(prompts.published("class_names").get(_base(name), ()))
    if not names:
        raise UserError(f"{folder}/classnames.txt: missing; it has one class per line, in the order of the labels")
    file = folder / "zeroshot_classification_templates.txt"
    lines = _lines(file) or prompts.published("templates").get(_base(name), DEFAULT_TEMPLATES)
    templates = prompts.read_templates(lines, str(file))
    source = dataclasses.replace(open_tar(shards, class_names=names), name=f"benchmark:{name}")
    return Dataset(name, "zero_shot", source, Prompts(names, templates))


def open_dataset(
    where: str, templates: str | None = None, class_names: str | None = None, **columns: str
) -> list[Dataset]:
    """The sets that ``--data`` names: a folder in CLIP_benchmark's layout, one of such folders, or a source.

    A source with labels is classified, any other is searched. ``templates`` and ``class_names`` are names of published
    sets or files, and win over what the data itself says. ``columns`` are options of ``open_source``.
    """
    folder = Path(where).expanduser()
    if folder.is_dir():
        found = [open_benchmark(f) for f in (folder, *sorted(folder.iterdir())) if is_benchmark(f)]
        if not found:
            raise UserError(
                f"{where}: neither it nor a folder in it has test/nshards.txt; name a source as in folder:{where}"
            )
    else:
        source = open_source(where, **columns)
        own = Prompts(tuple(source.class_names), DEFAULT_TEMPLATES) if source.class_names else None
        found = [Dataset(source.name, "zero_shot" if own else "retrieval", source, own)]
    return [_with_prompts(dataset, templates, class_names) for dataset in found]


def _with_prompts(dataset: Dataset, templates: str | None, class_names: str | None) -> Dataset:
    if dataset.prompts is None:
        return dataset
    names = prompts.class_names(class_names) if class_names else dataset.prompts.class_names
    if len(names) != len(dataset.prompts.class_names):
        raise UserError(
            f"{class_names}: {len(names)} class names for {len(dataset.prompts.class_names)} classes of {dataset.name}"
        )
    chosen = prompts.templates(templates) if templates else dataset.prompts.templates
    return dataset._replace(prompts=Prompts(names, chosen))


def _base(name: str) -> str:
    """CLIP_benchmark's name of a set without its task group: ``vtab-flowers`` -> ``flowers``."""
    return name.split("-", 1)[-1] if name.startswith("vtab-") else name


def _read(path: Path) -> str:
    return path.read_text(encoding="utf-8") if path.is_file() else ""


def _lines(path: Path) -> tuple[str, ...]:
    return tuple(line.strip() for line in _read(path).splitlines())
