"""SigLIP 2 ViT-B/16 at 256 px after Tschannen et al. 2025 (arXiv 2502.14786): sigmoid loss, captioning, then also
self-distillation and masked prediction.

python main.py --config='configs/siglip2_b16.py:tar:/data/train-*.tar' --workdir=runs/siglip2_b16
The tokenizer is the paper's (Gemma's 256,000 pieces): from the Hugging Face cache or hub, or
--config.tokenizer.vocab=PATH.

From the paper: 40B pairs, a batch of 32,768, a rate of 1e-3 with 20,000 steps of warm-up and a cosine, a gradient norm
of at most 1; the sigmoid loss and a decoder of half the text tower's depth with equal weights; after 80 % of the run
self-distillation with weight 1 and masked prediction with 0.25, both times 0.25 for this size. The weight decay of
1e-4, which big_vision does not multiply by the learning rate of 1e-3, is 0.1 here. What is different here:
- the decoder predicts captions; the paper's also predicts boxes, of regions that a detector found;
- the second moments decay by 0.95, as SigLIP's; the paper names no value;
- sizes of the heads, temperatures and momenta are DINO's (clip_jax/objectives/self_distillation.py);
- the paper's B/16 ends with 4B pairs that a larger model selects.
Planned for v5e-256 (docs/plans.md); a small copy is trained in a test, this never.
Expect: train/contrastive/loss about 10 at the first step (bias -10), train/captioning/loss 12.5 (ln 256,000); zero-shot
ImageNet top-1 0.791 (paper, WebLI).
"""

from clip_jax.config import defaults

STEPS = 1_220_703  # 40B pairs
SECOND_STAGE = 976_562  # 80 %


def get_config(data: str = "tar:data/train-*.tar"):
    config = defaults()
    config.steps = STEPS
    config.batch_size = 32_768
    config.data.train = data
    config.data.workers = 16

    config.model.name = "ViT-B/16-SigLIP2-256"
    config.model.dtype = "bfloat16"
    config.model.remat = "full"
    config.model.activation = "gelu_tanh"  # in both towers, as the original was trained
    config.objectives.contrastive.loss = "sigmoid"
    config.objectives.contrastive.max_logit_scale = 0.0  # big_vision does not clamp it
    config.objectives.captioning.weight = 1.0
    config.objectives.captioning.layers = 6
    config.objectives.captioning.parallel = 0.5
    config.mesh.fsdp = 16

    config.optimizer.decay = "kernels"
    config.optimizer.learning_rate = 1e-3
    config.optimizer.warmup_steps = 20_000
    config.optimizer.weight_decay = 0.1
    config.optimizer.beta2 = 0.95
    config.optimizer.clip_norm = 1.0

    config.phases = ({"start": SECOND_STAGE, "objectives.self_distillation.weight": 0.25},)

    config.checkpoint.every_steps = 1000
    config.checkpoint.keep_every_steps = 50_000
    return config
