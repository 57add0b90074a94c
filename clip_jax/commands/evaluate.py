"""``clip-jax evaluate --model=runs/demo --suite=quick --output=DIR``."""

import argparse
from pathlib import Path

from clip_jax.errors import UserError

HELP = "Evaluate one or several models: zero-shot, retrieval, probes, composition, robustness; with a report."
SUITES = ("quick", "robustness", "dense", "imagenet", "paper27", "datacomp38", "full", "data")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--model",
        required=True,
        action="append",
        help="a run folder, a folder of weights, or hf://org/name; repeatable",
    )
    parser.add_argument("--suite", choices=SUITES, help="what to measure; quick needs no data (default without --data)")
    parser.add_argument(
        "--data", action="append", help="a folder in CLIP_benchmark's layout, a folder of such folders, or kind:where"
    )
    parser.add_argument("--caption", default="txt", help="of a source: like config.data.caption")
    parser.add_argument("--image", default="", help="of a source: like config.data.image")
    parser.add_argument("--output", required=True, help="a folder; results that are already there are not recomputed")
    parser.add_argument("--templates", help="prompts: a published set such as imagenet1k, or a file with one per line")
    parser.add_argument("--class-names", help="class names, in the order of the labels: a published set or a file")
    parser.add_argument("--labels", help="right classes by example or by class, as JSON: ReaL's, or ObjectNet's map")
    parser.add_argument("--only", help="a file with the classes, one per line, among which the nearest is chosen")
    parser.add_argument(
        "--probe",
        nargs="?",
        const="embeddings",
        choices=("embeddings", "pooled"),
        help="also a linear probe of every classification set with a split train/; pooled: before the projection",
    )
    parser.add_argument("--weights", help="weights of the models in the ensemble, as in 2,1; default: equal")
    parser.add_argument(
        "--baseline", help="an earlier --output with two or more models: effective robustness relative to their line"
    )
    parser.add_argument("--batch-size", type=int, default=64)


def run(arguments: argparse.Namespace) -> None:
    from clip_jax.evaluation import datacomp, results, runner, suites  # after parsing: JAX takes a second to import
    from clip_jax.evaluation.probe_protocol import probes

    suite = arguments.suite or ("data" if arguments.data else "quick")
    if arguments.batch_size < 1:
        raise UserError(f"--batch-size={arguments.batch_size}: at least 1")
    if len(set(map(results.file_name, arguments.model))) < len(arguments.model):
        raise UserError("--model: the same model twice")
    shares = _weights(arguments.weights, len(arguments.model))
    baseline = {}
    if arguments.baseline:
        baseline = results.load_all(Path(arguments.baseline).expanduser(), "*/*.json", "the --output")
    output = Path(arguments.output).expanduser()
    output.mkdir(parents=True, exist_ok=True)
    subjects = [open_subject(model, arguments.batch_size) for model in arguments.model]
    records, sources = [], {}
    groups = [(name, [subject]) for name, subject in zip(arguments.model, subjects, strict=True)]
    if len(subjects) > 1:
        groups.append(("ensemble", subjects))
    plans = {}
    for name, group in groups:
        size = max(subject.embedder.image_size for subject in group)
        if size not in plans:
            plans[size] = suites.tasks(
                suite,
                arguments.data or (),
                size,
                arguments.templates,
                arguments.class_names,
                labels=arguments.labels,
                only=arguments.only,
                caption=arguments.caption,
                image=arguments.image,
            )
            if arguments.probe:
                tasks, missing = plans[size]
                plans[size] = (*tasks, *probes(tasks, pooled=arguments.probe == "pooled")), missing
        tasks, missing = plans[size]
        weights = shares if len(group) > 1 else None
        fingerprint = "+".join(subject.fingerprint for subject in group) + (f" {weights}" if weights else "")
        for task in tasks:
            sources.setdefault(task.name, task.source)
            record = results.load(output, name, task, fingerprint)
            done = "done before" if record else ""
            if record is None:
                record = results.store(output, name, task, fingerprint, runner.run(task, group, weights))
            records.append(record)
            value = results.main_value(record)
            shown = "none" if value is None else f"{value:.4f}"
            print(f"{name}  {task.name}  {record['main_metric']} {shown}  {done}".rstrip(), flush=True)
    averages = suites.averages(suite, records)
    if baseline:
        averages += suites.effective_robustness(records, list(baseline.values()))
    results.write_tables(output, records, averages)
    if suite == "datacomp38":
        datacomp.write(output, records)
    for line in (*missing, *averages):
        print(line)
    _write_report(output, arguments.model, records, sources, averages)
    print(f"{output}/report.html, results.md, results.csv, results.jsonl")


def open_subject(name: str, batch_size: int):
    """A model on all devices, with its embeddings (``runner.Subject``)."""
    from clip_jax.devices.sharding import make_mesh
    from clip_jax.evaluation.embed import Variables, make_embedder
    from clip_jax.evaluation.subject import Subject
    from clip_jax.model import load

    mesh = make_mesh()
    model = load(name, mesh=mesh)
    embedder = make_embedder(model.clip, model.preset.preprocess, model.tokenizer, mesh, batch_size, workers=2)
    return Subject(name, embedder, Variables(model.params, model.batch_stats), model.scale, model.preset.tokenizer)


def _weights(text: str | None, models: int) -> list[float] | None:
    if text is None:
        return None
    try:
        shares = [float(part) for part in text.split(",")]
    except ValueError as error:
        raise UserError(f"--weights={text}: numbers separated by commas") from error
    if len(shares) != models or min(shares) < 0 or sum(shares) <= 0:
        raise UserError(f"--weights={text}: {models} numbers, none negative and not all 0")
    return shares


def _write_report(output: Path, models: list[str], records: list[dict], sources: dict, notes: list[str]) -> None:
    from clip_jax.data import images
    from clip_jax.reports import evaluation as page
    from clip_jax.storage import atomic

    def picture(dataset: str, index: int):
        return images.resize_and_crop(sources[dataset][index].image, 72)

    title = f"Evaluation of {', '.join(models)}"
    atomic.write_text(output / "report.html", page.render(title, records, picture, notes))
