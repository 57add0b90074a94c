"""CoCa ViT-B/32 (Yu et al. 2022), as OpenCLIP's coca_ViT-B-32 was trained.

python main.py --config='configs/coca_b32.py:tar:/data/train-*.tar' --workdir=runs/coca_b32
256 learned queries pool the image: the first is the embedding, the decoder sees the others. It continues from the text
tower's tokens and has its sizes: 12 layers, width 512.

The weights of the losses, 1 and 2, the batch and the number of pairs are those of OpenCLIP's model; the learning rate
and the rest are those of configs/clip_vit_b32.py. Planned for v5e-256 (docs/plans.md); not trained here.
Expect: train/captioning/loss about 11 at the first step (ln(49408) = 10.8);
train/contrastive/loss about ln(90112) = 11.4.
"""

from clip_jax.config import defaults


def get_config(data: str = "tar:data/train-*.tar"):
    config = defaults()
    config.examples = 13_000_000_000
    config.batch_size = 90_112
    config.data.train = data
    config.data.workers = 16

    config.model.name = "coca_ViT-B/32"
    config.model.dtype = "bfloat16"
    config.model.remat = "full"
    config.objectives.captioning.weight = 2.0

    config.optimizer.learning_rate = 5e-4
    config.optimizer.warmup_steps = 2000
    config.optimizer.weight_decay = 0.2

    config.checkpoint.every_steps = 1000
    config.checkpoint.keep_every_steps = 50_000
    return config
