"""Seconds and memory of the softmax loss with all gradients on a CPU, beside OpenCLIP's, float32.

CLIP_JAX_PEERS=.venv-peers python benchmarks/loss_time.py [--batch=8192] [--dim=512] [--repeats=9]

The two run in turns. Memory is what a run adds to the process (the resident peak of the first run); for ours also the
temporary bytes of the compiled program.
"""

import argparse
import statistics
import time

import jax
import jax.numpy as jnp
import numpy as np
import peer

from clip_jax.devices.sharding import batch_sharding, make_mesh
from clip_jax.losses.softmax import softmax

MIB = 2**20

OPEN_CLIP = (
    peer.PEAK
    + """
import json, sys, time
import torchvision_ops_stub  # before open_clip
import torch
from open_clip.loss import ClipLoss

batch, dim = map(int, sys.argv[1:])
generator = torch.Generator().manual_seed(0)
image, text = (
    torch.nn.functional.normalize(torch.randn(batch, dim, generator=generator), dim=1).requires_grad_() for _ in "it"
)
scale = torch.tensor(14.3, requires_grad=True)
loss = ClipLoss()
before = peak()
print("ready", flush=True)
for _ in sys.stdin:
    image.grad = text.grad = scale.grad = None
    start = time.perf_counter()
    value = loss(image, text, scale)
    value.backward()
    print(json.dumps([time.perf_counter() - start, peak() - before]), flush=True)
"""
)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name, default in (("batch", 8192), ("dim", 512), ("repeats", 9)):
        parser.add_argument(f"--{name}", type=int, default=default)
    args = parser.parse_args()
    mesh, rng = make_mesh(), np.random.default_rng(0)
    embeddings = rng.normal(size=(2, args.batch, args.dim)).astype(np.float32)
    embeddings /= np.linalg.norm(embeddings, axis=-1, keepdims=True)
    image, text = (jax.device_put(x, batch_sharding(mesh)) for x in embeddings)
    scale = jnp.float32(14.3)
    gradient = jax.jit(jax.value_and_grad(lambda *x: softmax(*x, mesh=mesh)[0], (0, 1, 2)))
    compiled = gradient.lower(image, text, scale).compile()
    before = peer.peak()

    def run() -> float:
        start = time.perf_counter()
        jax.block_until_ready(compiled(image, text, scale))
        return time.perf_counter() - start

    run()
    growth = peer.peak() - before
    with peer.started(OPEN_CLIP, args.batch, args.dim) as ask:
        _, their_growth = ask("run")
        ours, theirs = zip(*((run(), ask("run")[0]) for _ in range(args.repeats)), strict=True)
    temporary = compiled.memory_analysis().temp_size_in_bytes * mesh.size
    print(f"batch {args.batch:,}, width {args.dim}, float32, value and gradients, {mesh.size} device(s)")
    print(f"seconds   {statistics.median(ours):.2f} ours, {statistics.median(theirs):.2f} OpenCLIP's")
    print(f"          OpenCLIP's divided by ours {peer.ratio(ours, theirs)}")
    print(f"memory    {growth / MIB:.0f} MiB ours, {their_growth / MIB:.0f} MiB OpenCLIP's")
    print(f"          {temporary / MIB:.0f} MiB ours by the compiler, {temporary / their_growth:.3f} of OpenCLIP's")


if __name__ == "__main__":
    main()
