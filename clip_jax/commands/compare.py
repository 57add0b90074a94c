"""``clip-jax compare A B``: two models on the same examples, from the folders that ``clip-jax evaluate`` wrote."""

import argparse
from pathlib import Path

from clip_jax.errors import UserError

HELP = "Compare the results of two models example by example: differences with 95 % intervals (paired bootstrap)."


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("a", metavar="A", help="the folder of a model in an evaluation's output")
    parser.add_argument("b", metavar="B", help="the same of another model; differences are B minus A")
    parser.add_argument(
        "--changed",
        type=int,
        default=0,
        help="also list, per metric, the first N examples that only one of the models gets right",
    )


def run(arguments: argparse.Namespace) -> None:
    import numpy as np

    from clip_jax.evaluation import results
    from clip_jax.evaluation.paired import difference

    folders = [Path(folder).expanduser() for folder in (arguments.a, arguments.b)]
    a, b = (results.load_all(folder, "*.json", "a model's folder in the --output") for folder in folders)
    shared = [name for name in a if name in b]
    if not shared:
        raise UserError(f"{arguments.a} and {arguments.b} have no dataset in common")
    for name in shared:
        if not _same_examples(a[name], b[name]):
            print(f"{name}: other examples or another protocol; not compared")
            continue
        hits = [np.load(folder / f"{name}.npz") for folder in folders]
        indices = hits[1].get(results.INDICES)
        for metric in sorted((set(hits[0]) & set(hits[1])) - {results.INDICES}):
            try:
                found = difference(hits[0][metric], hits[1][metric])
            except ValueError as error:
                print(f"{name}  {metric}: {error}")
                continue
            print(
                f"{name}  {metric}  {found.mean:+.4f}  [{found.low:+.4f}, {found.high:+.4f}]  "
                f"{found.better} better, {found.worse} worse"
            )
            delta = hits[1][metric] - hits[0][metric]
            for row in np.flatnonzero(delta)[: arguments.changed]:
                example = f"value {row}" if indices is None else f"example {indices[row]} of {b[name]['source']}"
                print(f"  {example}: {'gained' if delta[row] > 0 else 'lost'}")


def _same_examples(a: dict, b: dict) -> bool:
    keys = ["protocol", "source", "train"]
    if a["source"].startswith("shapes:"):  # the same scenes, rendered at the size of each model
        keys = ["protocol"]
    same = all(a["identity"][key] == b["identity"][key] for key in keys)
    return same and a["source"] == b["source"] and a["examples"] == b["examples"]
