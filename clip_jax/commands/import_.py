"""``clip-jax import ViT-B-32.pt --to=DIR``: converts PyTorch files to safetensors, without PyTorch."""

import argparse
from pathlib import Path

HELP = "Convert a .pt, .bin or TorchScript file to safetensors, reading only tensors and executing none of its code."


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("source", help="a file, an OpenCLIP or Transformers folder with a .bin, or hf://org/name")
    parser.add_argument("--to", required=True, help="a new folder")
    parser.add_argument("--model", help="the name of the model, if neither the file nor a config next to it states it")


def run(arguments: argparse.Namespace) -> None:
    from clip_jax.interop import folders
    from clip_jax.interop.convert import convert

    for line in convert(
        folders.local(arguments.source, pickles=True), Path(arguments.to).expanduser(), arguments.model
    ):
        print(line)
