"""CLIP ViT-B/32 that learns from a ViT-L/14 in the step: OpenCLIP's DistillClipLoss beside the contrastive loss.

python main.py --config='configs/distill_b32_from_l14.py:tar:/data/train-*.tar' --workdir=runs/distill_b32
The teacher is OpenCLIP's L/14 of DataComp-XL, from the hub; --config.objectives.distillation.teacher_weights takes
another ViT-L/14: a run folder, a file or hf://org/name. A step takes five times the FLOPs of the student alone.

Batch and schedule are those of configs/clip_vit_b32.py on a tenth of its pairs.
Planned for v5e-256 (docs/plans.md); not trained here.
Expect: train/contrastive/loss about ln(32768) = 10.4 at the first step, and train/distillation/loss the same.
"""

from clip_jax.config import defaults


def get_config(data: str = "tar:data/train-*.tar"):
    config = defaults()
    config.examples = 1_280_000_000
    config.batch_size = 32_768
    config.data.train = data
    config.data.workers = 16

    config.model.name = "ViT-B/32"
    config.model.dtype = "bfloat16"
    config.model.remat = "dots"
    config.objectives.distillation.weight = 1.0
    config.objectives.distillation.teacher = "ViT-L/14"
    config.objectives.distillation.teacher_weights = "hf://laion/CLIP-ViT-L-14-DataComp.XL-s13B-b90K"

    config.optimizer.learning_rate = 5e-4
    config.optimizer.warmup_steps = 2000
    config.optimizer.weight_decay = 0.2

    config.checkpoint.every_steps = 1000
    return config
