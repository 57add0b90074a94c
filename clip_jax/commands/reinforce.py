"""``clip-jax reinforce --data=tar:/data/train --teacher=hf://org/name --output=DIR``."""

import argparse
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np

from clip_jax.commands.embed import _shards
from clip_jax.errors import UserError

HELP = "Write teachers' embeddings of augmented views of a source, for distillation; resumable."


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--data", required=True, help="kind:where, the same as config.data.train")
    parser.add_argument("--caption", default="txt", help="like config.data.caption")
    parser.add_argument("--image", default="", help="like config.data.image")
    parser.add_argument(
        "--teacher", required=True, action="append", help="a run, a folder of weights, or hf://org/name; repeatable"
    )
    parser.add_argument("--output", required=True, help="a folder; shards that are already there are skipped")
    parser.add_argument("--views", type=int, default=10, help="crops per image (MobileCLIP: 10 to 30)")
    parser.add_argument("--captions", type=int, default=5, help="captions per image at most")
    parser.add_argument("--crop-scale", default="0.08,1", help="area of a crop, relative to the image")
    parser.add_argument("--seed", type=int, default=0, help="of the crops")
    parser.add_argument("--shard-size", type=int, default=10_000, help="examples per file")
    parser.add_argument("--shards", help="only these shards, as in 0-99: a part for one worker of a cluster")
    parser.add_argument("--batch-size", type=int, default=64)


def run(arguments: argparse.Namespace) -> None:
    for name in ("views", "captions", "shard_size", "batch_size"):
        if getattr(arguments, name) < 1:
            raise UserError(f"--{name.replace('_', '-')}={getattr(arguments, name)}: at least 1")
    try:
        low, high = (float(part) for part in arguments.crop_scale.split(","))
    except ValueError as error:
        raise UserError(f"--crop-scale={arguments.crop_scale}: two numbers, as in 0.08,1") from error
    if not 0 < low <= high <= 1:
        raise UserError(f"--crop-scale={arguments.crop_scale}: above 0, at most 1, and in their order")
    from clip_jax.commands.evaluate import open_subject  # after parsing: JAX takes a second to import
    from clip_jax.data import reinforced
    from clip_jax.data.sources import open_source

    source = open_source(arguments.data, caption=arguments.caption, image=arguments.image)
    size = arguments.shard_size
    shards = _shards(arguments.shards, -(-len(source) // size))
    subjects = [open_subject(teacher, arguments.batch_size) for teacher in arguments.teacher]
    manifest = {
        "source": source.fingerprint,
        "examples": len(source),
        "teachers": [
            {"model": s.fingerprint, "width": s.embedder.width, "scale": s.scale, "name": name}
            for s, name in zip(subjects, arguments.teacher, strict=True)
        ],
        "views": arguments.views,
        "captions": arguments.captions,
        "crop_scale": [low, high],
        "crop_ratio": [3 / 4, 4 / 3],
        "seed": arguments.seed,
        "shard_size": size,
    }
    output = Path(arguments.output).expanduser()
    reinforced.prepare(output, manifest)
    for shard in shards:
        if reinforced.is_complete(output, shard):
            print(f"shard {shard}: done before")
            continue
        indices = range(shard * size, min(len(source), (shard + 1) * size))
        found = [_embed(subject, source, indices, manifest) for subject in subjects]
        arrays = {kind: np.concatenate([one[kind] for one in found], axis=2) for kind in ("image", "text")}
        # A crop that one teacher cannot have is missing for all.
        for rows in arrays.values():
            rows[~np.isfinite(rows).all(axis=2)] = np.nan
        reinforced.write_shard(output, shard, arrays)
        unusable = int(np.sum(~np.isfinite(arrays["image"]).any(axis=(1, 2))))
        print(f"shard {shard}: {len(indices)} examples, {unusable} of them unusable", flush=True)


def _embed(subject: Any, source: Any, indices: range, manifest: dict[str, Any]) -> dict[str, np.ndarray]:
    """float32 [examples, views, width] and [examples, captions, width] of one teacher."""
    import jax

    from clip_jax.data import images, reinforced
    from clip_jax.data.sources.sample import BadSampleError
    from clip_jax.data.stream import read
    from clip_jax.devices.sharding import to_devices
    from clip_jax.evaluation.embed import embed_texts

    embedder, width = subject.embedder, subject.embedder.width
    found = {
        kind: np.full((len(indices), manifest[rows], width), np.nan, np.float32)
        for kind, rows in (("image", "views"), ("text", "captions"))
    }
    samples, texts = {}, []
    for row, index in enumerate(indices):
        try:
            sample = read(source, index)
        except BadSampleError:
            continue
        samples[row] = sample.image
        texts += [(row, number, text) for number, text in enumerate(sample.captions[: manifest["captions"]])]
    jobs = [(row, view) for row in samples for view in range(manifest["views"])]

    def cropped(job: tuple[int, int]) -> np.ndarray | None:
        row, view = job
        try:
            return reinforced.crop(
                samples[row], embedder.image_size, indices[row], view, manifest, embedder.preprocess.interpolation
            )
        except images.BadImageError:
            return None

    shape = (embedder.batch_size, embedder.image_size, embedder.image_size, 3)
    with ThreadPoolExecutor(embedder.workers) as pool:
        for start in range(0, len(jobs), embedder.batch_size):
            chunk, pixels = jobs[start : start + embedder.batch_size], np.zeros(shape, np.uint8)
            valid = np.zeros(embedder.batch_size, bool)
            for slot, image in enumerate(pool.map(cropped, chunk)):
                if image is not None:
                    pixels[slot], valid[slot] = image, True
            batch = to_devices({"image": pixels, "valid": valid}, embedder.mesh, embedder.batch_size)
            embeddings = jax.device_get(embedder.encoders.image(subject.weights, batch["image"], batch["valid"])[0])
            for (row, view), embedding, ok in zip(chunk, embeddings, valid, strict=False):
                if ok:
                    found["image"][row, view] = embedding
    if texts:
        for (row, number, _), embedding in zip(
            texts, embed_texts(embedder, subject.weights, [text for *_, text in texts]), strict=True
        ):
            found["text"][row, number] = embedding
    return found
