"""CLIP ViT-H/14 after OpenCLIP's run on LAION-2B (32 epochs, learning rate 5e-4, with a batch of 79,000 there).

python main.py --config='configs/clip_h14.py:tar:/data/train-*.tar' --workdir=runs/clip_h14

Planned for v5e-256 (docs/plans.md).
Expect: train/loss about ln(32768) = 10.4 at the first step; zero-shot ImageNet top-1 0.780 (OpenCLIP, LAION-2B).
"""

from clip_jax.config import defaults


def get_config(data: str = "tar:data/train-*.tar"):
    config = defaults()
    config.examples = 32_000_000_000
    config.batch_size = 32_768
    config.data.train = data
    config.data.workers = 16

    config.model.name = "ViT-H/14"
    config.model.dtype = "bfloat16"
    config.model.remat = "full"
    config.mesh.fsdp = 16  # parameters, moments and gradients are 16 GB: a chip's whole memory

    config.optimizer.learning_rate = 5e-4
    config.optimizer.warmup_steps = 2000
    config.optimizer.weight_decay = 0.2
    config.optimizer.beta2 = 0.98
    config.optimizer.eps = 1e-6
    config.optimizer.clip_norm = 1.0

    config.checkpoint.every_steps = 1000
    config.checkpoint.keep_every_steps = 50_000
    return config
