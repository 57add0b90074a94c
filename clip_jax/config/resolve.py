"""The model that a config describes: a named preset with the config's own sizes in place of the automatic ones."""

import dataclasses

from ml_collections import ConfigDict

from clip_jax import presets
from clip_jax.errors import UserError
from clip_jax.objectives import OBJECTIVES
from clip_jax.settings import AUTO

LAST_TOKEN_TOKENIZERS = ("clipa", "siglip", "siglip2")
"""Tokenizers whose end token does not have the highest id; their models pool the last token."""


def resolve_preset(config: ConfigDict, vocab_size: int | None = None) -> presets.Preset:
    """The named preset with the config's own sizes, activation and pixel statistics in place of the automatic ones.

    ``vocab_size`` is the tokenizer's, which the text tower takes; a given ``model.text.vocab_size`` wins.
    """
    named = presets.preset(config.model.name)
    architecture = named.architecture

    def tower(name, shape, given):
        sizes = {size: value for size, value in given.items() if value != AUTO}
        fields = {field.name for field in dataclasses.fields(shape)}
        for size in sizes:
            if size not in fields:
                known = ", ".join(sorted(fields))
                raise UserError(f"config.model.{name}.{size}: {config.model.name} has no such size; it has {known}")
        if config.model.activation and "activation" in fields:  # a ResNet has ReLU
            sizes["activation"] = config.model.activation
        return dataclasses.replace(shape, **sizes)

    text = tower("text", architecture.text, config.model.text)
    kind = config.tokenizer.kind or named.tokenizer
    if vocab_size is not None and config.model.text.vocab_size == AUTO:
        # A published model keeps the rows that its vocabulary leaves unused: CLIPA has 32,000 for BERT's 30,522.
        published = kind == named.tokenizer and kind in LAST_TOKEN_TOKENIZERS
        text = dataclasses.replace(text, vocab_size=max(vocab_size, text.vocab_size) if published else vocab_size)
    if text.pooling == "argmax" and kind in LAST_TOKEN_TOKENIZERS:
        raise UserError(
            f"config.tokenizer.kind={kind}: {config.model.name} pools a text at its highest token, which is not "
            "this tokenizer's end token; use clip or sentencepiece"
        )
    architecture = dataclasses.replace(
        architecture,
        decoder=None,  # captioning gives it one: without a loss it would only decay
        image=tower("image", architecture.image, config.model.image),
        text=text,
        embed_dim=architecture.embed_dim if config.model.embed_dim == AUTO else config.model.embed_dim,
    )
    for name, objective in OBJECTIVES.items():
        if config.objectives[name].weight > 0:
            architecture = objective.adapt(config.objectives[name], architecture)
    preprocess = named.preprocess._replace(
        mean=config.model.mean or named.preprocess.mean,
        std=config.model.std or named.preprocess.std,
        exif=config.data.exif_orientation,
    )
    check_architecture(architecture, named.architecture)
    if config.model.attention == "cudnn":
        check_heads(architecture)
    return presets.Preset(architecture, preprocess, kind)


def check_architecture(architecture: presets.Architecture, named: presets.Architecture) -> None:
    """Raises UserError for sizes that do not fit together, in an architecture derived from a named one."""
    image, text = architecture.image, architecture.text
    published = (image.image_size, image.patch_size) == (named.image.image_size, named.image.patch_size)
    if image.image_size % image.patch_size and not published:  # SigLIP at 384 px cuts the last pixels off
        raise UserError(
            f"config.model.image: image_size={image.image_size} is not a multiple of patch_size={image.patch_size}"
        )
    for name, tower in (("image", image), ("text", text)):
        for size, value in dataclasses.asdict(tower).items():
            if type(value) is int and value < 1:
                raise UserError(f"config.model.{name}.{size}={value} must be at least 1")
        if tower.width % tower.heads:
            raise UserError(f"config.model.{name}: width={tower.width} does not divide into heads={tower.heads}")


def check_heads(architecture: presets.Architecture) -> None:
    """cuDNN's kernel takes heads of 8, 16, ... features."""
    for name, tower in (("image", architecture.image), ("text", architecture.text)):
        if tower.block is not None and tower.width // tower.heads % 8:
            raise UserError(
                f"config.model.{name}: width={tower.width} and heads={tower.heads} make heads of "
                f"{tower.width // tower.heads} features; model.attention=cudnn takes multiples of 8"
            )
