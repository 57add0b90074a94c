"""CLIPA ViT-L/16 after Li et al. 2023 (arXiv 2305.07017): images of 96 px and texts of 8 tokens, then 224 px and 32.

python main.py --config='configs/clipa_l16.py:tar:/data/train-*.tar' --workdir=runs/clipa_l16
The vocabulary is BERT's: from the Hugging Face cache or hub, or --config.tokenizer.vocab=PATH.

Both stages are CLIPA-L/16 (I37, T8) of the authors' scripts (github.com/UCSC-VLAA/CLIPA, scripts/exp/gpu/vit_l16):
2.56B pairs at 1.024e-3 after 51.2M pairs of warm-up, crops of at least 0.4, color jitter and gray images, then 131M
pairs. The second rate is their 8e-7 for 256 pairs. What is different here:
- a phase keeps the batch, which their script lowers to 7,168; their JAX configuration keeps 32,768 as well;
- the second stage decays linearly from its rate; theirs warms up again for 26M pairs and decays as a cosine;
- the towers are those of CLIPA's JAX code and of the published L/14, with learned positions in place of fixed ones; the
  script has CLIP's text tower.
Planned for v5e-256 (docs/plans.md); not trained here.
Expect: train/loss about ln(32768) = 10.4 at the first step; zero-shot ImageNet top-1 0.693 (the authors' script).
"""

from clip_jax.config import defaults

REDUCED, FULL = 78_125, 4_000  # steps: 2.56B and 131M pairs


def get_config(data: str = "tar:data/train-*.tar"):
    config = defaults()
    config.steps = REDUCED + FULL
    config.batch_size = 32_768
    config.data.train = data
    config.data.crop_scale = (0.4, 1.0)
    config.data.augment.jitter = (0.32, 0.32, 0.32, 0.08)
    config.data.augment.jitter_probability = 0.8
    config.data.augment.gray = 0.2
    config.data.workers = 16

    config.model.name = "ViT-L/16-CLIPA"
    config.model.image.image_size = 96  # 36 patches
    config.model.text.context_length = 8
    config.model.dtype = "bfloat16"
    config.model.remat = "dots"

    config.optimizer.learning_rate = 1.024e-3
    config.optimizer.warmup_steps = 1563
    config.optimizer.weight_decay = 0.2
    config.optimizer.beta2 = 0.95

    config.phases = (
        {
            "start": REDUCED,
            "model.image.image_size": 224,
            "model.text.context_length": 32,
            "model.remat": "full",
            "optimizer.learning_rate": 1.024e-4,
            "optimizer.schedule": "wsd",
            "optimizer.cooldown_steps": FULL,
        },
    )

    config.checkpoint.every_steps = 1000
    return config
