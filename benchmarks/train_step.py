"""Pairs/s, MFU and memory of a recipe's training step on CPU, GPU or TPU, in comparison with OpenCLIP.

python benchmarks/train_step.py --config=configs/emoji.py [--config.batch_size=64 ...] [--steps=2] [--repeats=7]

Model, batch size, dtype and mesh are settings of the recipe: --config.model.name=ViT-B/32 --config.mesh.fsdp=2. The
step is the one of main.py, on random pixels and tokens already on the devices. If the peer environment exists
(CLIP_JAX_PEERS, or .venv-peers), OpenCLIP trains the same model, interleaved with ours: eagerly, or with --compile by
torch.compile; for bfloat16, with its amp_bf16.
"""

import argparse
import json
import statistics
import sys
import tempfile
import time
from collections.abc import Callable

import jax
import numpy as np
import peer
from ml_collections import ConfigDict

from clip_jax import config as configs
from clip_jax.command_line import split_overrides
from clip_jax.devices import hardware, simulated
from clip_jax.devices.sharding import make_mesh, to_devices
from clip_jax.interop import open_clip_config
from clip_jax.models import flops
from clip_jax.training.setup import make_learner

GIB = 2**30

OPEN_CLIP = (
    peer.PEAK
    + """
import json, math, sys, time
import torchvision_ops_stub  # before open_clip
import torch
from open_clip.loss import ClipLoss, SigLipLoss
from open_clip.model import CLIP, CustomTextCLIP

job = json.load(open(sys.argv[1]))
device = "cuda" if torch.cuda.is_available() else "cpu"
torch.manual_seed(0)
kind = CustomTextCLIP if job["model"].pop("custom_text", False) else CLIP
model = kind(**job["model"]).to(device).train()
size, batch = model.visual.image_size, job["batch"]
size = size if isinstance(size, (tuple, list)) else (size, size)
pixels = torch.randn(batch, 3, *size, device=device)
tokens = torch.randint(1, job["vocabulary"], (batch, job["length"]), device=device)
gains = [p for p in model.parameters() if p.ndim < 2]
matrices = [p for p in model.parameters() if p.ndim >= 2]
groups = [{"params": gains, "weight_decay": 0.0}, {"params": matrices, "weight_decay": 0.2}]
optimizer = torch.optim.AdamW(groups, lr=1e-4, betas=(0.9, 0.98), eps=1e-6)
loss_of = SigLipLoss() if job["loss"] == "sigmoid" else ClipLoss()
run = torch.compile(model) if job["compile"] else model
mixed = torch.autocast(device, torch.bfloat16, enabled=job["dtype"] == "bfloat16")

def step():
    optimizer.zero_grad()
    with mixed:
        loss = loss_of(*run(pixels, tokens))
    loss.backward()
    optimizer.step()
    with torch.no_grad():
        model.logit_scale.clamp_(0, math.log(100))
    return loss.item()

def memory():
    if device == "cuda":
        return torch.cuda.max_memory_allocated()
    return peak()

print("ready", flush=True)
for line in sys.stdin:
    start = time.perf_counter()
    for _ in range(int(line)):
        step()
    print(json.dumps([time.perf_counter() - start, memory()]), flush=True)
"""
)


def prepare(config: ConfigDict) -> tuple[Callable[[int], float], int, str]:
    """(function that takes n steps and returns the seconds, number of devices, description of their memory)."""
    simulated.use_cpus(config.mesh.cpu_devices)
    mesh = make_mesh(config.mesh.data, config.mesh.fsdp, config.mesh.tensor, config.mesh.slices)
    learner = make_learner(config, mesh, steps=100_000, examples=config.batch_size)
    text, rng = learner.model.architecture.text, np.random.default_rng(0)
    spec = learner.batch_spec(config.batch_size)
    batch = {
        name: rng.integers(1, text.vocab_size if name == "text" else 256, array.shape).astype(array.dtype)
        for name, array in spec.items()
    }
    batch, constants = to_devices(batch, mesh, config.batch_size), learner.load_constants()
    state, step = learner.create_state(), learner.step()
    start = time.perf_counter()
    compiled = step.lower(state, batch, constants).compile()
    print(f"compiled in {time.perf_counter() - start:.0f} s", file=sys.stderr)

    def run(steps: int) -> float:
        nonlocal state
        start = time.perf_counter()
        for _ in range(steps):
            state, metrics = compiled(state, batch, constants)
        jax.block_until_ready(metrics)
        return time.perf_counter() - start

    run(1)
    stats = jax.local_devices()[0].memory_stats() or {}
    peak = stats.get("peak_bytes_in_use", peer.peak())
    temporary = compiled.memory_analysis().temp_size_in_bytes
    return run, mesh.size, f"peak {peak / GIB:.2f} GiB, temporary by the compiler {temporary / GIB:.2f} GiB per device"


def compare(config: ConfigDict, run: Callable[[int], float], args: argparse.Namespace) -> tuple:
    """(our seconds, OpenCLIP's seconds, description of its memory), each for ``repeats`` turns."""
    preset = configs.resolve_preset(config)
    text = preset.architecture.text
    job = {
        "model": open_clip_config.from_preset(preset)["model_cfg"],
        "batch": config.batch_size,
        "vocabulary": text.vocab_size,
        "length": text.context_length,
        "loss": config.objectives.contrastive.loss,
        "dtype": config.model.dtype,
        "compile": args.compile,
    }
    with tempfile.NamedTemporaryFile("w", suffix=".json") as file:
        json.dump(job, file)
        file.flush()
        with peer.started(OPEN_CLIP, file.name) as ask:
            ask("1")
            turns = [(run(args.steps), *ask(str(args.steps))) for _ in range(args.repeats)]
    ours, theirs, memory = zip(*turns, strict=True)
    return ours, theirs, f"peak {max(memory) / GIB:.2f} GiB"


def main() -> None:
    arguments, overrides = split_overrides(sys.argv[1:])
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--config", required=True, help="a recipe; --config.some.key=value overrides a setting")
    parser.add_argument("--steps", type=int, default=2, help="steps per turn")
    parser.add_argument("--repeats", type=int, default=7, help="turns")
    parser.add_argument("--compile", action="store_true", help="run OpenCLIP with torch.compile")
    args = parser.parse_args(arguments)
    config = configs.load(args.config, overrides)
    run, devices, memory = prepare(config)
    theirs, their_memory = (), ""
    if peer.is_installed():
        ours, theirs, their_memory = compare(config, run, args)
    else:
        ours = [run(args.steps) for _ in range(args.repeats)]
    speed, *their_speed = (config.batch_size * args.steps / statistics.median(s) for s in (ours, theirs) if s)
    kind = jax.devices()[0].device_kind
    print(f"{config.model.name}, batch {config.batch_size:,}, {config.model.dtype}, {devices} x {kind}")
    print(f"pairs/s   {speed:,.1f}")
    achieved = flops.training(configs.resolve_preset(config).architecture) * speed
    peak = hardware.peak_flops(kind)
    print(f"FLOP/s    {achieved / 1e12:.3f} T" + (f", MFU {achieved / peak / devices:.1%}" if peak else ""))
    print(f"memory    {memory}")
    if theirs:
        print(f"OpenCLIP  {their_speed[0]:,.1f} pairs/s; speedup {peer.ratio(ours, theirs)}")
        print(f"          {their_memory}")


if __name__ == "__main__":
    main()
