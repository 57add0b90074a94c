"""Every setting there is: its name, its default, its reason, and what values it takes.

``defaults()`` is complete: nothing that is not in it is a setting, and every recipe starts from it. The default of a
new setting is what the code did before it, so that older runs go on as they began.
"""

from typing import Any

from ml_collections import ConfigDict

from clip_jax.data.tokenizers import KINDS
from clip_jax.models.attention import ATTENTION
from clip_jax.models.transformer import ACTIVATIONS

AUTO = -1
"""A size or duration that is not given: sizes follow from the model's preset, durations from another unit."""

UNITS = ("steps", "examples", "epochs")


def _every(steps: int = AUTO, examples: int = AUTO, epochs: float = float(AUTO)) -> dict[str, Any]:
    return {"every_steps": steps, "every_examples": examples, "every_epochs": epochs}


def defaults() -> ConfigDict:
    """Every setting there is. Lengths of time are given in one of three units, the others left at -1."""
    return ConfigDict(
        {
            "seed": 0,  # order, crops and initialisation
            "steps": AUTO,
            "examples": AUTO,  # pairs seen
            "epochs": float(AUTO),  # steps = floor(epochs * N / batch_size)
            "batch_size": 256,  # pairs over all devices and processes
            "micro_batch": AUTO,  # pairs whose activations exist at one time, over all devices; -1: the whole batch
            "ema_decay": 0.0,  # of a moving average of the parameters, which is what is evaluated and loaded; 0: none
            "data": {
                "train": "shapes:train",  # kind:where, see clip_jax/data/sources
                "samples": AUTO,  # how many there are, for a plan where the data is not at hand; training counts them
                "caption": "txt",  # tar shards: txt, or a dotted path into the sample's JSON
                "truncated": "stop",  # a truncated tar shard: stop, or keep what is before the cut
                "tfds_dir": "",  # where TFDS datasets are; empty: TFDS's own default
                "crop_scale": (0.9, 1.0),  # area of the random crop (OpenCLIP's default)
                "crop_ratio": (3 / 4, 4 / 3),  # its aspect
                "shuffle_block": 1,  # samples read together; 1: a full shuffle
                "shuffle_window": 1,  # blocks mixed with each other
                "max_bad_share": 0.01,  # of samples, before the run stops
                "workers": 2,  # threads, each on a batch of its own
                "prefetch": 4,  # batches ready before they are needed
            },
            "tokenizer": {
                "kind": "",  # clip, clipa, siglip, siglip2, sentencepiece (trained on the captions); empty: the model's
                # Path of clip's bpe_simple_vocab_16e6.txt.gz, clipa's vocab.txt, siglip's .model or tokenizer.json
                # (empty: from the Hugging Face cache or hub), another run's sentencepiece.model (empty: trained).
                "vocab": "",
                "train_captions": 100_000,  # sentencepiece: learns its pieces from the first so many samples' captions
            },
            "model": {
                "name": "ViT-B/32",  # clip_jax.list_models()
                "init_from": "",  # start from weights: a run's folder, anybody's weights, hf://org/name (clip_jax.load)
                "init_from_allow": (),  # tensors that may be missing, left over or of another shape: text/*
                "dtype": "float32",  # of matrix products; parameters stay float32
                "scan": True,  # one compiled block whatever the depth; False unrolls (about 10 % faster on CPU)
                "remat": "none",  # activations computed again backwards: none, dots, named, offload, full
                "attention": "xla",  # or cudnn: its fused kernel, on NVIDIA GPUs with bfloat16
                "patch_dropout": 0.0,  # share of an image's patches left out in training (FLIP: 0.5 to 0.75)
                "embed_dim": AUTO,
                "activation": "",  # empty: the preset's, in both towers
                "image": {name: AUTO for name in ("image_size", "patch_size", "width", "layers", "heads", "mlp_width")},
                "text": {
                    name: AUTO for name in ("context_length", "vocab_size", "width", "layers", "heads", "mlp_width")
                },
                "mean": (),  # of pixels in 0..1, three numbers; empty: the preset's
                "std": (),
            },
            "loss": {
                "name": "softmax",  # CLIP's; or sigmoid, SigLIP's, which gives the model a bias
                "max_logit_scale": 100.0,  # clamp of exp(logit_scale) after each update (Radford et al. 2021); 0: none
            },
            "optimizer": {
                "name": "adamw",  # or adafactor, as SigLIP was trained (big_vision's variant)
                "learning_rate": 5e-4,  # after warm-up
                "schedule": "cosine",  # cosine (to zero), rsqrt or constant
                "timescale": 10_000,  # rsqrt: steps after which the rate is 1 / sqrt(2)
                "warmup_steps": AUTO,
                "warmup_examples": AUTO,
                "warmup_epochs": float(AUTO),
                "cooldown_steps": AUTO,  # the last steps go linearly to zero: for rsqrt and constant
                "cooldown_examples": AUTO,
                "cooldown_epochs": float(AUTO),
                "weight_decay": 0.2,  # times the learning rate; big_vision's number is this one times its peak rate
                "decay": "matrices",  # matrices_and_positions: as OpenCLIP 3; kernels: as big_vision, no embedding
                "beta1": 0.9,
                "beta2": 0.98,  # adafactor: the most that second moments decay
                "first_moment_dtype": "float32",  # bfloat16 saves two bytes a parameter
                "eps": 1e-6,
                "clip_norm": 0.0,  # of the global gradient; 0: off
            },
            "mesh": {
                "data": AUTO,  # copies of the model, each with its part of the batch; -1: what the others leave
                "fsdp": 1,  # parts of the parameters and of the optimizer's state, and of the batch
                "tensor": 1,  # parts of every layer
                "slices": AUTO,  # TPU slices joined by a data-centre network; -1: as many as there are
                "cpu_devices": 1,  # simulated, on CPU only
                "xla_flags": True,  # the platform's preset (clip_jax/xla_flags.py); your own flags win in any case
            },
            "eval": {
                "heldout": "",  # a source: held-out loss and retrieval
                "heldout_name": "heldout",  # its name in metrics
                "zero_shot": "",  # a source with labels
                "zero_shot_name": "zero_shot",
                "templates": ("a photo of a {}.",),  # of prompts; {} is the class name
                "batch_size": AUTO,  # AUTO: the training batch
                **_every(),  # none given: at the end only
            },
            "checkpoint": {
                **_every(),  # none given: at the end only
                "keep_last": 2,
                "keep_every_steps": AUTO,  # and these for ever
            },
            "log": {
                "every_steps": 10,
                "tensorboard": True,
                "samples": False,  # samples.<process>.jsonl: which samples of the source each step took
                "watchdog_seconds": 1800.0,  # without a finished step or evaluation until the run is given up; 0: never
            },
        },
        type_safe=False,  # check() compares types itself, with messages a user can act on
    )


