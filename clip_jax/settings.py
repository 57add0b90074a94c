"""All settings: name, default, reason, and allowed values.

``defaults()`` is complete: nothing that is not in it is a setting, and every recipe starts from it. Two sections are
defined elsewhere: ``eval.<name>``, with names that the user chooses, by ``evaluation()``, and ``objectives.<name>`` by
the files in ``clip_jax/objectives``. The default of a new setting is what the code did before, so that older runs
resume unchanged.
"""

import math
from typing import Any, NamedTuple

from ml_collections import ConfigDict

from clip_jax.data.tokenizers import KINDS
from clip_jax.models.attention import ATTENTION
from clip_jax.models.transformer import ACTIVATIONS
from clip_jax.objectives import OBJECTIVES

AUTO = -1
"""A size or duration that is not given: sizes follow from the model's preset, durations from another unit."""

UNITS = ("steps", "examples", "epochs")


def _every(steps: int = AUTO, examples: int = AUTO, epochs: float = float(AUTO)) -> dict[str, Any]:
    return {"every_steps": steps, "every_examples": examples, "every_epochs": epochs}


def defaults() -> ConfigDict:
    """All settings with their defaults. A length of time is given in one of three units; the others stay at -1."""
    return ConfigDict(
        {
            "seed": 0,  # order, crops and initialization
            "steps": AUTO,
            "examples": AUTO,  # pairs seen
            "epochs": float(AUTO),  # steps = floor(epochs * N / batch_size)
            "batch_size": 256,  # pairs over all devices and processes
            "micro_batch": AUTO,  # pairs whose activations exist at one time, over all devices; -1: the full batch
            "ema_decay": 0.0,  # decay of an EMA of the parameters, which is then evaluated and loaded; 0: no EMA
            # What changes in the middle of a run: ({"start": 5000, "model.image.image_size": 384},), starts in steps.
            "phases": (),
            "data": {
                # kind:where, see docs/data.md; or several: (("tar:a", 1.0), ("tar:b", 4.0, "captions.de")),
                # each with a weight and, optionally, a caption setting of its own.
                "train": "shapes:train",
                "mixture": "weight",  # weights are how often each example is seen; share: they are shares of each batch
                "samples": AUTO,  # examples in the dataset, for a plan without the data; training counts them
                # txt, txt_lines (each line of the .txt is a caption), a dotted path into the example's JSON, such as
                # caption or captions.de, or a column of a table. Several have shares: captions.en=3,captions.de=1.
                "caption": "txt",
                "image": "",  # tables: the column of the images' paths or bytes; empty: found by its usual names
                # Boxes with texts: a dotted path into the example's JSON, a column or a feature; empty: none are read.
                "boxes": "",
                "truncated": "stop",  # at a truncated tar shard; or keep the pairs before the cut
                "links_to": "",  # a folder into which links of an image folder may lead; empty: only within itself
                "tfds_dir": "",  # where TFDS datasets are; empty: TFDS's own default
                "exif_orientation": False,  # rotate photos by their EXIF orientation; OpenCLIP and Transformers do not
                # A folder of clip-jax embed, made from data.train: embeddings of the frozen image tower, which then
                # does not run and sees no image.
                "image_embeddings": "",
                "crop_scale": (0.9, 1.0),  # area of the random crop (OpenCLIP's default)
                "crop_ratio": (3 / 4, 4 / 3),  # its aspect ratio
                # Lengths in tokens, (16, 32, 77): each batch has the shortest one that holds its texts; (): all are as
                # long as the context. For causal text towers that pool at the end token.
                "text_buckets": (),
                # Augmentations of the crop, as torchvision's; docs/data.md has the settings of published recipes.
                "augment": {
                    "flip": 0.0,  # probability of a mirrored image; captions with left and right become wrong
                    "jitter": (),  # largest change of brightness, contrast, saturation, hue: (0.4, 0.4, 0.4, 0.1)
                    "jitter_probability": 1.0,
                    "gray": 0.0,  # probability of an image without colors
                    "where": "host",  # by the workers; or device, in the step, with other random numbers
                },
                # How random crops are resized; evaluation always uses Pillow. simd: the same filter, several times as
                # fast, rounded differently; pip install 'clip-jax-tpu[fast]'.
                "resize": "pillow",
                "shuffle_block": 1,  # examples read together; 1: a full shuffle
                "shuffle_window": 1,  # blocks mixed with each other
                "max_bad_share": 0.01,  # of incomplete pairs, and of the last 10,000 examples; above it the run stops
                "changed": "stop",  # if the data changed since the run began; or accept the same number of examples
                "workers": 2,  # threads, each decoding a batch of its own
                "prefetch": 4,  # batches ready before they are needed
            },
            "tokenizer": {
                "kind": "",  # clip, clipa, siglip, siglip2, sentencepiece (trained on the captions); empty: the model's
                # Path of clip's bpe_simple_vocab_16e6.txt.gz, clipa's vocab.txt, siglip's .model or tokenizer.json,
                # another run's sentencepiece.model. Empty: that of model.init_from, else from the Hugging Face cache
                # or hub; sentencepiece: trained.
                "vocab": "",
                "train_captions": 100_000,  # sentencepiece: examples on whose captions it is trained
            },
            "model": {
                "name": "ViT-B/32",  # clip_jax.list_models()
                "init_from": "",  # initial weights: a run folder, foreign weights or hf://org/name (clip_jax.load)
                "init_from_allow": (),  # tensors that may be missing, unexpected or of another shape: text/*
                "dtype": "float32",  # of matrix products; parameters stay float32
                "scan": True,  # one compiled block whatever the depth; False unrolls (10 % faster on CPUs)
                "remat": "none",  # recomputed in the backward pass: none, dots, named, offload, full
                "attention": "auto",  # tpu, a Pallas kernel, on TPUs; cudnn on NVIDIA GPUs in bfloat16; else xla
                "patch_dropout": 0.0,  # share of an image's patches that training drops (FLIP: 0.5 to 0.75)
                "embed_dim": AUTO,
                "frozen": (),  # patterns of parameters that are not trained: ("image/*",)
                "activation": "",  # empty: the preset's, in both towers
                "image": {name: AUTO for name in ("image_size", "patch_size", "width", "layers", "heads", "mlp_width")},
                "text": {
                    name: AUTO for name in ("context_length", "vocab_size", "width", "layers", "heads", "mlp_width")
                },
                "mean": (),  # of pixels in 0..1, three numbers; empty: the preset's
                "std": (),
            },
            "objectives": {name: {"weight": kind.weight, **kind.defaults} for name, kind in OBJECTIVES.items()},
            "optimizer": {
                # Or adafactor, as SigLIP was trained (big_vision's variant); stable_adamw, without loss spikes at a
                # beta2 of 0.99 and above; lamb, for the largest batches; muon, for the matrices of the blocks.
                "name": "adamw",
                "learning_rate": 5e-4,  # after warm-up
                # Factors of the rate: ({"image/*": 0.1, "text/*": 1.0},); 0 freezes, like model.frozen.
                "rate_factors": (),
                "layer_decay": 1.0,  # factor of the rate per block, from the last one down (fine-tuning: 0.65 to 0.9)
                "schedule": "cosine",  # cosine (to zero), rsqrt, constant or wsd: constant, then a cooldown
                "timescale": 10_000,  # rsqrt: steps after which the rate is 1 / sqrt(2)
                "warmup_steps": AUTO,
                "warmup_examples": AUTO,
                "warmup_epochs": float(AUTO),
                "cooldown_steps": AUTO,  # length of the decay to zero at the end of wsd, rsqrt and constant
                "cooldown_examples": AUTO,
                "cooldown_epochs": float(AUTO),
                "cooldown_form": "linear",  # or 1-sqrt
                "weight_decay": 0.2,  # times the learning rate; big_vision's number is this one times its peak rate
                "decay": "matrices",  # matrices_and_positions: as OpenCLIP 3; kernels: as big_vision, no embedding
                "beta1": 0.9,
                "beta2": 0.98,  # adafactor: the upper limit of the decay of second moments
                "first_moment_dtype": "float32",  # bfloat16 saves two bytes per parameter
                "eps": 1e-6,
                "clip_norm": 0.0,  # of the global gradient; 0: off
            },
            "mesh": {
                "data": AUTO,  # copies of the model, each with its part of the batch; -1: all remaining devices
                "fsdp": 1,  # devices that split the parameters, the optimizer's state and the batch
                "tensor": 1,  # devices that split every layer
                "slices": AUTO,  # TPU slices joined by a data-center network; -1: as many as there are
                "cpu_devices": 1,  # simulated, on CPU only
                "xla_flags": True,  # the preset of the platform (clip_jax/devices/xla_flags.py); your own flags win
            },
            "eval": {},  # name -> evaluation(...); eval/<name>/... are its metrics
            "checkpoint": {
                **_every(),  # none given: at the end only
                "keep_last": 2,
                "keep_every_steps": AUTO,  # checkpoints at multiples of this are never deleted
            },
            "log": {
                "every_steps": 10,
                "tensorboard": True,
                "wandb": "",  # a Weights & Biases project to which metrics are also sent; empty: none
                "samples": False,  # samples.<process>.jsonl: which examples of the source each step took
                "watchdog_seconds": 1800.0,  # the run ends if no step or evaluation finishes for this long; 0: never
            },
        },
        type_safe=False,  # check() compares types itself, with messages a user can act on
    )


