"""CLIP ViT-L/14 at 336 px as in Radford et al. 2021 (section 3.2): one more epoch from the 224 px run.

python main.py --config='configs/clip_vit_l14_336.py:tar:/data/train-*.tar' --workdir=runs/clip_vit_l14_336

Starts from runs/clip_vit_l14 (--config.model.init_from), whose position embeddings are resized to the finer grid.
Planned for v5e-256 (docs/plans.md).
Expect: zero-shot ImageNet top-1 0.766 (the paper's weights).
"""

from clip_jax.config import defaults


def get_config(data: str = "tar:data/train-*.tar"):
    config = defaults()
    config.epochs = 1.0
    config.batch_size = 32_768
    config.data.train = data
    config.data.samples = 400_000_000  # the paper's
    config.data.workers = 16

    config.model.name = "ViT-L/14-336-quickgelu"
    config.model.init_from = "runs/clip_vit_l14"
    config.model.dtype = "bfloat16"
    config.model.remat = "full"
    config.mesh.fsdp = 16  # the state and the activations of 577 tokens do not fit on a chip

    config.optimizer.learning_rate = 2e-5
    config.optimizer.warmup_steps = 0
    config.optimizer.weight_decay = 0.2
    config.optimizer.beta2 = 0.98
    config.optimizer.eps = 1e-6

    config.checkpoint.every_steps = 1000
    return config
