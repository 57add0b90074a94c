"""Photos per second from files to embeddings: ``encode_image`` and OpenCLIP, on photos of many sizes.

    python benchmarks/encoding.py [--model=ViT-B/32] [--photos=250] [--batch=64] [--repeats=4]

Needs ../shared/data and the environment of tests/peers/make_env.sh (CLIP_JAX_PEERS, or .venv-peers). The 16 photos are
repeated; weights are random, which changes no speed. OpenCLIP decodes and encodes batches of the same size, in turns
with ours: one image after the other ("loop"), and with a DataLoader of one worker per core ("workers").
"""

import argparse
import json
import os
import statistics
import sys
import time

import flax.linen as nn
import jax
import numpy as np
import peer

from clip_jax import presets
from clip_jax.model import Model
from clip_jax.models.clip import CLIP
from clip_jax.models.compute import Compute

PHOTOS = peer.ROOT.parent / "shared" / "data" / "photos"

# For each line on stdin, the number of loader's workers, prints the seconds from files to embeddings.
OPEN_CLIP = """
import json, sys, time
import torchvision_ops_stub  # before open_clip
import open_clip
import torch
from PIL import Image

job = json.loads(sys.argv[1])
model, _, preprocess = open_clip.create_model_and_transforms(job["model"].replace("/", "-"))
model.eval()

class Photos(torch.utils.data.Dataset):
    def __len__(self):
        return len(job["photos"])
    def __getitem__(self, i):
        return preprocess(Image.open(job["photos"][i]))

def encode(workers):
    loader = torch.utils.data.DataLoader(Photos(), batch_size=job["batch"], num_workers=workers)
    with torch.inference_mode():
        return torch.cat([torch.nn.functional.normalize(model.encode_image(batch), dim=-1) for batch in loader])

print("ready", flush=True)
for line in sys.stdin:
    start = time.perf_counter()
    assert len(encode(int(line))) == len(job["photos"])
    print(json.dumps(time.perf_counter() - start), flush=True)
"""


def our_model(name: str) -> Model:
    preset = presets.preset(name)
    clip = CLIP(preset.architecture, Compute())  # as load makes it
    params = jax.jit(lambda key: nn.meta.unbox(clip.init(key)))(jax.random.key(0))
    return Model(name, preset, clip, params, open_tokenizer=lambda: None, step=0)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="ViT-B/32")
    parser.add_argument("--photos", type=int, default=250)
    parser.add_argument("--batch", type=int, default=64)
    parser.add_argument("--repeats", type=int, default=4)
    args = parser.parse_args()
    files = sorted(str(path) for path in PHOTOS.glob("*.jpg"))
    if not files:
        sys.exit(f"{PHOTOS}: no such folder; the photos to measure with are there")
    files = [files[i % len(files)] for i in range(args.photos)]
    model, cores = our_model(args.model), len(os.sched_getaffinity(0))

    def ours(workers: int | None) -> float:
        start = time.perf_counter()
        embeddings = model.encode_image(files, batch_size=args.batch, workers=workers)
        assert np.isfinite(embeddings).all()
        return time.perf_counter() - start

    start = time.perf_counter()
    model.encode_image(files[: args.batch], batch_size=args.batch)  # compiles
    print(f"first batch, with compilation: {time.perf_counter() - start:.1f} s", file=sys.stderr)
    model.encode_image(files[: args.photos % args.batch or args.batch], batch_size=args.batch)
    job = json.dumps({"model": args.model, "photos": files, "batch": args.batch})
    with peer.started(OPEN_CLIP, job) as ask:
        turns = [(ours(None), ours(1), ask("0"), ask(str(cores))) for _ in range(args.repeats)]
    all_cores, one_thread, loop, loader = zip(*turns, strict=True)
    print(f"{args.model}, {args.photos:,} photos in batches of {args.batch}, {cores} cores")
    for name, seconds in (
        ("ours", all_cores),
        ("ours, workers=1", one_thread),
        ("OpenCLIP, loop", loop),
        ("OpenCLIP, workers", loader),
    ):
        speed = args.photos / statistics.median(seconds)
        print(f"{name:<20}{speed:>8.1f} photos/s; its time is {peer.ratio(all_cores, seconds)} of ours")


if __name__ == "__main__":
    main()
