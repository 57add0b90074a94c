"""``clip-jax classify --model=runs/demo --image=PATH --labels="a red circle,a blue square"``."""

import argparse

import numpy as np

HELP = "Print how probable each of some labels is for images."


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--model", required=True, help="a run's folder")
    parser.add_argument("--image", required=True, action="append", help="a file; may be given several times")
    parser.add_argument("--labels", required=True, help="texts, separated by commas")
    parser.add_argument("--template", action="append", help='a prompt with {} for the label; default "{}"')


def run(arguments: argparse.Namespace) -> None:
    from clip_jax.model import load  # JAX takes a second to import: not before the arguments are right

    labels = [label.strip() for label in arguments.labels.split(",") if label.strip()]
    model = load(arguments.model)
    probabilities = model.classify(arguments.image, labels, arguments.template or ("{}",))
    for image, row in zip(arguments.image, probabilities, strict=True):
        print(image)
        for place in np.argsort(-row, kind="stable"):
            print(f"  {row[place]:6.1%}  {labels[place]}")
