"""A small CLIP on the bundled scenes of coloured shapes, in a few minutes on two CPU cores.

python main.py --config=configs/demo.py --workdir=runs/demo          (or: make demo)

Twenty-four of the sixty-four combinations of colour and shape never appear in training; zero-shot accuracy is
measured among these alone.
"""

from clip_jax.config import defaults
from clip_jax.data.shapes import TEMPLATES


def get_config():
    config = defaults()
    config.steps = 600
    config.batch_size = 128
    config.data.train = "shapes:train"
    config.eval.heldout = "shapes:heldout"
    config.eval.zero_shot = "shapes:zero_shot"
    config.eval.templates = TEMPLATES
    config.eval.every_steps = 200
    config.checkpoint.every_steps = 200

    config.model.name = "ViT-Shapes/8"
    config.model.scan = False

    config.optimizer.learning_rate = 1e-3
    config.optimizer.warmup_steps = 50
    config.optimizer.weight_decay = 0.1
    config.mesh.cpu_devices = 2
    return config
