"""``clip-jax fewshot --model=runs/demo --data=folder:parts --shots=1,2,4,8``: how many labeled images does it take?"""

import argparse
from pathlib import Path

from clip_jax.errors import UserError

HELP = "Fit a classifier on a few labeled images per class: accuracy by the number of shots, compared with zero-shot."
TEST_SHARE = 5
"""Without --test, one in this many images of each class is held out."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--model", required=True, help="a run folder, a folder of weights, or hf://org/name")
    parser.add_argument(
        "--data", required=True, help="a source with labels, such as folder:DIR with a folder per class"
    )
    parser.add_argument(
        "--test", help="a source to test on, with the same classes; default: a fifth of each class of --data"
    )
    parser.add_argument("--shots", default="1,2,4,8,16", help="images per class, separated by commas")
    parser.add_argument("--seeds", type=int, default=3, help="random draws for each number of shots")
    parser.add_argument("--template", action="append", help='zero-shot prompts, default "a photo of a {}."')
    parser.add_argument("--head", help="write the classifier that is fitted on all training images, as .npz")
    parser.add_argument("--batch-size", type=int, default=64)


def run(arguments: argparse.Namespace) -> None:
    import numpy as np

    from clip_jax.commands.evaluate import open_subject  # after parsing: JAX takes a second to import
    from clip_jax.data.sources import open_source
    from clip_jax.evaluation import probe, zero_shot
    from clip_jax.evaluation.datasets import DEFAULT_TEMPLATES
    from clip_jax.evaluation.prompts import Prompts

    shots = _numbers(arguments.shots)
    if arguments.seeds < 1 or arguments.batch_size < 1:
        raise UserError("--seeds and --batch-size: at least 1")
    source = open_source(arguments.data)
    names = tuple(source.class_names)
    if len(names) < 2:
        raise UserError(f"{arguments.data}: its images have no labels; give a folder with a folder of images per class")
    test_source = open_source(arguments.test) if arguments.test else None
    if test_source is not None and tuple(test_source.class_names) != names:
        raise UserError(f"{arguments.test}: its classes are not those of {arguments.data}")
    subject = open_subject(arguments.model, arguments.batch_size)
    found = subject.embed(source, texts=False)
    if test_source is None:
        held_out = _held_out(found.labels)
        train = found.images[~held_out], found.labels[~held_out]
        test = found.images[held_out], found.labels[held_out]
    else:
        tested = subject.embed(test_source, texts=False)
        train, test = (found.images, found.labels), (tested.images, tested.labels)
    classes = subject.classifier(Prompts(names, tuple(arguments.template or DEFAULT_TEMPLATES)))
    baseline = float(zero_shot.judge(*test, classes).hits().mean())
    print(f"zero-shot      {baseline:.4f}  ({len(test[1])} test images, {len(names)} classes)")
    curve = {}
    for count in shots:
        curve |= probe.few_shot(train, test, len(names), [count], seeds=arguments.seeds)
        print(f"{count:>4} shots     {np.mean(curve[count]):.4f}  +- {np.std(curve[count]):.4f}", flush=True)
    head = probe.logistic_regression(*train, len(names), c=1.0)
    print(f"all {len(train[1])} images  {head.accuracy(*test):.4f}")
    equal = probe.shots_that_equal(curve, baseline)
    print("zero-shot accuracy is " + ("not reached" if equal is None else f"reached with {equal:.1f} shots"))
    if arguments.head:
        head_file = Path(arguments.head).expanduser().with_suffix(".npz")
        probe.write_head(head_file, probe.Head(head, names, subject.fingerprint))
        print(f"{head_file}: for clip-jax classify --head; logits = model.encode_image(images) @ weights + bias")


def _held_out(labels):
    """A fifth of each class, at least one image; the same draw every time."""
    import numpy as np

    held_out = np.zeros(len(labels), bool)
    for label in np.unique(labels):
        own = np.flatnonzero(labels == label)
        if len(own) < 2:
            raise UserError(f"class {label} has one usable image: none is left to test; give --test")
        held_out[np.random.default_rng(label).permutation(own)[: max(1, len(own) // TEST_SHARE)]] = True
    return held_out


def _numbers(text: str) -> list[int]:
    parts = text.split(",")
    if not all(part.strip().isdigit() and int(part) > 0 for part in parts):
        raise UserError(f"--shots={text}: numbers separated by commas, as in 1,2,4")
    return sorted({int(part) for part in parts})
