"""A small CLIP on 3,461 real pairs: emoji and their names, with new combinations held out.

sudo apt-get install fonts-noto-color-emoji unicode-cldr-core      elsewhere: see clip_jax/data/emoji.py
python -m clip_jax.data.emoji --to=data/emoji
python main.py --config=configs/emoji.py --workdir=runs/emoji      or configs/emoji.py:DIR with those shards

The images are Noto Color Emoji (SIL Open Font License 1.1), the names Unicode CLDR's (Unicode License).
The held-out pairs are new combinations of things seen in training (a person, an activity, a skin tone).
Planned for v5e-1 (docs/plans.md); a CPU is enough.
Expect: after 12 epochs (161 steps, 8 minutes on two idle CPU cores at 80 to 110 pairs/s with
GLIBC_TUNABLES=glibc.malloc.hugetlb=1 in front), for seeds 0, 1, 2 and their mean:
    image to text R@1  0.848  0.826  0.853  -> 0.842        R@5  0.995  0.989  0.984  -> 0.989
    text to image R@1  0.853  0.870  0.886  -> 0.870        R@5  1.000  1.000  1.000  -> 1.000
These were measured on another draw of the held-out tenth, with 184 pairs. OpenCLIP with the same settings and one seed
has 0.82 and 0.83 for R@1, 0.98 and 0.99 for R@5 there. The standard error of R@1 is 0.03.
"""

from clip_jax.config import defaults, evaluation


def get_config(shards: str = "data/emoji"):
    config = defaults()
    config.epochs = 12.0
    config.batch_size = 256

    config.data.train = f"tar:{shards}/train-*.tar"
    config.data.samples = 3461
    config.eval.held_out = evaluation(source=f"tar:{shards}/heldout-*.tar", every_epochs=1.0)
    config.checkpoint.every_epochs = 1.0

    config.model.name = "ViT-Emoji/16"  # 128 px, patch 16, 6 + 4 layers of width 256, exact GELU, context 32
    config.model.scan = False  # a tenth faster on a CPU
    config.data.crop_scale = (0.9, 1.0)

    config.optimizer.learning_rate = 1e-3
    config.optimizer.warmup_steps = 40
    config.optimizer.weight_decay = 0.2
    config.optimizer.beta2 = 0.98
    config.optimizer.eps = 1e-6

    config.mesh.cpu_devices = 2
    return config
