"""``clip-jax embed --model=runs/demo --data=folder:photos --output=DIR``."""

import argparse
from pathlib import Path

from clip_jax.errors import UserError

HELP = "Write the embeddings of a source in clip-retrieval's layout; resumable."


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--model", required=True, help="a run folder, a folder of weights, or hf://org/name")
    parser.add_argument("--data", required=True, help="kind:where, as in folder:photos or tar:/data/train")
    parser.add_argument("--caption", default="txt", help="like config.data.caption")
    parser.add_argument("--image", default="", help="like config.data.image")
    parser.add_argument("--output", required=True, help="a folder; shards that are already there are skipped")
    parser.add_argument("--shard-size", type=int, default=100_000, help="examples per file")
    parser.add_argument("--shards", help="only these shards, as in 0-99: a part for one worker of a cluster")
    parser.add_argument("--dtype", choices=("float16", "float32"), default="float16")
    parser.add_argument("--batch-size", type=int, default=64)


def run(arguments: argparse.Namespace) -> None:
    from clip_jax.commands.evaluate import open_subject  # after parsing: JAX takes a second to import
    from clip_jax.data.sources import open_source
    from clip_jax.evaluation import index
    from clip_jax.evaluation.embed import embed_source

    size = arguments.shard_size
    if size < 1 or arguments.batch_size < 1:
        raise UserError("--shard-size and --batch-size: at least 1")
    source = open_source(arguments.data, caption=arguments.caption, image=arguments.image)
    shards = _shards(arguments.shards, -(-len(source) // size))
    subject = open_subject(arguments.model, arguments.batch_size)
    output = Path(arguments.output).expanduser()
    manifest = {
        "model": subject.fingerprint,
        "source": source.fingerprint,
        "shard_size": size,
        "dtype": arguments.dtype,
    }
    names = {"data": arguments.data, "caption": arguments.caption, "image": arguments.image}
    index.prepare(output, manifest | names | {"model_name": arguments.model})
    for shard in shards:
        if index.is_complete(output, shard):
            print(f"shard {shard}: done before")
            continue
        count = index.write_shard(
            output,
            shard,
            source,
            lambda part: embed_source(subject.embedder, subject.weights, part),
            size,
            arguments.dtype,
        )
        print(f"shard {shard}: {count} embeddings", flush=True)


def _shards(text: str | None, count: int) -> range:
    if text is None:
        return range(count)
    first, _, last = text.partition("-")
    if not (first.isdigit() and (last or first).isdigit() and int(first) <= int(last or first) < count):
        raise UserError(f"--shards={text}: one of 0 to {count - 1}, or two of them as in 0-{count - 1}")
    return range(int(first), int(last or first) + 1)
