"""A CLIP ViT-B/32 from scratch on COCO captions (82,783 images, five captions each), read by TFDS without TensorFlow.

Prepare the data once, in an environment with TensorFlow (pip install 'clip-jax-tpu[tfds-build]'):
    python -c "import tensorflow_datasets as tfds
    tfds.builder('coco_captions', file_format='array_record').download_and_prepare()"
Then, in this environment:
python main.py --config=configs/coco_captions.py --workdir=runs/coco --config.data.tfds_dir=DIR

Training draws one of the captions of an image at random; evaluation uses all five captions of each image of the
Karpathy split.
Planned for v5e-8 (docs/plans.md).
Expect: train/loss about ln(512) = 6.2 at the first step. COCO alone is small for a CLIP: a first run on real
photographs, not a model for use.
"""

from clip_jax.config import defaults, evaluation


def get_config():
    config = defaults()
    config.epochs = 30.0
    config.batch_size = 512
    config.data.train = "tfds:coco_captions/train"
    config.data.samples = 82_783  # coco_captions/train
    config.data.workers = 8
    config.data.crop_scale = (0.5, 1.0)
    config.eval.coco = evaluation(source="tfds:coco_captions/val", every_epochs=1.0)
    config.checkpoint.every_epochs = 1.0

    config.model.name = "ViT-B/32"
    config.model.dtype = "bfloat16"

    config.optimizer.learning_rate = 5e-4
    config.optimizer.warmup_epochs = 1.0
    config.optimizer.weight_decay = 0.2
    config.optimizer.clip_norm = 1.0
    return config
