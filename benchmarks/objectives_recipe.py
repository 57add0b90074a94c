"""The runs that benchmarks/objectives.py compares, as a recipe: one small tower, and one difference to plain softmax.

python main.py --config=benchmarks/objectives_recipe.py:scenes,softmax,runs/objectives,data --workdir=runs/one

The rate is constant after the warm-up and an EMA of the parameters is evaluated: a reading in the middle of a run is
then that of a run of this length, so that one run can be read at equal pairs and at equal cost.
"""

from collections.abc import Callable, Mapping
from typing import NamedTuple

from ml_collections import ConfigDict

from clip_jax.config import defaults, evaluation
from clip_jax.data.sources.shapes import TEMPLATES

READINGS = 8
"""Evaluations of a run."""


class Data(NamedTuple):
    """A set to train on and the pairs that it is read on; ``{folder}`` is the benchmark's, ``{data}`` the user's."""

    train: str
    held_out: str
    caption: str
    held_out_caption: str
    steps: int
    length: int
    """Tokens of a text."""
    words: int
    """Size of the vocabulary."""
    crop_scale: tuple[float, float]
    crop_ratio: tuple[float, float]
    probe: Mapping[str, object]
    """A further evaluation after the last step; empty: none."""
    metric: str = ""
    """Its number in the table."""


WHOLE, NEARLY = ((1.0, 1.0), (1.0, 1.0)), ((0.8, 1.0), (0.9, 1.11))

SETS = {
    "scenes": Data(
        *("tar:{folder}/scenes", "shapes:heldout", "captions", "txt", 160, 32, 1024, *WHOLE),
        {"protocol": "composition", "source": "shapes:heldout"},
        "mean",
    ),
    "icons": Data(
        *("tar:{data}/icons/train-*.tar", "tar:{data}/icons/heldout-*.tar", "txt=1,captions=1", "txt"),
        *(400, 16, 4000, *NEARLY),
        {
            "protocol": "zero_shot",
            "source": "tar:{data}/icons/zeroshot-*.tar",
            "templates": ("{}", "{} icon", "an icon of a {}"),
        },
        "zero_shot_top1",
    ),
    "emoji": Data(
        *("tar:{data}/emoji/train-*.tar", "tar:{data}/emoji/heldout-*.tar", "txt", "txt", 300, 16, 1024, *NEARLY), {}
    ),
}


def _captioning(config: ConfigDict) -> None:
    config.objectives.captioning.weight = 2.0  # CoCa's


def _stage_b(config: ConfigDict) -> None:
    """SigLIP 2's last fifth, with heads in proportion to the towers."""
    distillation = config.objectives.self_distillation
    distillation.local_size, distillation.prototypes, distillation.hidden, distillation.bottleneck = 32, 1024, 256, 64
    config.phases = ({"start": config.steps * 4 // 5, "objectives.self_distillation.weight": 0.25},)


def _distilled(config: ConfigDict) -> None:
    config.objectives.distillation.weight = 1.0


def _setting(key: str, value: object) -> Callable[[ConfigDict], None]:
    section, _, name = key.rpartition(".")

    def change(config: ConfigDict) -> None:
        for part in section.split("."):
            config = config[part]
        config[name] = value

    return change


OBJECTIVES: dict[str, Callable[[ConfigDict], None]] = {
    "softmax": lambda config: None,
    "teacher": lambda config: None,
    "sigmoid": _setting("objectives.contrastive.loss", "sigmoid"),
    "captioning": _captioning,
    "stage B": _stage_b,
    "equal captions": _setting("objectives.contrastive.positives", "captions"),
    "hard negatives": _setting("objectives.contrastive.negatives", 1),
    "distilled": _distilled,
    "muon": _setting("optimizer.name", "muon"),
}
"""Name -> what it changes in the run with the softmax loss and AdamW. ``teacher`` has larger towers."""

TOWERS = {"image": (128, 3), "text": (128, 2)}
TEACHER = {"image": (192, 4), "text": (192, 3)}
"""Widths and layers; the teacher's blocks have three times the parameters."""


def get_config(what: str = "scenes,softmax,runs/objectives,data"):
    name, objective, folder, data = what.split(",")
    of, folders = SETS[name], {"folder": folder, "data": data}
    config = defaults()
    config.steps, config.batch_size = of.steps, 128
    config.data.train, config.data.caption = of.train.format(**folders), of.caption
    config.data.crop_scale, config.data.crop_ratio = of.crop_scale, of.crop_ratio
    config.ema_decay = 0.98

    config.eval.held_out = evaluation(
        source=of.held_out.format(**folders), caption=of.held_out_caption, every_steps=of.steps // READINGS
    )
    if of.probe:
        source = str(of.probe["source"]).format(**folders)
        config.eval.probe = evaluation(templates=TEMPLATES, caption=of.held_out_caption)
        config.eval.probe.update({**of.probe, "source": source})
    config.checkpoint.every_steps = of.steps // 2
    config.log.tensorboard = False

    config.tokenizer.kind = "sentencepiece"
    config.model.name = "ViT-Shapes/16"
    config.model.scan = False  # a tenth faster on a CPU
    config.model.embed_dim = 128
    config.model.image.image_size, config.model.image.patch_size = 64, 16
    config.model.text.context_length, config.model.text.vocab_size = of.length, of.words
    for tower, (width, layers) in (TEACHER if objective == "teacher" else TOWERS).items():
        sizes = config.model[tower]
        sizes.width, sizes.layers, sizes.heads, sizes.mlp_width = width, layers, width // 32, 4 * width

    config.optimizer.learning_rate, config.optimizer.warmup_steps = 1.5e-3, 40
    config.optimizer.schedule = "constant"
    config.optimizer.weight_decay, config.optimizer.clip_norm = 0.1, 1.0

    OBJECTIVES[objective](config)
    if objective == "distilled":
        config.objectives.distillation.stored = f"{folder}/{name}/stored"
    return config
