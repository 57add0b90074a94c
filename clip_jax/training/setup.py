"""From a config to a learner. Nothing is read, created or trained here, and the mesh's devices need not be there."""

import jax.numpy as jnp
import optax
from jax.sharding import AbstractMesh, Mesh
from ml_collections import ConfigDict

from clip_jax import config as configs
from clip_jax.data.augment import NONE, Augment
from clip_jax.data.tokenizers import Tokenizer
from clip_jax.data.views import View, pair_views
from clip_jax.devices.sharding import batch_shards
from clip_jax.errors import UserError
from clip_jax.models.attention_choice import choose_attention
from clip_jax.models.clip import CLIP, Architecture
from clip_jax.models.compute import Compute
from clip_jax.objectives import OBJECTIVES
from clip_jax.objectives.objective import Ema
from clip_jax.presets import Preset
from clip_jax.training import muon, rates, stored_images, text_buckets
from clip_jax.training import optimizer as optimizers
from clip_jax.training.learner import Learner
from clip_jax.training.schedule import Schedule, schedule
from clip_jax.training.state import EMA
from clip_jax.training.teacher import with_teacher

OPTIMIZERS = {
    "adamw": optimizers.adamw,
    "adafactor": optimizers.adafactor,
    "stable_adamw": optimizers.stable_adamw,
    "lamb": optimizers.lamb,
    "muon": optimizers.muon,
}


def make_learner(
    config: ConfigDict,
    mesh: Mesh | AbstractMesh,
    *,
    steps: int,
    examples: int,
    tokenizer: Tokenizer | None = None,
) -> Learner:
    """The learner of a config: the one place where a training step is put together.

    ``steps`` is the length of the run and ``examples`` that of its dataset, for the schedule. A plan has no tokenizer:
    its views have shapes only. Raises UserError for what does not fit together.
    """
    check_batch(config, mesh)
    preset = configs.resolve_preset(config, None if tokenizer is None else tokenizer.vocab_size)
    text_buckets.check(config, preset.architecture)
    model, rate = make_model(config, preset, mesh), make_schedule(config, steps, examples)
    objectives = {
        name: with_teacher(
            kind.make(config.objectives[name], model, preset.preprocess, tokenizer), f"config.objectives.{name}"
        )
        for name, kind in OBJECTIVES.items()
        if config.objectives[name].weight > 0
    }
    views = training_views(config, preset, tokenizer)
    for objective in objectives.values():
        views |= objective.views
    frozen = (*config.model.frozen, *rates.frozen_patterns(config.optimizer.rate_factors))
    if config.data.image_embeddings:
        check_stored_images(config, frozen)
        views["image"] = stored_images.view(config.data.image_embeddings, preset.architecture.embed_dim)
    return Learner(
        model=model,
        preprocess=preset.preprocess,
        views=views,
        objectives=objectives,
        weights={name: config.objectives[name].weight for name in objectives},
        optimizer=make_optimizer(config, rate, preset.architecture),
        update_flops=muon.update_flops if config.optimizer.name == "muon" else lambda params: 0,
        rate=rate,
        mesh=mesh,
        micro_batches=micro_batches(config),
        run_emas={EMA: Ema(config.ema_decay)} if config.ema_decay > 0 else {},
        frozen=frozen,
        rate_factors=tuple(config.optimizer.rate_factors),
        augment=augmentations(config)[1],
        patch_dropout=config.model.patch_dropout,
        seed=config.seed,
    )


def training_views(config: ConfigDict, preset: Preset, tokenizer: Tokenizer | None) -> dict[str, View]:
    """How the pairs of a run become arrays: the caption's tokens, and the image at the model's size."""
    return pair_views(
        image_size=preset.architecture.image.image_size,
        context_length=preset.architecture.text.context_length,
        tokenizer=tokenizer,
        crop_scale=config.data.crop_scale,
        crop_ratio=config.data.crop_ratio,
        interpolation=preset.preprocess.interpolation,
        exif=preset.preprocess.exif,
        resize=config.data.resize,
        augment=augmentations(config)[0],
    )


