"""``clip-jax fewshot --model=runs/demo --data=folder:parts --shots=1,2,4,8``: how many labeled images does it take?

With ``--features=X.npy --labels=Y.npy`` in their place, the same of features that any library made.
"""

import argparse
from pathlib import Path
from typing import NamedTuple

import numpy as np

from clip_jax.errors import UserError

HELP = "Fit a classifier on a few labeled images per class: accuracy by the number of shots, compared with zero-shot."
TEST_SHARE = 5
"""Without --test, one in this many images of each class is held out."""
OF_A_MODEL = ("model", "data", "test", "template", "pooled")
OF_FEATURES = ("features", "labels", "test_features", "test_labels")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--model", help="a run folder, a folder of weights, or hf://org/name")
    parser.add_argument("--data", help="a source with labels, such as folder:DIR with a folder per class")
    parser.add_argument(
        "--test", help="a source to test on, with the same classes; default: a fifth of each class of --data"
    )
    parser.add_argument("--features", help="in place of --model and --data: a .npy file with a row for each example")
    parser.add_argument("--labels", help="the labels of --features, a .npy file of whole numbers")
    parser.add_argument("--test-features", help="to test on; default: a fifth of each class of --features")
    parser.add_argument("--test-labels")
    parser.add_argument("--shots", default="1,2,4,8,16", help="images per class, separated by commas; all: no fewer")
    parser.add_argument("--seeds", type=int, default=3, help="random draws for each number of shots")
    parser.add_argument("--template", action="append", help='zero-shot prompts, default "a photo of a {}."')
    parser.add_argument(
        "--pooled", action="store_true", help="features before the projection, as in the CLIP paper's linear probes"
    )
    parser.add_argument("--head", help="write the classifier that is fitted on all training images, as .npz")
    parser.add_argument("--batch-size", type=int, default=64)


Labeled = tuple[np.ndarray, np.ndarray]
"""Features and their classes."""


class Data(NamedTuple):
    """Features and labels to fit and to test on."""

    train: Labeled
    test: Labeled
    class_names: tuple[str, ...]
    zero_shot: float | None
    """The accuracy of the model without training."""
    model: str
    """Its fingerprint."""


def run(arguments: argparse.Namespace) -> None:
    from clip_jax.evaluation import probe  # after parsing: JAX takes a second to import

    shots = _numbers(arguments.shots)
    if arguments.seeds < 1 or arguments.batch_size < 1:
        raise UserError("--seeds and --batch-size: at least 1")
    given = {name for name in (*OF_A_MODEL, *OF_FEATURES) if getattr(arguments, name)}
    needed = ("features", "labels") if given & {*OF_FEATURES} else ("model", "data")
    if (given & {*OF_A_MODEL} and given & {*OF_FEATURES}) or not given.issuperset(needed):
        raise UserError("give --model and --data, or --features and --labels")
    if arguments.pooled and arguments.head:
        raise UserError("--head: clip-jax classify has the embeddings after the projection; leave out --pooled")
    data = _files(arguments) if arguments.features else _embeddings(arguments)
    (train, test), classes = (data.train, data.test), len(data.class_names)
    if data.zero_shot is None:
        print(f"{len(test[1])} test examples, {classes} classes, {train[0].shape[1]} features")
    else:
        print(f"zero-shot      {data.zero_shot:.4f}  ({len(test[1])} test images, {classes} classes)")
    curve = {}
    for count in shots:
        curve |= probe.few_shot(train, test, classes, [count], seeds=arguments.seeds)
        print(f"{count:>4} shots     {np.mean(curve[count]):.4f}  +- {np.std(curve[count]):.4f}", flush=True)
    found = probe.linear_probe_of(*train, classes)
    what = "examples" if data.zero_shot is None else "images"
    accuracy = found.head.accuracy(*test)
    print(f"all {len(train[1])} {what}  {accuracy:.4f}  (C = {found.c:.3g}, chosen on a third of them)")
    if data.zero_shot is not None and curve:
        equal = probe.shots_that_equal(curve, data.zero_shot)
        print("zero-shot accuracy is " + ("not reached" if equal is None else f"reached with {equal:.1f} shots"))
    if arguments.head:
        head_file = Path(arguments.head).expanduser().with_suffix(".npz")
        probe.write_head(head_file, probe.Head(found.head, data.class_names, data.model))
        use = "for clip-jax classify --head; logits = model.encode_image(images)" if data.model else "logits = features"
        print(f"{head_file}: {use} @ weights + bias")


