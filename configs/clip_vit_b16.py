"""CLIP ViT-B/16 as in Radford et al. 2021 (tables 18 to 20): 32 epochs at a global batch of 32,768.

python main.py --config='configs/clip_vit_b16.py:tar:/data/train-*.tar' --workdir=runs/clip_vit_b16
python main.py --config=configs/clip_vit_b16.py:tfds:coco_captions/train --workdir=runs/clip_vit_b16

The part after the first colon is the data: webdataset shards or a prepared TFDS dataset. On fewer devices than in the
paper, first lower the batch (--config.batch_size).
Planned for v5e-256 (docs/plans.md).
Expect: train/loss about ln(32768) = 10.4 at the first step; zero-shot ImageNet top-1 after 32 epochs of 400M pairs:
0.683 (the paper's weights), 0.671 (OpenCLIP on LAION-400M).
"""

from clip_jax.config import defaults


def get_config(data: str = "tar:data/train-*.tar"):
    config = defaults()
    config.epochs = 32.0
    config.batch_size = 32_768
    config.data.train = data
    config.data.samples = 400_000_000  # the paper's
    config.data.workers = 16

    config.model.name = "ViT-B/16-quickgelu"  # the released weights use QuickGELU
    config.model.dtype = "bfloat16"
    config.model.remat = "dots"
    config.model.scan = False  # a sixth faster on a TPU by the compiler's estimate, and slower to compile

    config.optimizer.learning_rate = 5e-4
    config.optimizer.warmup_steps = 2000
    config.optimizer.weight_decay = 0.2
    config.optimizer.beta1 = 0.9
    config.optimizer.beta2 = 0.98
    config.optimizer.eps = 1e-6
    config.objectives.contrastive.max_logit_scale = 100.0

    config.checkpoint.every_steps = 1000
    config.checkpoint.keep_every_steps = 50_000
    return config
