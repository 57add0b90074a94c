"""A CLIP on your own images with captions: a folder of images, tar shards or a TFDS dataset, chosen by one argument.

python main.py --config=configs/own_images.py:folder:photos/train --workdir=runs/photos \\
    --config.eval.held_out.source=folder:photos/held_out

A small model (5M + 8M parameters, 128 px) that trains on a CPU and learns its own vocabulary from the captions. On a
GPU or a TPU, use a larger one: --config.model.name=ViT-B/32 --config.model.dtype=bfloat16 --config.batch_size=1024
Planned for v5e-8 (docs/plans.md).
Expect: train/loss about ln(256) = 5.5 at the first step, falling within the first epochs.
"""

from clip_jax.config import defaults, evaluation


def get_config(data: str = "folder:photos/train"):
    config = defaults()
    config.epochs = 30.0
    config.batch_size = 256
    config.data.train = data
    config.eval.held_out = evaluation(every_epochs=5.0)  # with its source, by the command line
    config.checkpoint.every_epochs = 5.0

    config.model.name = "ViT-Emoji/16"
    config.tokenizer.kind = "sentencepiece"
    config.model.text.vocab_size = 8192

    config.optimizer.learning_rate = 1e-3
    config.optimizer.warmup_epochs = 1.0
    config.optimizer.weight_decay = 0.2
    return config
