"""Pairs per second of the input stream, with both settings of ``data.resize``, and of OpenCLIP's loader.

    python benchmarks/loader.py [--peer=PYTHON] [--repeats=5] [--batch=128] [--cpu] [--kinds] [--json]

Needs ../shared/data and, for OpenCLIP, an environment of tests/peers/make_env.sh (its Python, or CLIP_JAX_PEERS); else
ours alone is measured. Two sets of tar shards: the emoji (136x136), and 500x400 JPEGs of quality 90 made from the
photographs. Each loader has two workers, makes batches of crops of 224 px and captions, and is timed from its first
batch to its last; they take turns, so that a busy machine slows all equally. OpenCLIP's batches are normalized
float32; ours are uint8 and normalized on the device. "Bare" is decoding and resizing alone, of files in memory, in as
many threads. ``--cpu`` measures CPU seconds of this process, which depend less on other work, and leaves OpenCLIP out.
``--kinds`` compares tar shards, ArrayRecord files and a Parquet table of the same emoji instead: examples read one by
one in random order, and batches (``simd``).
"""

import argparse
import functools
import io
import json
import statistics
import sys
import tarfile
import tempfile
import time
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import peer
from PIL import Image

from clip_jax.data import fast_crops, images, packing, tokenizers
from clip_jax.data.faults import Faults
from clip_jax.data.order import Order
from clip_jax.data.sources import open_source
from clip_jax.data.sources.sample import Source
from clip_jax.data.stream import TrainingBatches, stream
from clip_jax.data.views import pair_views

DATA = peer.ROOT.parent / "shared" / "data"
SIZE, WORKERS, PREFETCH = 224, 2, 4  # PyTorch's loader prefetches two batches per worker
PHOTOS = 1024
Clock = Callable[[], float]

# For each line on stdin, the name of a set of shards, prints the seconds per pair of a pass over it.
OPEN_CLIP = """
import json, logging, sys, time
from types import SimpleNamespace
import torchvision_ops_stub  # before open_clip
import open_clip
from open_clip_train.data import get_wds_dataset

job = json.loads(sys.argv[1])
transform = open_clip.image_transform(job["size"], is_train=True)
tokenizer = open_clip.get_tokenizer("ViT-B-32")

def loader(shards, samples):
    args = SimpleNamespace(
        train_data="::".join(shards), train_num_samples=samples, val_num_samples=None, seed=0, world_size=1,
        batch_size=job["batch"], workers=job["workers"], dataset_resampled=False, train_data_upsampling_factors=None,
    )
    return get_wds_dataset(args, transform, is_train=True, floor=True, tokenizer=tokenizer).dataloader

loaders = {name: loader(*given) for name, given in job["sets"].items()}
print("ready", flush=True)
for name in map(str.strip, sys.stdin):
    batches = 0
    for images, texts in loaders[name]:
        batches += 1
        now = time.perf_counter()
        if batches == 1:
            start = now
    print(json.dumps((now - start) / (batches - 1) / job["batch"]), flush=True)
"""


def write_photos(folder: Path) -> list[str]:
    """Shards of parts of the photographs, each resized to 500x400."""
    photos = [Image.open(path).convert("RGB") for path in sorted((DATA / "photos").glob("*.jpg"))]
    rng, shards = np.random.default_rng(0), []
    for shard in range(4):
        shards.append(str(folder / f"{shard:05d}.tar"))
        with tarfile.open(shards[-1], "w") as tar:
            for number in range(shard, PHOTOS, 4):
                photo, file = photos[number % len(photos)], io.BytesIO()
                part = images.crop_box(*photo.size, rng, (0.5, 1.0), (1.25, 1.25))
                photo.resize((500, 400), Image.Resampling.BICUBIC, box=part).save(file, "JPEG", quality=90)
                for ending, data in (("jpg", file.getvalue()), ("txt", b"a part of photograph %d" % number)):
                    member = tarfile.TarInfo(f"{number:09d}.{ending}")
                    member.size = len(data)
                    tar.addfile(member, io.BytesIO(data))
    return shards


def our_seconds(source: Source, resize: str, batch: int, clock: Clock) -> float:
    """Per pair, over as many batches as there are in the source."""
    views = pair_views(
        image_size=SIZE,
        context_length=77,
        tokenizer=tokenizer(),
        crop_scale=(0.9, 1.0),
        crop_ratio=(3 / 4, 4 / 3),
        interpolation="bicubic",
        resize=resize,
    )
    make = TrainingBatches(source, Order(len(source), batch, 0), views, Faults())
    steps = len(source) // batch
    batches = stream(make, np.arange(batch), 0, steps, workers=WORKERS, prefetch=PREFETCH)
    next(batches)
    return _timed(lambda: _exhaust(batches), clock) / (steps - 1) / batch


@functools.cache
def tokenizer() -> tokenizers.Tokenizer:
    return tokenizers.clip(DATA / "clip_bpe" / "bpe_simple_vocab_16e6.txt.gz")


def bare_seconds(files: list[bytes], resize: str, clock: Clock) -> float:
    """Per image: whole images decoded and resized, in WORKERS threads."""

    def one(data: bytes) -> np.ndarray:
        if resize == "pillow":
            image = images.decode(data)
            return np.asarray(image.resize((SIZE, SIZE), Image.Resampling.BICUBIC))
        pixels = images.decode_jpeg(data)
        return fast_crops.resize(pixels, (0, 0, pixels.shape[1], pixels.shape[0]), SIZE, "bicubic")

    with ThreadPoolExecutor(WORKERS) as threads:
        parts = [files[n::WORKERS] for n in range(WORKERS)]
        return _timed(lambda: _exhaust(threads.map(lambda part: _exhaust(map(one, part)), parts)), clock) / len(files)


