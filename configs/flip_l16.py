"""FLIP ViT-L/16 after Li et al. 2022 (arXiv 2212.00794): half of the patches are dropped, then a short unmasked stage.

python main.py --config='configs/flip_l16.py:tar:/data/train-*.tar' --workdir=runs/flip_l16
The vocabulary is BERT's: from the Hugging Face cache or hub, or --config.tokenizer.vocab=PATH.

From the paper: the towers (table 9, section 3.1: averaged patches, texts of 32 word pieces, no causal mask), the rate
of 4e-6 for 256 pairs, decay, beta2 and the warm-up of 51.2M pairs (table 10), the batch of 64k (section 4.2), 32 epochs
of 400M pairs, and the unmasked stage of 0.32 epochs at 4e-8 for 256 pairs (section 4.1, appendix A.1). The crops of at
least 0.5 and the mirrored images are those of the authors' code (github.com/facebookresearch/flip). What is different
here:
- the unmasked stage decays linearly from its rate; the paper's warms up again for 25.6M pairs and decays as a cosine;
- positions are learned and the logit scale begins at 1 / 0.07; the code's positions are fixed and its scale begins at
  100;
- bfloat16; the paper trained in float32.
Planned for v5e-256 (docs/plans.md); not trained here.
Expect: train/loss about ln(65536) = 11.1 at the first step; zero-shot ImageNet top-1 0.743 (table 2, LAION-400M).
"""

from clip_jax.config import defaults

MASKED, UNMASKED = 195_312, 1_953  # steps: 12.8B and 128M pairs


def get_config(data: str = "tar:data/train-*.tar"):
    config = defaults()
    config.steps = MASKED + UNMASKED
    config.batch_size = 65_536
    config.data.train = data
    config.data.crop_scale = (0.5, 1.0)
    config.data.augment.flip = 0.5
    config.data.workers = 16

    config.model.name = "ViT-L/16-CLIPA"
    config.model.patch_dropout = 0.5
    config.model.dtype = "bfloat16"
    config.model.remat = "full"

    config.optimizer.learning_rate = 1.024e-3
    config.optimizer.warmup_steps = 781
    config.optimizer.weight_decay = 0.2
    config.optimizer.beta2 = 0.95

    config.phases = (
        {
            "start": MASKED,
            "model.patch_dropout": 0.0,
            "optimizer.learning_rate": 1.024e-5,
            "optimizer.schedule": "wsd",
            "optimizer.cooldown_steps": UNMASKED,
        },
    )

    config.checkpoint.every_steps = 1000
    config.checkpoint.keep_every_steps = 50_000
    return config
