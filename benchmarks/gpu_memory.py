"""Memory of training steps and losses on NVIDIA H100s, compiled ahead of time by XLA's GPU compiler without a GPU.

pip install 'jax[cuda12]'  (5 GB)
python benchmarks/gpu_memory.py [--only=PREFIX]

Each compilation takes 10 seconds to 2 minutes on a CPU. Prints the peak memory per GPU, the estimate of the plan, and
the number of calls of cuDNN's attention. Without a GPU nothing is timed and no kernel is autotuned: matrix products use
the first choice of cuBLAS.
"""

import os

from clip_jax.devices import xla_flags

os.environ |= {
    "CUDA_VISIBLE_DEVICES": "-1",
    "JAX_SKIP_CUDA_CONSTRAINTS_CHECK": "1",  # there is no driver to check
    # The flags of main.py; the other two would autotune kernels on a GPU.
    "XLA_FLAGS": xla_flags.merge("gpu", "--xla_gpu_enable_triton_gemm=false --xla_gpu_autotune_level=0"),
}

import argparse

import jax
import jax.numpy as jnp
from jax._src import xla_bridge
from jax._src.cudnn import fused_attention_stablehlo
from jax.experimental import topologies

from clip_jax import config as configs
from clip_jax.devices.hardware import GIB, gpu
from clip_jax.devices.sharding import batch_sharding, make_mesh, replicated
from clip_jax.losses.sigmoid import sigmoid
from clip_jax.losses.softmax import softmax
from clip_jax.planning.search import estimate as estimate_plan
from clip_jax.training.setup import make_learner

DOTS = {"model.remat": "dots"}
CUDNN, XLA = {"model.attention": "cudnn"}, {"model.attention": "xla"}
# name -> recipe, GPUs, overrides
STEPS = {
    "B/16, 1,024 pairs": ("clip_vit_b16", 1, {"batch_size": "1024"} | XLA),
    "B/16, 1,024 pairs, cuDNN": ("clip_vit_b16", 1, {"batch_size": "1024"} | CUDNN),
    "L/14, 256 pairs": ("clip_vit_l14", 1, {"batch_size": "256"} | DOTS | XLA),
    "L/14, 256 pairs, cuDNN": ("clip_vit_l14", 1, {"batch_size": "256"} | DOTS | CUDNN),
    "L/14, 128 pairs, no remat": ("clip_vit_l14", 1, {"batch_size": "128", "model.remat": "none"} | XLA),
    "L/14, 128 pairs, no remat, cuDNN": ("clip_vit_l14", 1, {"batch_size": "128", "model.remat": "none"} | CUDNN),
    "L/14, 1,024 pairs in 4, cuDNN": ("clip_vit_l14", 1, {"batch_size": "1024", "micro_batch": "256"} | DOTS | CUDNN),
    "L/14, 8 x 256 pairs, fsdp, cuDNN": ("clip_vit_l14", 8, {"batch_size": "2048", "mesh.fsdp": "8"} | DOTS | CUDNN),
    "So400m/14, 8 x 256 pairs, fsdp, cuDNN": (
        "siglip_so400m14",
        8,
        {"batch_size": "2048", "mesh.fsdp": "8"} | DOTS | CUDNN,
    ),
}
LOSSES = {"softmax": (softmax, 1), "sigmoid": (sigmoid, 2)}
BATCH, WIDTH = 65_536, 768

H100 = """
gpu_device_info {
  threads_per_block_limit: 1024 threads_per_warp: 32 shared_memory_per_block: 49152 shared_memory_per_core: 233472
  threads_per_core_limit: 2048 core_count: 132 fpus_per_core: 128 block_dim_limit_x: 2147483647
  block_dim_limit_y: 65535 block_dim_limit_z: 65535 memory_bandwidth: 3352320000000 l2_cache_size: 52428800
  clock_rate_ghz: 1.98 device_memory_size: 84929347584 shared_memory_per_block_optin: 232448
  cuda_compute_capability { major: 9 } registers_per_core_limit: 65536 registers_per_block_limit: 65536
}
platform_name: "CUDA"
dnn_version_info { major: 9 minor: 7 }
runtime_version { major: 12 minor: 8 patch: 0 }
device_description_str: "NVIDIA H100 80GB HBM3"
"""


def pretend_gpu() -> None:
    """Patches JAX, which requires a GPU to name its platform (jax-ml/jax#23971) and its compute capability."""
    canonicalize = xla_bridge.canonicalize_platform
    xla_bridge.canonicalize_platform = lambda name: "cuda" if name in ("gpu", "cuda") else canonicalize(name)
    fused_attention_stablehlo.check_compute_capability = lambda least: tuple(map(int, least.split("."))) <= (9, 0)
    fused_attention_stablehlo.is_cuda_compute_capability_equal = lambda one: one == "9.0"


def devices(count: int) -> list[jax.Device]:
    described = topologies.get_topology_desc(platform="cuda", target_config=H100, topology=f"1x1x{count}")
    return list(described.devices)


def step(recipe: str, count: int, overrides: dict[str, str]) -> jax.stages.Compiled:
    config = configs.load(f"configs/{recipe}.py", overrides)
    mesh = make_mesh(config.mesh.data, config.mesh.fsdp, config.mesh.tensor, config.mesh.slices, devices(count))
    return make_learner(config, mesh, steps=1, examples=1).lower(config.batch_size).compile()


def loss(name: str) -> jax.stages.Compiled:
    function, scalars = LOSSES[name]
    mesh = make_mesh(devices=devices(1))
    embeddings = jax.ShapeDtypeStruct((BATCH, WIDTH), jnp.bfloat16, sharding=batch_sharding(mesh))
    scalar = jax.ShapeDtypeStruct((), jnp.float32, sharding=replicated(mesh))
    gradient = jax.value_and_grad(lambda *x: function(*x, mesh=mesh)[0], tuple(range(2 + scalars)))
    return jax.jit(gradient).lower(embeddings, embeddings, *[scalar] * scalars).compile()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--only", default="", help="cases whose name has this prefix")
    only = parser.parse_args().only
    pretend_gpu()
    for name, (recipe, count, overrides) in STEPS.items():
        if not name.startswith(only):
            continue
        compiled = step(recipe, count, overrides)
        estimate = estimate_plan(configs.load(f"configs/{recipe}.py", overrides), gpu(f"h100:{count}")).memory.total
        calls = compiled.as_text().count('custom_call_target="__cudnn$fmhaSoftmax"')
        peak = compiled.memory_analysis().peak_memory_in_bytes
        print(f"{name:40} {peak / GIB:7.2f} GiB  estimate {estimate / GIB:7.2f} GiB  cuDNN calls {calls}", flush=True)
    for name in LOSSES:
        if name.startswith(only):
            peak = loss(name).memory_analysis().peak_memory_in_bytes
            print(f"{name:8} B = {BATCH:,} D = {WIDTH} {peak / 1e9:7.3f} GB", flush=True)


if __name__ == "__main__":
    main()
