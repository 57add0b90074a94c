"""UniCL after Yang et al. 2022 (arXiv 2204.03610): captions and class names in one run; equal texts are positives.

python main.py --config='configs/unicl_b16.py:tar:/data/train-*.tar' --workdir=runs/unicl_b16
data/classes has a folder of images for each class; its name is their caption. Images of a batch that share a caption
are positives of each other's texts, as those of a class are in the paper. There, the caption of an image-text pair is a
positive of its own image only; here equal ones count as well.

From the authors' code (github.com/microsoft/UniCL, config.py): 32 epochs with 5 of warm-up, decay, betas, eps, the
clipped gradient and the text tower (12 layers, width 512). From memory: the batch of 4,096, the rate of 1e-3, and the
27M examples of YFCC-14M and ImageNet-21K. What is different here: a ViT-B/16 in place of the Swin-B, whose zero-shot
accuracy on ImageNet, 0.443, is therefore none to expect; bare class names in place of sentences with them; no
stochastic depth. Planned for v5e-32 (docs/plans.md); not trained here.
Expect: train/loss about ln(4096) = 8.3 at the first step. It does not go to zero: with n positives it ends at ln n.
"""

from clip_jax.config import defaults


def get_config(pairs: str = "tar:data/train-*.tar", classes: str = "folder:data/classes"):
    config = defaults()
    config.epochs = 32.0
    config.batch_size = 4096
    config.data.train = ((pairs, 1.0), (classes, 1.0))
    config.data.samples = 27_000_000  # for a plan
    config.data.workers = 16

    config.model.name = "ViT-B/16"
    config.model.dtype = "bfloat16"
    config.model.remat = "dots"
    config.objectives.contrastive.positives = "captions"

    config.optimizer.learning_rate = 1e-3
    config.optimizer.warmup_epochs = 5.0
    config.optimizer.weight_decay = 0.1
    config.optimizer.beta2 = 0.999
    config.optimizer.eps = 1e-8
    config.optimizer.clip_norm = 5.0

    config.checkpoint.every_steps = 1000
    return config