def _timed(call: Callable[[], Any], clock: Clock) -> float:
    start = clock()
    call()
    return clock() - start


def _exhaust(items: Iterable[Any]) -> None:
    for _ in items:
        pass


def measure(
    sets: dict[str, list[str]], python: str | None, repeats: int, batch: int, cpu: bool
) -> dict[str, dict[str, list]]:
    """Set -> what -> seconds per pair of each turn."""
    sources = {name: open_source(f"tar:{','.join(shards)}", image_size=SIZE) for name, shards in sets.items()}
    job = {"size": SIZE, "workers": WORKERS, "batch": batch}
    job["sets"] = {name: (shards, len(sources[name])) for name, shards in sets.items()}
    results, clock = {}, time.process_time if cpu else time.perf_counter
    for name, source in sources.items():
        files = [source[i].image for i in range(len(source))]
        turns: dict[str, Callable[[], float]] = {}
        for resize in ("pillow", "simd"):
            turns[resize] = functools.partial(our_seconds, source, resize, batch, clock)
            turns[f"bare {resize}"] = functools.partial(bare_seconds, files, resize, clock)
        results[name] = {what: [] for what in turns}

        def turn(name: str = name, turns: dict = turns) -> None:
            for what, seconds in turns.items():
                results[name][what].append(seconds())

        if cpu or (python is None and not peer.is_installed()):
            for _ in range(repeats):
                turn()
            continue
        with peer.started(OPEN_CLIP, json.dumps(job), python=python) as ask:
            ask(name)  # starts its workers
            results[name]["OpenCLIP"] = []
            for _ in range(repeats):
                turn()
                results[name]["OpenCLIP"].append(ask(name))
    return results


def write_kinds(folder: Path, shards: list[str]) -> dict[str, str]:
    """Kind -> a source of it with the examples of tar shards."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    source = open_source(f"tar:{','.join(shards)}")
    packing.pack(source, folder / "emoji", per_shard=2000, max_size=0, workers=1, form="array_record")
    samples = [source[i] for i in range(len(source))]
    table = {"image": [s.image for s in samples], "caption": [s.captions[0] for s in samples]}
    pq.write_table(pa.table(table), folder / "emoji.parquet")
    records = f"array_record:{folder}/emoji/1.0.0/*.array_record*"
    return {"tar": source.name, "array_record": records, "parquet": f"parquet:{folder}/emoji.parquet"}


def measure_kinds(kinds: dict[str, str], repeats: int, batch: int, clock: Clock) -> dict[str, dict[str, str | float]]:
    """Reading and batches -> kind -> examples per second, and how often as fast as tar shards."""
    sources, seconds = {kind: open_source(where) for kind, where in kinds.items()}, {}

    def read(source: Source) -> float:
        order = np.random.default_rng(0).permutation(len(source)).tolist()
        return _timed(lambda: _exhaust(source[i] for i in order), clock) / len(source)

    for turn in range(repeats + 1):
        for kind, source in sources.items():
            for what, found in (("reading", read(source)), ("batches", our_seconds(source, "simd", batch, clock))):
                if turn:  # the first one fills the page cache
                    seconds.setdefault(what, {}).setdefault(kind, []).append(found)
    return {
        what: {kind: 1 / statistics.median(times) for kind, times in by_kind.items()}
        | {f"{kind} / tar": peer.ratio(times, by_kind["tar"]) for kind, times in by_kind.items() if kind != "tar"}
        for what, by_kind in seconds.items()
    }


def summarized(results: dict[str, dict[str, list[float]]]) -> dict[str, dict[str, Any]]:
    """Set -> pairs per second (medians), and ratios as the median, minimum and maximum of the turns."""
    summary = {}
    for name, seconds in results.items():
        rows: dict[str, Any] = {what: 1 / statistics.median(values) for what, values in seconds.items()}
        for resize in ("pillow", "simd"):
            rows[f"{resize} / bare"] = peer.ratio(seconds[resize], seconds[f"bare {resize}"])
            if "OpenCLIP" in seconds:
                rows[f"{resize} / OpenCLIP"] = peer.ratio(seconds[resize], seconds["OpenCLIP"])
        summary[name] = rows
    return summary


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--peer", metavar="PYTHON")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--batch", type=int, default=128)
    parser.add_argument("--cpu", action="store_true")
    parser.add_argument("--kinds", action="store_true")
    parser.add_argument("--json", action="store_true")
    args = parser.parse_args()
    if not DATA.exists():
        sys.exit(f"{DATA}: no such folder; the shards to measure with are there")
    with tempfile.TemporaryDirectory() as folder:
        emoji = [str(path) for path in sorted((DATA / "emoji").glob("train-*.tar"))]
        if args.kinds:
            clock = time.process_time if args.cpu else time.perf_counter
            summary = measure_kinds(write_kinds(Path(folder), emoji[:1]), args.repeats, args.batch, clock)
        else:
            sets = {"emoji": emoji, "photos 500x400": write_photos(Path(folder))}
            summary = summarized(measure(sets, args.peer, args.repeats, args.batch, args.cpu))
    if args.json:
        print(json.dumps(summary))
        return
    unit = "CPU second" if args.cpu else "s"
    for name, rows in summary.items():
        print(f"{name}, {SIZE} px, {WORKERS} workers")
        for what, value in rows.items():
            print(f"  {what:<20}{value if isinstance(value, str) else f'{value:,.0f} pairs/{unit}'}")


if __name__ == "__main__":
    main()
