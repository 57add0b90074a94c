"""``clip-jax search --index=DIR --model=runs/demo --text="a red circle"``."""

import argparse
import json
from pathlib import Path

from clip_jax.errors import UserError

HELP = "Find the nearest images (or captions) of an index that embed wrote: exactly, in blocks."


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--index", required=True, help="a folder that clip-jax embed wrote")
    parser.add_argument("--model", help="default: the one that the index was made with")
    parser.add_argument("--text", action="append", default=[], help="a query; may be repeated")
    parser.add_argument("--image", action="append", default=[], help="an image file as a query; may be repeated")
    parser.add_argument("--among", choices=("image", "text"), default="image", help="what is searched")
    parser.add_argument("-k", type=int, default=10, help="hits per query")
    parser.add_argument("--json", action="store_true", help="one JSON object per query")


def run(arguments: argparse.Namespace) -> None:
    import numpy as np

    from clip_jax.devices.sharding import make_mesh
    from clip_jax.evaluation import index
    from clip_jax.evaluation.search import search
    from clip_jax.model import load  # after parsing: JAX takes a second to import

    if not arguments.text and not arguments.image:
        raise UserError('nothing to search for: give --text="..." or --image=PATH')
    if arguments.k < 1:
        raise UserError(f"-k {arguments.k}: at least 1")
    folder = Path(arguments.index).expanduser()
    vectors = index.embeddings(folder, arguments.among)
    model = load(arguments.model or _model_of(folder))
    if model.embed_dim != vectors[0].shape[1]:
        raise UserError(
            f"{folder}: embeddings of {vectors[0].shape[1]} features, but {model.name} has {model.embed_dim}; "
            "search with the model that made them"
        )
    queries = [model.encode_text(arguments.text)] if arguments.text else []
    queries += [model.encode_image(arguments.image)] if arguments.image else []
    hits = search(np.concatenate(queries), vectors, arguments.k, make_mesh())
    for query, similarity, number in zip((*arguments.text, *arguments.image), *hits, strict=True):
        there = number >= 0
        rows = list(index.metadata(folder, number[there].tolist()))
        found = [row | {"similarity": float(s)} for row, s in zip(rows, similarity[there], strict=True)]
        if arguments.json:
            print(json.dumps({"query": query, "hits": found}, allow_nan=False))
            continue
        print(query)
        for row in found:
            print(f"  {row['similarity']:.3f}  {row['image_path']}  {row['caption']}")


def _model_of(folder: Path) -> str:
    from clip_jax.evaluation.index import MANIFEST

    try:
        return json.loads((folder / MANIFEST).read_text(encoding="utf-8"))["model_name"]
    except (OSError, ValueError, KeyError) as error:
        raise UserError(f"{folder}/{MANIFEST}: does not name a model; give --model") from error
