"""WinoGAViL (Bitton et al. 2022, arXiv 2207.12576): which of 5 to 12 pictures are associated with a word?

    DIR/winogavil*.csv or .jsonl     rows with cue, candidates and associations (lists of names of images)
    DIR/winogavil_images/NAME.jpg    or images/; unpacked from the set's archive

A model gets the word as "A dog" or "An owl" and answers with as many pictures as are associated with it, the nearest
ones. The score of a row is the Jaccard index of its answer and the associations; ``jaccard`` is its mean over rows, and
``jaccard_10_12``, DataComp's main metric, that of rows with at least ten candidates. Between equally near pictures one
that is not associated comes first, so a constant model does not score above chance.
"""

import ast
import csv
import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Bool, Float, Int

from clip_jax.data.sources.sample import Sample
from clip_jax.errors import UserError
from clip_jax.evaluation import layouts
from clip_jax.evaluation.ranking import TIE
from clip_jax.evaluation.subject import Ensemble, Result, Task


@dataclass(frozen=True)
class Associations:
    """The pictures of all rows, each once, and the rows that refer to them by number."""

    name: str
    fingerprint: str
    files: tuple[Path, ...] = field(repr=False)
    cues: tuple[str, ...] = field(repr=False)
    candidates: tuple[Int[np.ndarray, " candidates"], ...] = field(repr=False)
    associated: tuple[Bool[np.ndarray, " candidates"], ...] = field(repr=False)

    class_names = ()

    def __len__(self) -> int:
        return len(self.files)

    def __getitem__(self, index: int) -> Sample:
        file = self.files[index]
        return Sample(layouts.read_image(file), ("",), file.name)


def is_winogavil(folder: Path) -> bool:
    return bool(_tables(folder))


def open_winogavil(folder: Path) -> Associations:
    """Raises UserError for a row without its fields, or if none of the pictures is there."""
    rows = [(f"{file}, row {i}", row) for file in _tables(folder) for i, row in enumerate(_rows(file), 1)]
    numbers: dict[str, int] = {}
    cues, candidates, associated = [], [], []
    for where, row in rows:
        names, right = _names(row, "candidates", where), _names(row, "associations", where)
        if not right or not set(right) <= set(names):
            raise UserError(f"{where}: associations are not among the candidates, or there are none")
        cues.append(layouts.text(row, "cue", where))
        candidates.append(np.array([numbers.setdefault(name, len(numbers)) for name in names]))
        associated.append(np.isin(names, right))
    files = tuple(layouts.image_file(folder, name) for name in numbers)
    if not any(file.is_file() for file in files):
        raise UserError(f"{folder}: none of its {len(files)} images is there, such as {files[0] if files else 'any'}")
    sizes = [[file.name, file.stat().st_size if file.is_file() else -1] for file in files]
    digest = hashlib.sha256(json.dumps([sizes, [row for _, row in rows]], default=str).encode())
    return Associations(
        f"winogavil:{folder.name}", digest.hexdigest()[:24], files, tuple(cues), tuple(candidates), tuple(associated)
    )


def prompt(cue: str) -> str:
    """``owl`` -> ``An owl``."""
    cue = cue.lower()
    return f"{'An' if cue[0] in 'aeiou' else 'A'} {cue}"


def jaccard(cosines: Float[np.ndarray, " candidates"], associated: Bool[np.ndarray, " candidates"]) -> float:
    """The Jaccard index of the associated pictures and as many nearest ones; ties count against the model."""
    count = int(associated.sum())
    rounded = np.round(cosines / TIE)  # equal within TIE
    answer = np.lexsort((associated, -rounded))[:count]
    right = int(associated[answer].sum())
    return right / (2 * count - right)


def protocol(task: Task, models: Ensemble) -> Result:
    """Over the rows whose pictures can all be decoded."""
    source, first = task.source, models[0][0].embed(task.source, texts=False)
    row_of = np.full(len(source), -1)
    row_of[first.indices] = np.arange(len(first.indices))
    rows = [i for i, wanted in enumerate(source.candidates) if (row_of[wanted] >= 0).all()]
    if not rows:
        raise UserError(f"{task.name}: no row has all its pictures")
    prompts = [prompt(source.cues[i]) for i in rows]
    embedded = [(model.embed(source, texts=False).images, model.texts(prompts), share) for model, share in models]
    found, sizes, equal = [], [], True
    for text, i in enumerate(rows):
        wanted = row_of[source.candidates[i]]
        cosines = sum(share * (images[wanted] @ texts[text]) for images, texts, share in embedded)
        found.append(jaccard(cosines, source.associated[i]))
        sizes.append(len(wanted))
        equal &= bool(np.ptp(cosines) <= TIE)
    scores, sizes = np.array(found), np.array(sizes)
    metrics = {
        "jaccard": float(scores.mean()),
        "jaccard_5_6": _mean(scores[sizes <= 6]),
        "jaccard_10_12": _mean(scores[sizes >= 10]),
        "rows_left_out": len(source.cues) - len(rows),
    }
    skipped = first.skipped.total()
    return Result(metrics, "jaccard", len(rows), skipped, None, {"jaccard": scores}, {}, {"all_equal": equal})


def _mean(values: np.ndarray) -> float | None:
    return float(values.mean()) if len(values) else None


def _tables(folder: Path) -> Sequence[Path]:
    return sorted(f for f in folder.glob("winogavil*") if f.suffix in (".csv", ".jsonl"))


def _rows(file: Path) -> list[dict[str, Any]]:
    text = file.read_text(encoding="utf-8")
    if file.suffix == ".csv":
        return list(csv.DictReader(text.splitlines()))
    try:
        return [json.loads(line) for line in text.splitlines() if line.strip()]
    except ValueError as error:
        raise UserError(f"{file}: not JSON ({error})") from error


def _names(row: dict[str, Any], name: str, where: str) -> list[str]:
    """A list, or a string that shows one as Python or JSON do."""
    found = row.get(name)
    if isinstance(found, str):
        try:
            found = ast.literal_eval(found)
        except (ValueError, SyntaxError) as error:
            raise UserError(f"{where}: {name} is not a list") from error
    if not isinstance(found, list) or not all(isinstance(each, str) for each in found):
        raise UserError(f"{where}: no list of names in the field {name}")
    return found
