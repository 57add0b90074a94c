"""``clip-jax segment --model=runs/demo --image=PATH --labels="a red circle,the background" --output=DIR``."""

import argparse
from pathlib import Path

from clip_jax.errors import UserError

HELP = "Draw where in an image each label is: maps of patches, without training (see docs/evaluation.md)."
SIDE = 320
"""Pixels of the longer side of each picture."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--model", required=True, help="a run folder, a folder of weights, or hf://org/name")
    parser.add_argument("--image", required=True, action="append", help="a file, folder or pattern; may be repeated")
    parser.add_argument("--labels", default="", help="texts separated by commas")
    parser.add_argument("--labels-file", help="a file with one label per line")
    parser.add_argument("--template", action="append", help='a prompt with {} for the label, default "{}"')
    parser.add_argument("--output", required=True, help="a folder: one PNG per image")


def run(arguments: argparse.Namespace) -> None:
    import numpy as np

    from clip_jax.commands.classify import read_labels
    from clip_jax.commands.evaluate import open_subject  # after parsing: JAX takes a second to import
    from clip_jax.commands.paths import find_images
    from clip_jax.data import images, templates
    from clip_jax.evaluation import dense
    from clip_jax.evaluation.prompts import Prompts
    from clip_jax.reports import maps
    from clip_jax.storage import atomic

    labels, files = read_labels(arguments.labels, arguments.labels_file), find_images(arguments.image)
    prompts = tuple(arguments.template or ("{}",))
    templates.check("--template", prompts)
    names = [f"{file.stem}.png" for file in files]
    if len(set(names)) < len(names):
        raise UserError("--image: two files have the same name; draw them into different folders")
    subject = open_subject(arguments.model, batch_size=8)
    classes = subject.classifier(Prompts(tuple(labels), prompts))
    make, output = dense.map_maker(subject), Path(arguments.output).expanduser()
    output.mkdir(parents=True, exist_ok=True)
    for file, name in zip(files, names, strict=True):
        try:
            data = file.read_bytes()
            picture = images.decode(data, exif=subject.embedder.preprocess.exif)
        except (OSError, images.BadImageError) as error:
            raise UserError(f"{file}: {getattr(error, 'strerror', None) or error}") from error
        scale = SIDE / max(picture.size)
        picture = picture.resize([max(1, round(scale * side)) for side in picture.size])
        found = dense.upsample(make(data) @ classes.T, picture.height, picture.width)
        share = np.bincount(found.argmax(axis=2).ravel(), minlength=len(labels)) / found[..., 0].size
        with atomic.replacing(output / name) as temporary:
            maps.draw(np.asarray(picture), found, labels).save(temporary, "PNG")
        print(output / name)
        for label in np.argsort(-share, kind="stable"):
            print(f"  {share[label]:6.1%}  {labels[label]}")
