"""SigLIP ViT-B/16 after Zhai et al. 2023: sigmoid loss at a global batch of 32,768.

python main.py --config='configs/siglip_b16.py:tar:/data/train-*.tar' --workdir=runs/siglip_b16
The tokenizer is the paper's (T5's 32,000 pieces): from the Hugging Face cache or hub, or --config.tokenizer.vocab=PATH.
The optimizer is big_vision's Adafactor. Its weight decay of 1e-4, which big_vision does not multiply by the learning
rate of 1e-3, is 0.1 here.

Planned for v5e-64 (docs/plans.md).
Expect: train/loss about 10 at the first step (bias -10); zero-shot ImageNet top-1 0.760 (paper, WebLI).
"""

from clip_jax.config import defaults


def get_config(data: str = "tar:data/train-*.tar"):
    config = defaults()
    config.examples = 9_000_000_000
    config.batch_size = 32_768
    config.data.train = data
    config.data.workers = 16

    config.model.name = "ViT-B/16-SigLIP"
    config.model.dtype = "bfloat16"
    config.model.remat = "full"
    config.model.activation = "gelu_tanh"  # in both towers, as the original was trained
    config.objectives.contrastive.loss = "sigmoid"
    config.objectives.contrastive.max_logit_scale = 0.0  # big_vision does not clamp it

    config.optimizer.name = "adafactor"
    config.optimizer.first_moment_dtype = "bfloat16"
    config.optimizer.decay = "kernels"
    config.optimizer.learning_rate = 1e-3
    config.optimizer.warmup_steps = 20000
    config.optimizer.weight_decay = 0.1
    config.optimizer.beta2 = 0.95
    config.optimizer.clip_norm = 1.0

    config.checkpoint.every_steps = 1000
    config.checkpoint.keep_every_steps = 50_000
    return config
