"""The folder of an evaluation: written task by task, so that a run that was killed continues where it was.

    MODEL/TASK.json     strict JSON in CLIP_benchmark's keys (dataset, model, task, metrics ...), and more
    MODEL/TASK.npz      one value per example for each main metric: what ``clip-jax compare`` pairs
    results.jsonl       one line per model and task: key, dataset, metrics with main_metric
    results.csv         one row per model and task
    results.md          the table of main metrics
    report.html

``MODEL/TASK.json`` files go into ``clip_benchmark build``.
"""

import csv
import io
import json
import math
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from clip_jax import __version__
from clip_jax.errors import UserError
from clip_jax.evaluation.subject import Result, Task
from clip_jax.storage import atomic

PROTOCOL_VERSION = 2
"""To be increased with every change of a definition: results with another number are computed again."""
INDICES = "_indices"
"""The entry of ``TASK.npz`` with the number in the source of each example."""
CLIP_BENCHMARK_TASKS = {
    "zero_shot": "zeroshot_classification",
    "retrieval": "zeroshot_retrieval",
    "probe": "linear_probe",
}


def file_name(model: str) -> str:
    """The name of a model's folder: ``runs/demo`` -> ``runs-demo``."""
    return re.sub(r"[^\w.+]+", "-", model).strip("-.") or "model"


def identity(task: Task, model_fingerprint: str) -> dict[str, Any]:
    """Everything that a result depends on; a stored result with another identity is not used."""
    return {
        "model": model_fingerprint,
        "source": task.source.fingerprint,
        "train": None if task.train is None else task.train.fingerprint,
        "prompts": None if task.prompts is None else task.prompts.fingerprint,
        "protocol": f"{task.protocol} {PROTOCOL_VERSION} {task.metric}".rstrip(),
    } | ({} if task.labels is None else {"labels": task.labels.fingerprint})


def load(output: Path, model: str, task: Task, model_fingerprint: str) -> dict[str, Any] | None:
    """The stored result with the same identity, or None."""
    path = output / file_name(model) / f"{file_name(task.name)}.json"
    try:
        stored = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
    there = path.with_suffix(".npz").is_file()
    return stored if there and stored.get("identity") == identity(task, model_fingerprint) else None


def load_all(folder: Path, pattern: str, wanted: str) -> dict[str, dict[str, Any]]:
    """The results below a folder, by path without suffix. Raises UserError, naming ``wanted``, if there is none."""
    try:
        found = {path: json.loads(path.read_text(encoding="utf-8")) for path in sorted(folder.glob(pattern))}
    except ValueError as error:
        raise UserError(f"{folder}: not the results of an evaluation ({error})") from error
    found = {path: record for path, record in found.items() if isinstance(record, dict) and "identity" in record}
    if not found:
        raise UserError(f"{folder}: no results; name {wanted} of clip-jax evaluate")
    return {str(path.relative_to(folder).with_suffix("")): record for path, record in found.items()}


def store(output: Path, model: str, task: Task, model_fingerprint: str, result: Result) -> dict[str, Any]:
    """Writes a result, the JSON last: its presence says that the result is complete."""
    folder, name = output / file_name(model), file_name(task.name)
    folder.mkdir(parents=True, exist_ok=True)
    record = strict(
        {
            "dataset": task.name,
            "model": model,
            "pretrained": model,
            "task": CLIP_BENCHMARK_TASKS.get(task.protocol, task.protocol),
            "language": task.language,
            "metrics": result.metrics,
            "main_metric": result.main_metric,
            "examples": result.examples,
            "skipped": result.skipped,
            "source": task.source.name,
            "prompts": result.prompts,
            "curves": result.curves,
            "details": result.details,
            "clip_jax_version": __version__,
            "identity": identity(task, model_fingerprint),
        }
    )
    file = io.BytesIO()
    indices = {} if result.indices is None else {INDICES: result.indices}
    np.savez_compressed(file, **{name.replace("/", "_"): values for name, values in result.hits.items()}, **indices)
    atomic.write_bytes(folder / f"{name}.npz", file.getvalue())
    atomic.write_text(folder / f"{name}.json", json.dumps(record, indent=1, allow_nan=False) + "\n")
    return record


def strict(value: Any) -> Any:
    """Replaces NaN and infinities, which JSON does not have, by None, and NumPy's numbers by Python's."""
    if isinstance(value, Mapping):
        return {str(key): strict(entry) for key, entry in value.items()}
    if isinstance(value, list | tuple):
        return [strict(entry) for entry in value]
    if isinstance(value, np.generic):
        value = value.item()
    return None if isinstance(value, float) and not math.isfinite(value) else value


def main_value(record: Mapping[str, Any]) -> float | None:
    return record["metrics"].get(record["main_metric"])


def write_tables(output: Path, records: Sequence[Mapping[str, Any]], notes: Sequence[str] = ()) -> None:
    """``results.jsonl``, ``results.csv`` and ``results.md`` of all records; the last ends with the notes."""
    lines = [
        json.dumps(
            {
                "key": f"{r['model']}/{r['dataset']}",
                "dataset": r["dataset"],
                "metrics": r["metrics"] | {"main_metric": main_value(r)},
            },
            allow_nan=False,
        )
        for r in records
    ]
    atomic.write_text(output / "results.jsonl", "".join(line + "\n" for line in lines))
    names = list(dict.fromkeys(name for r in records for name in r["metrics"]))
    file = io.StringIO()
    table = csv.writer(file, lineterminator="\n")
    head = ("dataset", "model", "pretrained", "task", "language", "examples", "skipped", "prompts")
    table.writerow([*head, *names])
    for r in records:
        table.writerow(["" if v is None else v for v in (*(r[h] for h in head), *(r["metrics"].get(n) for n in names))])
    atomic.write_text(output / "results.csv", file.getvalue())
    atomic.write_text(output / "results.md", markdown(records) + "".join(f"\n{note}\n" for note in notes))


def markdown(records: Sequence[Mapping[str, Any]]) -> str:
    """One row per task, one column per model: the main metrics."""
    models = list(dict.fromkeys(r["model"] for r in records))
    by_task: dict[tuple[str, str], dict[str, float | None]] = {}
    for r in records:
        by_task.setdefault((r["dataset"], r["main_metric"]), {})[r["model"]] = main_value(r)
    lines = [f"| dataset | metric | {' | '.join(models)} |", f"|---|---|{'---|' * len(models)}"]
    for (dataset, metric), values in by_task.items():
        cells = ["" if values.get(m) is None else f"{values[m]:.4f}" for m in models]
        lines.append(f"| {dataset} | {metric} | {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"
