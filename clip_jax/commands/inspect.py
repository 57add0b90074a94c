"""``clip-jax inspect tar:shards --html=shards.html``: the contents of a source, as a table and a page."""

import argparse
from pathlib import Path

from clip_jax.errors import UserError

HELP = "Print the contents of a source: sizes, captions, duplicates, unusable examples; and write a page with images."


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("source", help="kind:where, as in config.data.train")
    parser.add_argument("--caption", default="txt", help="like config.data.caption")
    parser.add_argument("--image", default="", help="like config.data.image")
    parser.add_argument("--examples", type=int, default=1000, help="number of examples to read, evenly spaced")
    parser.add_argument("--html", help="a file to write the page to")
    parser.add_argument("--workers", type=int, default=2, help="threads that read and decode")


def run(arguments: argparse.Namespace) -> None:
    # After parsing: JAX takes a second to import.
    from clip_jax.data.sources import open_source
    from clip_jax.data.statistics import inspect
    from clip_jax.reports import contents, terminal
    from clip_jax.storage import atomic

    for name in ("examples", "workers"):
        if getattr(arguments, name) < 1:
            raise UserError(f"--{name}={getattr(arguments, name)} must be at least 1")
    source = open_source(arguments.source, caption=arguments.caption, image=arguments.image)
    if not len(source):
        raise UserError(f"{arguments.source}: no examples")
    found = inspect(source, arguments.examples, contents.PICTURES, contents.PIXELS, arguments.workers)
    terminal.results(source.name, contents.rows(found))
    if arguments.html:
        try:
            atomic.write_text(Path(arguments.html).expanduser(), contents.page(source.name, found))
        except OSError as error:
            raise UserError(f"--html={arguments.html}: cannot be written ({error.strerror})") from error
        print(f"\n{arguments.html}")
