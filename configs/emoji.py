"""A small CLIP on 3,447 real pairs: emoji and their names, with new combinations held out.

python main.py --config=configs/emoji.py --workdir=runs/emoji
python main.py --config=configs/emoji.py:DIR --workdir=runs/emoji          DIR holds train-*.tar and heldout-*.tar
"""

from pathlib import Path

from clip_jax.config import defaults

SHARED = Path(__file__).resolve().parent.parent.parent / "shared" / "data"


def get_config(folder: str = ""):
    shards = folder or str(SHARED / "emoji")
    config = defaults()
    config.epochs = 12.0
    config.batch_size = 256

    config.data.train = f"tar:{shards}/train-*.tar"
    config.eval.heldout = f"tar:{shards}/heldout-*.tar"
    config.eval.every_epochs = 1.0
    config.checkpoint.every_epochs = 1.0

    config.model.name = "ViT-Emoji/16"  # 128 px, patch 16, 6 + 4 layers of width 256, exact GELU, context 32
    config.model.scan = False  # a tenth faster on a CPU
    vocabulary = SHARED / "clip_bpe" / "bpe_simple_vocab_16e6.txt.gz"
    config.tokenizer.vocab = str(vocabulary) if vocabulary.exists() else ""
    config.data.crop_scale = (0.9, 1.0)

    config.optimizer.learning_rate = 1e-3
    config.optimizer.warmup_steps = 40
    config.optimizer.weight_decay = 0.2
    config.optimizer.beta2 = 0.98
    config.optimizer.eps = 1e-6

    config.mesh.cpu_devices = 2
    return config