def evaluation(**fields: Any) -> ConfigDict:
    """A named evaluation: ``config.eval.<name> = evaluation(source="folder:photos/held_out", every_epochs=1.0)``."""
    known = {
        "protocol": "retrieval",  # retrieval (with the held-out loss), zero_shot, or one below
        # composition and dense take shapes:heldout, cues shapes:zero_shot, grounding examples with boxes; corruptions,
        # typographic, adversarial and probe need labels. The source is kind:where, like data.train; "": off
        "source": "",
        "train": "",  # probe: the source that it is fitted on, with the same classes
        "caption": "",  # like data.caption, of this source; empty: data.caption
        "templates": ("a photo of a {}.",),  # zero_shot: prompts; {} is the class name
        "batch_size": AUTO,  # -1: the training batch
        **_every(),  # none given: at the end only
    }
    unknown = sorted(fields.keys() - known.keys())
    if unknown:
        raise TypeError(f"evaluation() has no {unknown[0]}; it has {', '.join(known)}")
    # A ConfigDict keeps the type of a sequence that it begins with, and JSON has no tuples.
    fields = {name: tuple(value) if isinstance(value, list) else value for name, value in fields.items()}
    return ConfigDict(known | fields, type_safe=False)


class Range(NamedTuple):
    """The values that a number takes, from ``low`` to ``high``."""

    low: float
    high: float = math.inf
    below_high: bool = False
    """Whether ``high`` itself is excluded."""
    above_low: bool = False
    auto: bool = False
    """Whether -1 stands for "automatic"."""

    def __contains__(self, value: float) -> bool:
        if self.auto and value == AUTO:
            return True
        above = value > self.low if self.above_low else value >= self.low
        return above and (value < self.high if self.below_high else value <= self.high)

    def __str__(self) -> str:
        low = f"above {self.low}" if self.above_low else f"at least {self.low}"
        high = f" and below {self.high}" if self.below_high else f" and at most {self.high}"
        return low + (high if self.high < math.inf else "") + (", or -1 for automatic" if self.auto else "")


