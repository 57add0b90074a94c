"""``clip-jax inspect tar:shards --html=shards.html``: the contents of a source, as a table and a page.

``--config=RECIPE`` in place of a source: all training sources of a recipe, with its tokenizer, and its first batch.
"""

import argparse
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING

from clip_jax.commands import source_options
from clip_jax.errors import UserError

if TYPE_CHECKING:
    from clip_jax.data.sources import Source
    from clip_jax.data.tokenizers import Tokenizer
    from clip_jax.reports.contents import Batch

HELP = "Print the contents of a source: sizes, captions, duplicates, unusable examples; and write a page with images."
KINDS = ("clip", "clipa", "siglip", "siglip2", "sentencepiece")
"""Those of ``data.tokenizers``, which takes long to import."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("source", nargs="?", help="kind:where, as in config.data.train")
    parser.add_argument("--config", help="a recipe, in place of a source: its training data, tokens and first batch")
    parser.add_argument("--caption", help="like config.data.caption (txt)")
    parser.add_argument("--image", help="like config.data.image")
    source_options.add_arguments(parser)
    parser.add_argument("--tokenizer", choices=KINDS, help="also count the tokens of captions")
    parser.add_argument("--vocab", help="the tokenizer's file, like config.tokenizer.vocab")
    parser.add_argument("--context-length", type=int, help="the number of tokens that a model takes (77)")
    parser.add_argument("--examples", type=int, default=1000, help="number of examples to read, evenly spaced")
    parser.add_argument("--html", help="a file to write the page to")
    parser.add_argument("--workers", type=int, default=2, help="threads that read and decode")


def run(arguments: argparse.Namespace) -> None:
    # After parsing: JAX takes a second to import.
    from clip_jax.data.statistics import inspect
    from clip_jax.reports import contents, terminal
    from clip_jax.storage import atomic

    for name in ("examples", "workers", "context_length"):
        if (value := getattr(arguments, name)) is not None and value < 1:
            raise UserError(f"--{name.replace('_', '-')}={value} must be at least 1")
    if bool(arguments.source) == bool(arguments.config):
        raise UserError("give either a source, as in tar:/data/train, or --config=RECIPE")
    sources, tokenizer, batch = _of_recipe(arguments) if arguments.config else _of_source(arguments)
    parts = []
    for source in sources:
        if not len(source):
            raise UserError(f"{source.name}: no examples")
        found = inspect(
            source, arguments.examples, contents.PICTURES, contents.PIXELS, arguments.workers, tokenizer=tokenizer
        )
        parts.append((source.name, found))
        terminal.results(source.name, contents.rows(found))
    if batch is not None:
        terminal.results("The first batch", contents.batch_rows(batch))
    if arguments.html:
        title = arguments.source or arguments.config
        try:
            atomic.write_text(Path(arguments.html).expanduser(), contents.page(title, parts, batch))
        except OSError as error:
            raise UserError(f"--html={arguments.html}: cannot be written ({error.strerror})") from error
        print(f"\n{arguments.html}")


def _of_source(arguments: argparse.Namespace) -> "tuple[tuple[Source, ...], Tokenizer | None, None]":
    from clip_jax.data import tokenizers
    from clip_jax.data.sources import open_source

    kind, vocab = arguments.tokenizer, arguments.vocab
    if kind is None and (vocab or arguments.context_length):
        raise UserError(f"--vocab and --context-length need --tokenizer: {', '.join(KINDS)}")
    if kind == "sentencepiece" and not vocab:
        raise UserError("--tokenizer=sentencepiece needs --vocab=FILE; --config=RECIPE trains one, as a run does")
    source = open_source(
        arguments.source,
        caption=arguments.caption or "txt",
        image=arguments.image or "",
        **source_options.given(arguments),
    )
    if kind is None:
        return (source,), None, None
    file = Path(vocab).expanduser() if vocab else tokenizers.hub.download(kind)
    return (source,), tokenizers.KINDS[kind](file, arguments.context_length or 77), None


def _of_recipe(arguments: argparse.Namespace) -> "tuple[tuple[Source, ...], Tokenizer, Batch]":
    """The sources, the tokenizer that a run would have, and the first pairs of its first batch."""
    import numpy as np

    from clip_jax import config as configs
    from clip_jax.data.augment_device import augment_batch
    from clip_jax.data.faults import Faults
    from clip_jax.data.sources.mixture import Mixture
    from clip_jax.data.stream import TrainingBatches
    from clip_jax.reports import contents
    from clip_jax.training.run import make_order, open_training, resolve_preset
    from clip_jax.training.setup import augmentations, training_views
    from clip_jax.training.tokenizer import prepare_tokenizer

    for name in ("caption", "image", "tokenizer", "vocab", "context_length", *source_options.NAMES):
        if getattr(arguments, name) is not None:
            raise UserError(f"--{name.replace('_', '-')}: the recipe names it; override it with --config.KEY=VALUE")
    config = configs.load(arguments.config, arguments.overrides)
    source = open_training(config, configs.resolve_preset(config).architecture.image.image_size)
    if not len(source):
        raise UserError(f"{source.name}: no examples")
    with tempfile.TemporaryDirectory() as folder:
        tokenizer = prepare_tokenizer(Path(folder), config, source)
    preset = resolve_preset(config, tokenizer)
    views = training_views(config, preset, tokenizer)
    rows = np.arange(min(config.batch_size, contents.PICTURES))
    arrays = TrainingBatches(source, make_order(config, source), views, Faults())(0, rows)
    if config.data.augment.where == "device":
        arrays["image"] = np.asarray(augment_batch(arrays["image"], augmentations(config)[1], config.seed, 0))
    texts = tuple(tokenizer.decode(row) for row in arrays["text"])
    # A text fills its row: its end token is the last of the row's tokens, and nothing is padding.
    full = int(sum(row[-1] == tokenizer.end_id and row[-2] != tokenizer.end_id for row in arrays["text"]))
    batch = contents.Batch(config.batch_size, arrays["image"], texts, tokenizer.context_length, full)
    return source.parts if isinstance(source, Mixture) else (source,), tokenizer, batch