def _embeddings(arguments: argparse.Namespace) -> Data:
    """The features of a model."""
    from clip_jax.commands.evaluate import open_subject
    from clip_jax.data.sources import open_source
    from clip_jax.evaluation import zero_shot
    from clip_jax.evaluation.datasets import DEFAULT_TEMPLATES
    from clip_jax.evaluation.prompts import Prompts

    source = open_source(arguments.data)
    names = tuple(source.class_names)
    if len(names) < 2:
        raise UserError(f"{arguments.data}: its images have no labels; give a folder with a folder of images per class")
    test_source = open_source(arguments.test) if arguments.test else None
    if test_source is not None and tuple(test_source.class_names) != names:
        raise UserError(f"{arguments.test}: its classes are not those of {arguments.data}")
    subject = open_subject(arguments.model, arguments.batch_size)
    classes = subject.classifier(Prompts(names, tuple(arguments.template or DEFAULT_TEMPLATES)))

    def split(subject) -> tuple[Labeled, Labeled]:
        found = subject.embed(source, texts=False)
        tested = None if test_source is None else subject.embed(test_source, texts=False)
        return _split((found.images, found.labels), None if tested is None else (tested.images, tested.labels))

    train, test = split(subject.pooled() if arguments.pooled else subject)
    baseline = float(zero_shot.judge(*split(subject)[1], classes).hits().mean())
    return Data(train, test, names, baseline, subject.fingerprint)


def _files(arguments: argparse.Namespace) -> Data:
    """The features of files."""
    from clip_jax.evaluation.features import read_features

    if bool(arguments.test_features) != bool(arguments.test_labels):
        raise UserError("--test-features and --test-labels: both or neither")
    found = read_features(arguments.features, arguments.labels)
    values = np.unique(found.labels)
    if len(values) < 2:
        raise UserError(f"{arguments.labels}: all examples have the label {values[0]}; a classifier needs two or more")
    tested = None
    if arguments.test_features:
        tested = read_features(arguments.test_features, arguments.test_labels, found)
        tested = tested.features, np.searchsorted(values, tested.labels)
    train, test = _split((found.features, np.searchsorted(values, found.labels)), tested)
    return Data(train, test, tuple(map(str, values.tolist())), None, "")


def _split(found: Labeled, tested: Labeled | None) -> tuple[Labeled, Labeled]:
    """(to fit on, to test on); without the latter, a fifth of each class, at least one image, always the same."""
    if tested is not None:
        return found, tested
    features, labels = found
    held_out = np.zeros(len(labels), bool)
    for label in np.unique(labels):
        members = np.flatnonzero(labels == label)
        if len(members) < 2:
            raise UserError(f"class {label} has one usable image: none is left to test; give --test or --test-features")
        held_out[np.random.default_rng(label).permutation(members)[: max(1, len(members) // TEST_SHARE)]] = True
    return (features[~held_out], labels[~held_out]), (features[held_out], labels[held_out])


def _numbers(text: str) -> list[int]:
    """The numbers of shots; ``all``, which is fitted in any case, is none of them."""
    parts = [part.strip() for part in text.split(",")]
    if not all(part == "all" or (part.isdigit() and int(part) > 0) for part in parts):
        raise UserError(f"--shots={text}: numbers separated by commas, as in 1,2,4, or all")
    return sorted({int(part) for part in parts if part != "all"})