def choices() -> dict[str, tuple]:
    """The settings that take one of a few values."""
    return CHOICES | {f"objectives.{n}.{key}": v for n, kind in OBJECTIVES.items() for key, v in kind.choices.items()}


def ranges() -> dict[str, Range]:
    """The ranges of all numbers but lengths of time in several units, which have rules of their own."""
    weights = {f"objectives.{name}.weight": Range(0) for name in OBJECTIVES}
    ranges = {f"objectives.{n}.{key}": Range(*v) for n, kind in OBJECTIVES.items() for key, v in kind.ranges.items()}
    return RANGES | weights | ranges


CHOICES = {
    "data.augment.where": ("host", "device"),
    "data.mixture": ("weight", "share"),
    "data.truncated": ("stop", "keep"),
    "data.resize": ("pillow", "simd"),
    "data.changed": ("stop", "accept"),
    "tokenizer.kind": ("", *KINDS),
    "model.dtype": ("float32", "bfloat16"),
    "model.remat": ("none", "dots", "named", "offload", "full"),
    "model.attention": ("auto", *ATTENTION),
    "model.activation": ("", *ACTIVATIONS),
    "optimizer.name": ("adamw", "adafactor", "stable_adamw", "lamb", "muon"),
    "optimizer.schedule": ("cosine", "rsqrt", "constant", "wsd"),
    "optimizer.cooldown_form": ("linear", "1-sqrt"),
    "optimizer.decay": ("kernels", "matrices", "matrices_and_positions"),
    "optimizer.first_moment_dtype": ("float32", "bfloat16"),
}

