"""The end of SigLIP 2's ViT-B/16: 4B pairs that a larger model selects (ACID; Tschannen et al. 2025, arXiv 2502.14786).

python main.py --config='configs/siglip2_b16_acid.py:tar:/data/train-*.tar' --workdir=runs/siglip2_b16_acid
Starts from runs/siglip2_b16 (--config.model.init_from), without its decoder. The reference is the published
So400m/16 of the same size in pixels; --config.objectives.selection.reference_weights takes another one: a run folder,
a file or hf://org/name.

From the paper: a rate of 1e-5 without weight decay, the sigmoid loss alone, batches of 32,768 from 65,536 pairs (B/32:
ratio=4). What is different here: the paper first trains its reference on 1B curated pairs; the rate is constant and
without warm-up, the paper names no schedule.
Planned for v5e-256 (docs/plans.md); a small copy is trained in a test, this never.
Expect: train/selection/selected above train/selection/all from the first step; zero-shot ImageNet top-1 0.791 (the
paper's B/16, WebLI).
"""

from clip_jax.config import defaults


def get_config(data: str = "tar:data/train-*.tar"):
    config = defaults()
    config.steps = 122_070  # 4B pairs that are trained on
    config.batch_size = 32_768
    config.data.train = data
    config.data.workers = 16

    config.model.name = "ViT-B/16-SigLIP2-256"
    config.model.init_from = "runs/siglip2_b16"
    config.model.init_from_allow = ("decoder/*",)  # that of the run before, left out
    config.model.dtype = "bfloat16"
    config.model.remat = "full"
    config.model.activation = "gelu_tanh"
    config.objectives.contrastive.loss = "sigmoid"
    config.objectives.contrastive.max_logit_scale = 0.0
    config.objectives.selection.weight = 1.0
    config.objectives.selection.ratio = 2
    config.objectives.selection.reference = "ViT-SO400M/16-SigLIP2-256"
    config.objectives.selection.reference_weights = "hf://timm/ViT-SO400M-16-SigLIP2-256"
    config.mesh.fsdp = 16

    config.optimizer.schedule = "constant"
    config.optimizer.learning_rate = 1e-5
    config.optimizer.warmup_steps = 0
    config.optimizer.weight_decay = 0.0
    config.optimizer.beta2 = 0.95
    config.optimizer.clip_norm = 1.0

    config.checkpoint.every_steps = 1000
    config.checkpoint.keep_every_steps = 50_000
    return config
