"""``clip-jax search --index=DIR --model=runs/demo --text="a red circle"``."""

import argparse
import json
import sys
from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING

from clip_jax.errors import UserError

if TYPE_CHECKING:
    from clip_jax.commands.finder import Finder

HELP = (
    "Find the nearest images (or captions) of an index that embed wrote: exactly, in blocks, or approximately by faiss."
)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--index", required=True, help="a folder that clip-jax embed wrote")
    parser.add_argument("--model", help="default: the one that the index was made with")
    parser.add_argument("--text", action="append", default=[], help="a query; may be repeated")
    parser.add_argument("--image", action="append", default=[], help="an image file as a query; may be repeated")
    parser.add_argument("--among", choices=("image", "text"), default="image", help="what is searched")
    parser.add_argument("-k", type=int, default=10, help="hits per query")
    add_approximate(parser)
    parser.add_argument("--json", action="store_true", help="one JSON object per query")


def add_approximate(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--approximate",
        nargs="?",
        const="",
        metavar="FACTORY",
        help="by faiss, which is built on first use; FACTORY: its description, such as IVF4096,PQ64; default: by size",
    )
    parser.add_argument(
        "--recall", type=float, default=0.95, help="of the exact 10 nearest, that --approximate is to reach"
    )


def check_recall(arguments: argparse.Namespace) -> None:
    if not 0 < arguments.recall <= 1:
        raise UserError(f"--recall={arguments.recall}: more than 0 and at most 1")


def approximately(finder: "Finder", arguments: argparse.Namespace, among: Iterable[str]) -> "Finder":
    """With ``--approximate``, searches these kinds of embeddings by faiss and prints the recall of each."""
    if arguments.approximate is None:
        return finder
    for kind in among:
        finder = finder.approximately(kind, arguments.approximate, arguments.recall)
        print(f"# {kind}: {finder.approximate[kind].described()}", file=sys.stderr)
    return finder


def run(arguments: argparse.Namespace) -> None:
    import numpy as np

    from clip_jax.commands.finder import open_finder  # after parsing: JAX takes a second to import
    from clip_jax.evaluation.index import embeddings

    if not arguments.text and not arguments.image:
        raise UserError('nothing to search for: give --text="..." or --image=PATH')
    if arguments.k < 1:
        raise UserError(f"-k {arguments.k}: at least 1")
    check_recall(arguments)
    folder = Path(arguments.index).expanduser()
    embeddings(folder, arguments.among)  # a folder without any is reported before a model is loaded
    finder = open_finder(folder, arguments.model)
    finder = approximately(finder, arguments, (arguments.among,))
    queries = [finder.model.encode_text(arguments.text)] if arguments.text else []
    queries += [finder.model.encode_image(arguments.image)] if arguments.image else []
    found = finder.find(np.concatenate(queries), arguments.among, arguments.k)
    for query, hits in zip((*arguments.text, *arguments.image), found, strict=True):
        if arguments.json:
            print(json.dumps({"query": query, "hits": hits}, allow_nan=False))
            continue
        print(query)
        for row in hits:
            print(f"  {row['similarity']:.3f}  {row['image_path']}  {row['caption']}")