SEVERAL = ("data.train",)
"""The settings that are a string or a tuple of entries."""

EVALUATION_CHOICES = {
    "protocol": (
        *("retrieval", "zero_shot", "composition", "corruptions"),
        *("typographic", "adversarial", "cues", "grounding", "probe", "dense"),
    )
}
EVALUATION_RANGES = {"batch_size": Range(1, auto=True)}

SIZES = Range(1, auto=True)
RANGES = {
    "seed": Range(0, 2**63, below_high=True),
    "batch_size": Range(1),
    "micro_batch": SIZES,
    "ema_decay": Range(0, 1, below_high=True),
    "data.samples": SIZES,
    "data.augment.flip": Range(0, 1),
    "data.augment.jitter_probability": Range(0, 1, above_low=True),
    "data.augment.gray": Range(0, 1),
    "data.shuffle_block": Range(1),
    "data.shuffle_window": Range(1),
    "data.max_bad_share": Range(0, 1),
    "data.workers": Range(1),
    "data.prefetch": Range(1),
    "tokenizer.train_captions": Range(1),
    "model.patch_dropout": Range(0, 1, below_high=True),
    "model.embed_dim": SIZES,
    **{f"model.image.{size}": SIZES for size in ("image_size", "patch_size", "width", "layers", "heads", "mlp_width")},
    **{
        f"model.text.{size}": SIZES
        for size in ("context_length", "vocab_size", "width", "layers", "heads", "mlp_width")
    },
    "optimizer.learning_rate": Range(0),
    "optimizer.layer_decay": Range(0, 1, above_low=True),
    "optimizer.timescale": Range(1),
    "optimizer.weight_decay": Range(0),
    "optimizer.beta1": Range(0, 1, below_high=True),
    "optimizer.beta2": Range(0, 1, below_high=True),
    "optimizer.eps": Range(0, 1, above_low=True),
    "optimizer.clip_norm": Range(0),
    "mesh.data": SIZES,
    "mesh.fsdp": SIZES,
    "mesh.tensor": SIZES,
    "mesh.slices": SIZES,
    "mesh.cpu_devices": Range(1),
    "checkpoint.keep_last": Range(1),
    "checkpoint.keep_every_steps": SIZES,
    "log.every_steps": Range(1),
    "log.watchdog_seconds": Range(0),
}

# A setting that another setting leaves without effect is a mistake, not a detail: (key, needs, one of these).
ONLY_WITH = (
    ("tokenizer.train_captions", "tokenizer.kind", ("sentencepiece",)),
    ("optimizer.timescale", "optimizer.schedule", ("rsqrt",)),
    ("optimizer.eps", "optimizer.name", ("adamw", "stable_adamw", "lamb", "muon")),
    ("optimizer.cooldown_form", "optimizer.schedule", ("wsd", "rsqrt", "constant")),
)