def augmentations(config: ConfigDict) -> tuple[Augment, Augment]:
    """Those of the workers, and those of the step."""
    settings = dict(config.data.augment)
    return (Augment(**settings), NONE) if settings.pop("where") == "host" else (NONE, Augment(**settings))


def check_stored_images(config: ConfigDict, frozen: tuple[str, ...]) -> None:
    """Stored embeddings need a frozen tower, and objectives that see no image."""
    if "image/*" not in frozen:
        raise UserError('config.data.image_embeddings: only of a frozen image tower: config.model.frozen=("image/*",)')
    for name, spec in OBJECTIVES.items():
        if spec.needs_images and config.objectives[name].weight > 0:
            raise UserError(f"config.data.image_embeddings: objectives.{name} needs the images themselves")


def micro_batches(config: ConfigDict) -> int:
    """Into how many parts a batch is divided."""
    return 1 if config.micro_batch == configs.AUTO else config.batch_size // config.micro_batch


def check_batch(config: ConfigDict, mesh: Mesh | AbstractMesh) -> None:
    """The batch divides over the mesh and into micro-batches that do as well; UserError with the nearest otherwise."""
    shards, batch, micro = batch_shards(mesh), config.batch_size, config.micro_batch
    if batch % shards:
        raise UserError(
            f"config.batch_size={batch} does not divide over {shards} devices (data x fsdp); "
            f"the nearest that does is {max(1, round(batch / shards)) * shards}"
        )
    if micro != configs.AUTO and (batch % micro or micro % shards):
        possible = [shards * n for n in range(1, batch // shards + 1) if batch // shards % n == 0]
        raise UserError(
            f"config.micro_batch={micro} must divide batch_size={batch} and divide over {shards} devices "
            f"(data x fsdp); the nearest that does is {min(possible, key=lambda n: abs(n - micro))}"
        )


def check_attention(config: ConfigDict, platform: str) -> None:
    """A fused kernel needs its platform: ``cpu``, ``gpu`` or ``tpu``."""
    for name, needs, machines in (("cudnn", "gpu", "NVIDIA GPUs"), ("tpu", "tpu", "TPUs")):
        if config.model.attention == name and platform != needs:
            raise UserError(
                f"config.model.attention={name} runs on {machines}, and this is a {platform}: leave it at auto"
            )


def make_model(config: ConfigDict, preset: Preset, mesh: Mesh | AbstractMesh | None) -> CLIP:
    """The preset's architecture, computed as the config says."""
    dtype = jnp.dtype(config.model.dtype)
    compute = Compute(
        dtype=dtype,
        scan=config.model.scan,
        remat=config.model.remat,
        attend=choose_attention(config.model.attention, dtype, preset.architecture, mesh).attend(mesh),
        mesh=mesh,
    )
    return CLIP(preset.architecture, compute)


def make_schedule(config: ConfigDict, steps: int, examples: int) -> Schedule:
    """The learning rate of each of ``steps`` steps over a dataset of ``examples`` examples."""
    optimizer = config.optimizer
    return schedule(
        optimizer.schedule,
        optimizer.learning_rate,
        configs.duration(config, "optimizer.warmup_", examples) or 0,
        steps,
        timescale=optimizer.timescale,
        cooldown=configs.duration(config, "optimizer.cooldown_", examples) or 0,
        form=optimizer.cooldown_form,
    )


def make_optimizer(config: ConfigDict, rate: Schedule, architecture: Architecture) -> optax.GradientTransformation:
    """The chain of the named optimizer, with factors of the rate at its end where there are any."""
    optimizer = config.optimizer
    options = {
        name: optimizer[name] for name in ("weight_decay", "decay", "beta1", "beta2", "clip_norm", "first_moment_dtype")
    }
    if optimizer.name != "adafactor":
        options["eps"] = optimizer.eps
    chain = OPTIMIZERS[optimizer.name](rate, **options)
    if not optimizer.rate_factors and optimizer.layer_decay == 1:
        return chain
    depths = {name: tower.layers for name, tower in (("image", architecture.image), ("text", architecture.text))}
    return optax.chain(chain, rates.scale_by_factors(optimizer.rate_factors, optimizer.layer_decay, depths))
