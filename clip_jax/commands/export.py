"""``clip-jax export --model=runs/demo --format=openclip --to=DIR``."""

import argparse
from pathlib import Path

from clip_jax.errors import UserError

FORMATS = ("openclip", "huggingface", "bigvision", "stablehlo")
HELP = "Write a model in the format of OpenCLIP, Transformers, big_vision or StableHLO."


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--model", required=True, help="a run folder, a folder of weights, or hf://org/name")
    parser.add_argument("--format", required=True, choices=FORMATS)
    parser.add_argument("--to", required=True, help="a new folder")


def run(arguments: argparse.Namespace) -> None:
    from clip_jax.interop import folders
    from clip_jax.interop.export import export
    from clip_jax.model import load  # after parsing: JAX takes a second to import

    model, source = load(arguments.model), folders.local(arguments.model)
    try:
        tokenizer = model.tokenizer
    except UserError as error:
        tokenizer = None
        print(f"tokenizer: {error}")
    to = Path(arguments.to).expanduser()
    for line in export(
        to,
        arguments.format,
        name=model.name,
        preset=model.preset,
        params=model.params,
        batch_stats=model.batch_stats,
        tokenizer=tokenizer,
        source=source,
    ):
        print(line)
    print(f"{to}: {', '.join(sorted(path.name for path in to.iterdir()))}")