CHOICES = {
    "data.truncated": ("stop", "keep"),
    "tokenizer.kind": ("", *KINDS),
    "model.dtype": ("float32", "bfloat16"),
    "model.remat": ("none", "dots", "named", "offload", "full"),
    "model.attention": tuple(ATTENTION),
    "model.activation": ("", *ACTIVATIONS),
    "loss.name": ("softmax", "sigmoid"),
    "optimizer.name": ("adamw", "adafactor"),
    "optimizer.schedule": ("cosine", "rsqrt", "constant"),
    "optimizer.decay": ("kernels", "matrices", "matrices_and_positions"),
    "optimizer.first_moment_dtype": ("float32", "bfloat16"),
}

AT_LEAST = {
    "batch_size": 1,
    "data.samples": AUTO,
    "data.shuffle_block": 1,
    "data.shuffle_window": 1,
    "data.workers": 1,
    "data.prefetch": 1,
    "loss.max_logit_scale": 0,
    "optimizer.learning_rate": 0,
    "optimizer.weight_decay": 0,
    "optimizer.clip_norm": 0,
    "optimizer.timescale": 1,
    "tokenizer.train_captions": 1,
    "checkpoint.keep_last": 1,
    "ema_decay": 0,
    "log.every_steps": 1,
    "log.watchdog_seconds": 0,
    "mesh.cpu_devices": 1,
}

# A setting that another setting leaves without effect is a mistake, not a detail: (key, needs, one of these).
ONLY_WITH = (
    ("tokenizer.train_captions", "tokenizer.kind", ("sentencepiece",)),
    ("optimizer.timescale", "optimizer.schedule", ("rsqrt",)),
    ("model.attention", "model.dtype", ("bfloat16",)),
    ("optimizer.eps", "optimizer.name", ("adamw",)),
)
