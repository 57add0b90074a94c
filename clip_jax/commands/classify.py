"""``clip-jax classify --model=runs/demo --image=PATH --labels="a red circle,a blue square"``."""

import argparse

import numpy as np

from clip_jax.data import templates

HELP = "Print the probability of each label for each image."


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--model", required=True, help="a run folder, a folder of weights, or hf://org/name")
    parser.add_argument("--image", required=True, action="append", help="an image file; may be repeated")
    parser.add_argument("--labels", required=True, help="texts separated by commas")
    parser.add_argument(
        "--template", action="append", help='a prompt with {} for the label, default "{}"; may be repeated'
    )


def run(arguments: argparse.Namespace) -> None:
    from clip_jax.model import load  # after parsing: JAX takes a second to import

    prompts = arguments.template or ("{}",)
    templates.check("--template", prompts)
    labels = [label.strip() for label in arguments.labels.split(",") if label.strip()]
    model = load(arguments.model)
    probabilities = model.classify(arguments.image, labels, prompts)
    for image, row in zip(arguments.image, probabilities, strict=True):
        print(image)
        for label in np.argsort(-row, kind="stable"):
            print(f"  {row[label]:6.1%}  {labels[label]}")
