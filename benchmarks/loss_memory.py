"""Peak memory of the softmax loss with its gradients on TPU slices that are not there, as the TPU compiler says it.

pip install libtpu
python benchmarks/loss_memory.py

Compiles value and gradients (images, texts, scale) of the loss alone, bfloat16 embeddings, for v5e slices on a CPU.
"Peak" is per chip and includes arguments and results. What ``--xla_force_host_platform_device_count`` cannot tell:
how the TPU's own compiler schedules gathers and scatters.
"""

import os

# Without these libtpu asks a metadata server for a slice that is not there.
os.environ |= {
    "TPU_SKIP_MDS_QUERY": "1",
    "TPU_ACCELERATOR_TYPE": "v5litepod-256",
    "TPU_WORKER_HOSTNAMES": "localhost",
    "JAX_PLATFORMS": "cpu",
}

import jax
import jax.numpy as jnp
from jax.experimental import topologies

from clip_jax.losses import grid
from clip_jax.sharding import batch_sharding, make_mesh, replicated

CASES = [
    # topology, global batch, embedding width, bound in MiB
    ("v5e:16x16", 32_768, 768, 32),
    ("v5e:16x16", 1_048_576, 1024, 820),
    ("v5e:2x4", 32_768, 768, 128),
]


def peak_mib(topology: str, batch: int, dim: int) -> float:
    """MiB per chip."""
    mesh = make_mesh(devices=list(topologies.get_topology_desc(platform="tpu", topology_name=topology).devices))
    embeddings = jax.ShapeDtypeStruct((batch, dim), jnp.bfloat16, sharding=batch_sharding(mesh))
    scale = jax.ShapeDtypeStruct((), jnp.float32, sharding=replicated(mesh))
    loss = jax.jit(jax.value_and_grad(lambda i, t, s: grid.softmax(i, t, s, mesh=mesh)[0], (0, 1, 2)))
    return loss.lower(embeddings, embeddings, scale).compile().memory_analysis().peak_memory_in_bytes / 2**20


if __name__ == "__main__":
    for topology, batch, dim, bound in CASES:
        print(
            f"{topology:10} B = {batch:9,}  D = {dim:5}  peak {peak_mib(topology, batch, dim):7.1f} MiB  (bound {bound})"
        )
