"""CLIP RN50x64 as in Radford et al. 2021 (tables 18 and 19): 32 epochs at a global batch of 32,768.

python main.py --config='configs/clip_rn50x64.py:tar:/data/train-*.tar' --workdir=runs/clip_rn50x64

Planned for v5e-256 (docs/plans.md); batch norm then sees one micro-batch at a time.
Expect: train/loss about ln(32768) = 10.4 at the first step; zero-shot ImageNet top-1 0.739 (the paper's weights).
"""

from clip_jax.config import defaults


def get_config(data: str = "tar:data/train-*.tar"):
    config = defaults()
    config.epochs = 32.0
    config.batch_size = 32_768
    config.data.train = data
    config.data.samples = 400_000_000  # the paper's
    config.data.workers = 16

    config.model.name = "RN50x64"
    config.model.dtype = "bfloat16"
    config.model.remat = "full"
    config.micro_batch = 4096
    config.mesh.fsdp = 16

    config.optimizer.learning_rate = 3.6e-4
    config.optimizer.warmup_steps = 2000
    config.optimizer.weight_decay = 0.2
    config.optimizer.beta2 = 0.999
    config.optimizer.eps = 1e-8
    config.optimizer.clip_norm = 0.0

    config.checkpoint.every_steps = 1000
    config.checkpoint.keep_every_steps = 50_000
    return config
