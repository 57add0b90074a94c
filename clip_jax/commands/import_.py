"""``clip-jax import ViT-B-32.pt --to=DIR``: torch's files become safetensors, without torch."""

import argparse
from pathlib import Path

HELP = "Turn a .pt, .bin or TorchScript file into safetensors; only tensors are read from it, and none of it is run."


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("source", help="a file, a folder of OpenCLIP or Transformers that has a .bin, or hf://org/name")
    parser.add_argument("--to", required=True, help="a new folder")
    parser.add_argument("--model", help="the model's name, where neither the file nor a config beside it tells")


def run(arguments: argparse.Namespace) -> None:
    from clip_jax.interop import folders
    from clip_jax.interop.convert import convert

    for line in convert(folders.local(arguments.source, pickles=True), Path(arguments.to), arguments.model):
        print(line)
