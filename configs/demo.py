"""A small CLIP on the bundled scenes of coloured shapes: pretrained, evaluated and plotted in about four minutes on two
CPU cores.

make demo
python main.py --config=configs/demo.py --workdir=runs/demo

Twenty-four of the sixty-four combinations of colour and shape never appear in training; zero-shot accuracy is
measured among these alone, retrieval on scenes that hold one of them.
Planned for v5e-1 (docs/plans.md); a CPU will do.
Expect: zero-shot top-1 0.996 (chance 0.042), image to text R@1 0.727 and text to image R@1 0.729 among 512, R@5 0.99;
3 minutes of training at 740 pairs/s, 4 minutes with the installation.
"""

from clip_jax.config import defaults
from clip_jax.data.shapes import TEMPLATES


def get_config():
    config = defaults()
    config.steps = 1000
    config.batch_size = 128
    config.data.train = "shapes:train"
    # The scenes are drawn anew for each pair: a crop would only blur them, and another aspect make ellipses of circles.
    config.data.crop_scale = (1.0, 1.0)
    config.data.crop_ratio = (1.0, 1.0)

    config.eval.heldout = "shapes:heldout"
    config.eval.zero_shot = "shapes:zero_shot"
    config.eval.templates = TEMPLATES
    config.eval.every_steps = 250
    config.checkpoint.every_steps = 250

    config.model.name = "ViT-Shapes/16"  # 64 px, patch 16; 4 layers of width 192 and 2 of width 128
    config.model.scan = False  # a tenth faster on a CPU

    config.optimizer.learning_rate = 1.5e-3
    config.optimizer.warmup_steps = 50
    config.optimizer.weight_decay = 0.1

    config.mesh.cpu_devices = 2
    return config
