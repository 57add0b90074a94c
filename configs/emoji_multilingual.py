"""A small CLIP on emoji with their names in twelve languages: one vocabulary, another language at each step.

python -m clip_jax.data.emoji --to=data/emoji      as for configs/emoji.py; it writes the names in all languages
python main.py --config=configs/emoji_multilingual.py --workdir=runs/emoji_multilingual      or :DIR with those shards

The vocabulary is trained on the names in all languages. Each time that an emoji is seen it has its name in one of them,
at random: a language is seen a twelfth as often as English in configs/emoji.py, so the run is longer. Each language has
its own retrieval evaluation among the held-out pairs; eval/ko/... is Korean.
Planned for v5e-1 (docs/plans.md); a CPU is enough.
Expect: train/loss about ln(256) = 5.5 at the first step. Not trained to its end yet: no recall is known.
"""

from clip_jax.config import defaults, evaluation
from clip_jax.data.emoji import LANGUAGES


def get_config(shards: str = "data/emoji"):
    config = defaults()
    config.epochs = 36.0
    config.batch_size = 256

    config.data.train = f"tar:{shards}/train-*.tar"
    config.data.samples = 3461
    config.data.caption = ",".join(f"captions.{language}" for language in LANGUAGES)
    for language in LANGUAGES:
        config.eval[language] = evaluation(
            source=f"tar:{shards}/heldout-*.tar", caption=f"captions.{language}", every_epochs=6.0
        )
    config.checkpoint.every_epochs = 6.0

    config.tokenizer.kind = "sentencepiece"
    # 128 px, patch 16, 6 + 4 layers of width 256, exact GELU, context 32: the longest name, a Hindi one, has 27 tokens.
    config.model.name = "ViT-Emoji/16"
    config.model.text.vocab_size = 12_000
    config.model.scan = False  # a tenth faster on a CPU

    config.optimizer.learning_rate = 1e-3
    config.optimizer.warmup_steps = 40
    config.optimizer.weight_decay = 0.2
    config.optimizer.beta2 = 0.98
    config.optimizer.eps = 1e-6

    config.mesh.cpu_devices = 2
    return config
