"""Locked-image tuning (Zhai et al. 2022, LiT) with the sigmoid loss (SigLiT, Zhai et al. 2023): a text tower for L/16.

python main.py --config='configs/lit_l16.py:tar:/data/train-*.tar' --workdir=runs/lit_l16
The image tower is frozen: it has no gradient, no moments and no backward pass. Its weights are SigLIP's, from the hub;
--config.model.init_from takes others of the same architecture. The text tower has 12 layers and starts untrained.

From the papers: the batch (SigLiT) and the frozen tower. The rate, the decay and the length are those of
configs/siglip_b16.py and a tenth of its pairs. Planned for v5e-64 (docs/plans.md); not trained here.
Expect: train/loss about 10 at the first step (bias -10).
"""

from clip_jax.config import defaults


def get_config(data: str = "tar:data/train-*.tar"):
    config = defaults()
    config.examples = 900_000_000
    config.batch_size = 20_480
    config.data.train = data
    config.data.workers = 16

    config.model.name = "ViT-L/16-SigLIP-256"
    config.model.dtype = "bfloat16"
    config.model.remat = "dots"
    text = config.model.text
    text.width, text.layers, text.heads, text.mlp_width = 768, 12, 12, 3072
    config.model.init_from = "hf://timm/ViT-L-16-SigLIP-256"
    config.model.init_from_allow = ("text/*",)  # other sizes: initialized
    config.model.frozen = ("image/*",)
    config.objectives.contrastive.loss = "sigmoid"
    config.objectives.contrastive.max_logit_scale = 0.0

    config.optimizer.learning_rate = 1e-3
    config.optimizer.warmup_examples = 40_000_000
    config.optimizer.decay = "kernels"
    config.optimizer.weight_decay = 0.1
    config.optimizer.beta2 = 0.95
    config.optimizer.clip_norm = 1.0

    config.checkpoint.every_steps = 1000
    return config
