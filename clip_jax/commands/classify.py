"""``clip-jax classify --model=runs/demo --image=PATH --labels="a red circle,a blue square"``."""

import argparse
import sys
from pathlib import Path

import numpy as np

from clip_jax.commands.paths import find_images
from clip_jax.data import templates
from clip_jax.errors import UserError

HELP = "Print the probability of each label for each image."


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--model", required=True, help="a run folder, a folder of weights, or hf://org/name")
    parser.add_argument(
        "--image",
        required=True,
        action="append",
        help="a file, folder or pattern ('photos/*.jpg'); may be repeated",
    )
    parser.add_argument("--labels", default="", help="texts separated by commas")
    parser.add_argument("--labels-file", help="a file with one label per line, for labels with commas or many labels")
    parser.add_argument("--head", help="a classifier that clip-jax fewshot wrote, in place of labels")
    parser.add_argument(
        "--template", action="append", help='a prompt with {} for the label, default "{}"; may be repeated'
    )
    parser.add_argument("--top", type=int, help="print only this many labels, the most probable ones")


def run(arguments: argparse.Namespace) -> None:
    given = arguments.labels or arguments.labels_file or arguments.template
    if arguments.head and given:
        raise UserError("--head: has its own labels; give no others and no --template")
    labels = [] if arguments.head else read_labels(arguments.labels, arguments.labels_file)
    images = find_images(arguments.image)
    if arguments.top is not None and arguments.top < 1:
        raise UserError(f"--top={arguments.top} must be at least 1")
    prompts = arguments.template or ("{}",)
    templates.check("--template", prompts)
    from clip_jax.evaluation import probe  # after parsing: JAX takes a second to import
    from clip_jax.evaluation.embed import Variables
    from clip_jax.evaluation.subject import fingerprint
    from clip_jax.model import load

    model = load(arguments.model)
    if arguments.head:
        head = probe.read_head(Path(arguments.head).expanduser(), model.embed_dim)
        variables = Variables(model.params, model.batch_stats)
        if head.model != fingerprint(variables, model.preset.tokenizer, model.image_size, model.preset.preprocess):
            print(f"{arguments.head}: was fitted on the features of other weights", file=sys.stderr)
        labels, probabilities = head.class_names, head.probabilities(model.encode_image(images))
    else:
        probabilities = model.classify(images, labels, prompts)
    for image, row in zip(images, probabilities, strict=True):
        print(image)
        for label in np.argsort(-row, kind="stable")[: arguments.top]:
            print(f"  {row[label]:6.1%}  {labels[label]}")


def read_labels(given: str, file: str | None) -> list[str]:
    """The labels of ``--labels`` and of the lines of ``--labels-file``. Raises UserError if there is none."""
    labels = [label.strip() for label in given.split(",")]
    if file is not None:
        try:
            labels += [line.strip() for line in Path(file).expanduser().read_text(encoding="utf-8").splitlines()]
        except (OSError, UnicodeDecodeError) as error:
            reason = getattr(error, "strerror", None) or "not UTF-8"
            raise UserError(f"--labels-file={file}: cannot be read ({reason})") from error
    labels = [label for label in labels if label]
    if not labels:
        raise UserError('no labels: give --labels="a cat,a dog", or --labels-file=FILE with one per line')
    return labels
