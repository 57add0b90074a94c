"""A small CLIP on the bundled scenes of colored shapes: pretrained, evaluated and plotted in about three minutes on
two CPU cores.

make demo
python main.py --config=configs/demo.py --workdir=runs/demo

Twenty-four of the sixty-four combinations of color and shape never appear in training. Zero-shot accuracy is measured
only among these, retrieval on scenes that contain one of them.
Planned for v5e-1 (docs/plans.md); a CPU is enough.
Expect: zero-shot top-1 0.998 (chance 0.042), image to text and text to image R@1 0.69 among 512, R@5 0.99; 2 minutes of
training at 650 to 740 pairs/s, 3 minutes with the installation. 1,000 steps bring R@1 to 0.73.
"""

from clip_jax.config import defaults, evaluation
from clip_jax.data.sources.shapes import TEMPLATES


def get_config():
    config = defaults()
    config.steps = 600
    config.batch_size = 128
    config.data.train = "shapes:train"
    # Each pair gets a newly drawn scene: a crop would only blur it, and another aspect ratio would turn circles into
    # ellipses.
    config.data.crop_scale = (1.0, 1.0)
    config.data.crop_ratio = (1.0, 1.0)

    config.eval.held_out = evaluation(source="shapes:heldout", every_steps=200)
    config.eval.zero_shot = evaluation(
        protocol="zero_shot", source="shapes:zero_shot", templates=TEMPLATES, every_steps=200
    )
    config.checkpoint.every_steps = 200

    config.model.name = "ViT-Shapes/16"  # 64 px, patch 16; 4 layers of width 192 and 2 of width 128
    config.model.scan = False  # a tenth faster on a CPU

    config.optimizer.learning_rate = 1.5e-3
    config.optimizer.warmup_steps = 50
    config.optimizer.weight_decay = 0.1

    config.mesh.cpu_devices = 2
    return config
