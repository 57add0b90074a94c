"""Memory, FLOPs and traffic of the losses and their gradients on TPU slices, from the TPU compiler, without a TPU.

pip install libtpu
python benchmarks/loss_memory.py

Compiles the value and all gradients of the loss alone, bfloat16 embeddings, for v5e slices on a CPU (seconds each), and
prints, per chip:

peak      memory, with arguments and results
flops     of matrix products, in units of b B D (pairs of a chip, global batch, width), from the jaxpr
traffic   bytes received by collectives, from the compiled program, and the largest collective
buffer    elements of the largest array in the compiled program, as a share of b x B, one chip's rows of logits

Simulated CPU devices do not show how the TPU's own compiler schedules gathers and scatters.
"""

import os

# Without these libtpu asks a metadata server for a slice that is not there.
os.environ |= {
    "TPU_SKIP_MDS_QUERY": "1",
    "TPU_ACCELERATOR_TYPE": "v5litepod-256",
    "TPU_WORKER_HOSTNAMES": "localhost",
    "JAX_PLATFORMS": "cpu",
}

import math
import re
from collections.abc import Callable

import jax
import jax.numpy as jnp
from jax.experimental import topologies

from clip_jax.devices.sharding import batch_sharding, make_mesh, replicated
from clip_jax.losses.mesh_grid import Tiling
from clip_jax.losses.sigmoid import sigmoid
from clip_jax.losses.softmax import softmax
from clip_jax.planning import program

CASES = [
    # topology, global batch, embedding width, bound in MiB, desired MiB
    ("v5e:16x16", 32_768, 768, 32, None),
    ("v5e:16x16", 1_048_576, 1024, 820, 512),
    ("v5e:2x4", 32_768, 768, 128, 100),
]
LOSSES = {"softmax": (softmax, 1, 8.4), "sigmoid": (sigmoid, 2, 6.3)}  # loss, scalars, bound of FLOPs
TRAFFIC_BOUND = 0.9e9  # of a million pairs on 16 x 16; a ring or a gather over one axis: 6.4 to 8.6


def measure(loss: Callable, scalars: int, topology: str, batch: int, dim: int, tiling: Tiling) -> dict[str, float]:
    """Per chip: peak MiB, FLOPs in bBD, bytes received, bytes of the largest collective, largest array in bB."""
    mesh = make_mesh(devices=list(topologies.get_topology_desc(platform="tpu", topology_name=topology).devices))
    chips = mesh.size
    embeddings = jax.ShapeDtypeStruct((batch, dim), jnp.bfloat16, sharding=batch_sharding(mesh))
    scalar = jax.ShapeDtypeStruct((), jnp.float32, sharding=replicated(mesh))
    gradient = jax.value_and_grad(lambda *x: loss(*x, mesh=mesh, tiling=tiling)[0], tuple(range(2 + scalars)))
    traced = jax.jit(gradient).trace(embeddings, embeddings, *[scalar] * scalars)
    compiled = traced.lower().compile()
    text = compiled.as_text()
    collectives = program.collectives(text)
    sizes = [math.prod(map(int, re.findall(r"\d+", shape.split("[")[1]))) for shape in program.buffers(text)]
    return {
        "peak": compiled.memory_analysis().peak_memory_in_bytes / 2**20,
        "flops": program.matmul_flops(traced.jaxpr) / chips / (batch / chips * batch * dim),
        "traffic": sum(c.traffic for c in collectives),
        "largest": max(c.bytes for c in collectives),
        "buffer": max(sizes) / (batch / chips * batch),
    }


def show(label: str, name: str, topology: str, batch: int, dim: int, tiling: Tiling, bound: str) -> None:
    loss, scalars, flops_bound = LOSSES[name]
    m = measure(loss, scalars, topology, batch, dim, tiling)
    print(
        f"{label:8} {name:8} {topology:10} B = {batch:9,} D = {dim:5}  peak {m['peak']:6.1f} MiB ({bound})"
        f"  flops {m['flops']:.2f} bBD (<= {flops_bound})  traffic {m['traffic'] / 1e6:7.1f} MB,"
        f" largest {m['largest'] / 1e6:6.1f} MB  buffer {m['buffer']:.4f} bB",
        flush=True,
    )


if __name__ == "__main__":
    for topology, batch, dim, bound, stretch in CASES:
        for name in LOSSES:
            limits = f"<= {bound}" + (f", stretch {stretch}" if stretch else "")
            show("grid", name, topology, batch, dim, Tiling(), limits)
    print(f"bound of the traffic at B = 1,048,576 on 16x16: {TRAFFIC_BOUND / 1e6:.0f} MB")
    for topology, batch, dim, _, _ in CASES:
        for name in LOSSES:
            show("ring", name, topology, batch, dim, Tiling(gathered_bytes=0), "no bound")
