"""CLIP ViT-bigG/14 after OpenCLIP's run on LAION-2B.

python main.py --config='configs/clip_bigg14.py:tar:/data/train-*.tar' --workdir=runs/clip_bigg14
Parameters and optimizer state are 30 GB, so they are sharded over 64 devices (mesh.fsdp).

Planned for v5e-256 (docs/plans.md).
Expect: train/loss about ln(32768) = 10.4 at the first step; zero-shot ImageNet top-1 0.801 (OpenCLIP, LAION-2B).
"""

from clip_jax.config import defaults


def get_config(data: str = "tar:data/train-*.tar"):
    config = defaults()
    config.examples = 39_000_000_000
    config.batch_size = 32_768
    config.data.train = data
    config.data.workers = 16

    config.model.name = "ViT-bigG/14"
    config.model.dtype = "bfloat16"
    config.model.remat = "full"
    config.mesh.fsdp = 64  # divides both widths, 1664 and 1280; 256 does not

    config.optimizer.learning_rate = 5e-4
    config.optimizer.warmup_steps = 2000
    config.optimizer.weight_decay = 0.2
    config.optimizer.beta2 = 0.95
    config.optimizer.eps = 1e-6
    config.optimizer.clip_norm = 1.0

    config.checkpoint.every_steps = 1000
    config.checkpoint.keep_every_steps = 50_000
    return config
