"""How long indexes of tar shards take: making one, opening one, and the look-ups of a batch in two billion samples.

python benchmarks/index.py [--shards=1000] [--samples=1000] [--pixels=64] [--json] [--tmp=DIR]

Writes ``--shards`` shards of ``--samples`` small JPEGs with captions (3.6 GB by default) into a temporary folder, and
measures in turn:

    index     the first ``open_tar``, with the files in the page cache and without (bound by the disk)
    start     a later ``open_tar`` in a new process, and then its first batch of 256 at 64 px
    2e9       ``tar_index.load`` of a synthetic index of 2 * 10^9 samples (a sparse file of 48 GB), a batch of its
              order, the look-ups of that batch the first time (the page of each sample is not in the page cache) and
              the second time, and the growth of the resident memory

Bounds: 60 s, 5 s + 2 s, 1 s + 1 ms.
"""

import argparse
import io
import json
import os
import resource
import shutil
import subprocess
import sys
import tarfile
import tempfile
import time
from pathlib import Path

import numpy as np
from PIL import Image

from clip_jax.data.faults import Faults
from clip_jax.data.order import Order
from clip_jax.data.sources import open_source, tar_index
from clip_jax.data.sources.labels import Labels
from clip_jax.data.sources.left_out import LeftOut
from clip_jax.data.stream import TrainingBatches, stream
from clip_jax.data.views import pair_views

BATCH = 256
SYNTHETIC = 2_000_000_000


class Lengths:
    """A tokenizer that costs nothing."""

    context_length, vocab_size, fingerprint = 8, 1000, "lengths"

    def __call__(self, texts: list[str]) -> np.ndarray:
        return np.array([[len(text)] * self.context_length for text in texts], np.int32)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shards", type=int, default=1000)
    parser.add_argument("--samples", type=int, default=1000, help="per shard")
    parser.add_argument("--pixels", type=int, default=64)
    parser.add_argument("--json", action="store_true")
    parser.add_argument("--tmp", help="the folder for the shards; a temporary one by default")
    parser.add_argument("--start", help="(used by this program itself)")
    arguments = parser.parse_args()
    if arguments.start:
        print(json.dumps(start(arguments.start)))
        return
    with tempfile.TemporaryDirectory(dir=arguments.tmp) as folder:
        found = measure(Path(folder), arguments)
    if arguments.json:
        print(json.dumps(found))
        return
    for name, value in found.items():
        print(f"{name:24} {value:10.4g}")


def measure(folder: Path, arguments: argparse.Namespace) -> dict[str, float]:
    shards = folder / "shards"
    written = write_shards(shards, arguments.shards, arguments.samples, arguments.pixels)
    found = {"shards": arguments.shards, "samples": arguments.shards * arguments.samples, "GB": written / 1e9}
    for name in ("index (cached) s", "index (disk) s"):
        if "disk" in name:
            forget(shards)
        shutil.rmtree(shards / tar_index.FOLDER, ignore_errors=True)
        began, cpu = time.perf_counter(), time.process_time()
        source = open_source(f"tar:{shards}")
        found[name] = time.perf_counter() - began
        found[name.replace(" s", " CPU s")] = time.process_time() - cpu
    found["bytes per sample"] = source.index.rows.nbytes / len(source)
    command = [sys.executable, __file__, f"--start={shards}"]
    found |= json.loads(subprocess.run(command, check=True, capture_output=True, text=True).stdout.splitlines()[-1])
    return found | synthetic(folder)


def write_shards(folder: Path, shards: int, samples: int, pixels: int) -> int:
    """The number of bytes written. One shard's images are those of all; captions and keys differ."""
    folder.mkdir()
    rng, images = np.random.default_rng(0), []
    for _ in range(samples):
        file = io.BytesIO()
        Image.fromarray(rng.integers(0, 256, (pixels // 4, pixels // 4, 3), np.uint8)).resize((pixels, pixels)).save(
            file, "JPEG"
        )
        images.append(file.getvalue())
    total = 0
    for shard in range(shards):
        path = folder / f"{shard:05d}.tar"
        with tarfile.open(path, "w", format=tarfile.USTAR_FORMAT) as archive:
            for number, image in enumerate(images):
                key = f"{shard * samples + number:09d}"
                for kind, data in (("jpg", image), ("txt", f"a picture, number {key}".encode())):
                    member = tarfile.TarInfo(f"{key}.{kind}")
                    member.size = len(data)
                    archive.addfile(member, io.BytesIO(data))
        total += path.stat().st_size
    return total


def forget(folder: Path) -> None:
    """Asks the system to drop the files from its page cache."""
    os.sync()
    for path in folder.glob("*.tar"):
        with open(path, "rb") as file:
            os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def start(folder: str) -> dict[str, float]:
    """The start of an indexed source, and its first batch."""
    began = time.perf_counter()
    source = open_source(f"tar:{folder}")
    opened = time.perf_counter()
    views = pair_views(
        image_size=64,
        context_length=Lengths.context_length,
        tokenizer=Lengths(),
        crop_scale=(0.9, 1.0),
        crop_ratio=(3 / 4, 4 / 3),
        interpolation="bicubic",
    )
    make = TrainingBatches(source, Order(len(source), BATCH, 0), views, Faults())
    next(stream(make, np.arange(BATCH), 0, 8, workers=2, prefetch=2))
    return {"start s": opened - began, "first batch s": time.perf_counter() - opened}


def synthetic(folder: Path) -> dict[str, float]:
    """The index of two billion samples in 20,000 shards."""
    shards, facts = 20_000, ([0] * 4, LeftOut().to_json(), Labels())
    index_folder = folder / "synthetic"
    index_folder.mkdir()
    table = [[f"{i:05d}.tar", 1, "0", SYNTHETIC // shards, "d", *facts] for i in range(shards)]
    (index_folder / "shards.json").write_text(json.dumps(table))
    with open(index_folder / "rows", "wb") as file:
        file.truncate(24 * SYNTHETIC)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    began, cpu = time.perf_counter(), time.process_time()
    index = tar_index.load(index_folder)
    found = {"open 2e9 s": time.perf_counter() - began, "open 2e9 CPU s": time.process_time() - cpu}
    order, orders, cold, warm = Order(SYNTHETIC, BATCH, seed=0), [], [], []
    for step in range(50):
        began = time.perf_counter()
        batch = order.batch(step)
        orders.append(time.perf_counter() - began)
        for times in (cold, warm):
            began = time.perf_counter()
            for i in batch.tolist():
                index.row(i)
            times.append(time.perf_counter() - began)
    after = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return found | {
        "order of a batch ms": float(np.median(orders)) * 1e3,
        "look-ups, first ms": float(np.median(cold)) * 1e3,
        "look-ups, again ms": float(np.median(warm)) * 1e3,
        "memory 2e9 MB": (after - before) / 1e3,
    }


if __name__ == "__main__":
    main()
