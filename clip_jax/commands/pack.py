"""``clip-jax pack parquet:pairs.parquet --to=shards``: any source as tar shards or as a TFDS dataset."""

import argparse
import sys
from pathlib import Path

from clip_jax.commands import source_options
from clip_jax.errors import UserError

HELP = "Write any source of data as tar shards or ArrayRecord files, which training reads fastest and in any order."


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("source", help="kind:where, as in config.data.train")
    parser.add_argument("--to", required=True, help="a folder for the shards")
    parser.add_argument(
        "--format",
        choices=("tar", "array_record"),
        default="tar",
        help="array_record: a TFDS dataset, named by the folder",
    )
    parser.add_argument("--caption", default="txt", help="like config.data.caption")
    parser.add_argument("--image", default="", help="like config.data.image")
    parser.add_argument("--boxes", default="", help="like config.data.boxes: boxes with texts are packed, too")
    source_options.add_arguments(parser)
    parser.add_argument("--per-shard", type=int, default=10_000, help="examples in a shard")
    parser.add_argument("--max-size", type=int, default=0, help="resize images whose shorter side is longer (pixels)")
    parser.add_argument("--workers", type=int, default=2, help="shards that are written at a time")


def run(arguments: argparse.Namespace) -> None:
    # After parsing: JAX takes a second to import.
    from clip_jax.batching import bar
    from clip_jax.data.packing import pack
    from clip_jax.data.sources import boxes, open_source
    from clip_jax.reports import terminal

    for name, least in (("per_shard", 1), ("workers", 1), ("max_size", 0)):
        if getattr(arguments, name) < least:
            raise UserError(f"--{name.replace('_', '-')}={getattr(arguments, name)} must be at least {least}")
    source = open_source(
        arguments.source,
        caption=arguments.caption,
        image=arguments.image,
        boxes=arguments.boxes,
        **source_options.given(arguments),
    )
    to = Path(arguments.to).expanduser()
    with bar(len(source), sys.stderr.isatty(), "packing") as advance:
        found = pack(
            source,
            to,
            per_shard=arguments.per_shard,
            max_size=arguments.max_size,
            workers=arguments.workers,
            form=arguments.format,
            advance=advance,
        )
    left_out = ", ".join(f"{count} {reason}" for reason, count in found.faults.most_common()) or "none"
    earlier = f", {found.earlier} of them from an earlier call" if found.earlier else ""
    use = f"tar:{to} (all captions of an example: --config.data.caption=captions)"
    if arguments.format == "array_record":
        use = f"tfds:{to.name} with --config.data.tfds_dir={to.parent}"
    if boxes.are_in(source):
        use = f"{use}; boxes: --config.data.boxes={boxes.FIELD}"
    terminal.results(
        str(to),
        [
            ("shards", f"{found.shards}{earlier}"),
            ("written", f"{found.written:,} examples"),
            ("left out", left_out),
            ("use as", use),
        ],
    )
