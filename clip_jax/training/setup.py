"""From a config to everything a run works with: data, tokenizer, model, mesh, optimizer. Nothing is trained here."""

import importlib.metadata
import platform
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.experimental import multihost_utils
from jax.sharding import Mesh
from ml_collections import ConfigDict

from clip_jax import __version__, hardware, presets, run_folder
from clip_jax import config as configs
from clip_jax.data import tokenizers
from clip_jax.data.order import Order, fold
from clip_jax.data.sources import BadSampleError, Source, open_source
from clip_jax.data.stream import Faults, TrainingBatches, read
from clip_jax.data.tokenizers import Tokenizer
from clip_jax.errors import UserError
from clip_jax.models import flops
from clip_jax.models.attention import ATTENTION
from clip_jax.models.clip import CLIP, parameter_counts
from clip_jax.presets import Preset
from clip_jax.run_folder import Folder
from clip_jax.sharding import batch_shards, make_mesh
from clip_jax.training import optimizer as optimizers
from clip_jax.training import step as training_step
from clip_jax.training.schedule import Schedule, schedule

VERSIONS = (
    "jax",
    "jaxlib",
    "flax",
    "optax",
    "orbax-checkpoint",
    "grain",
    "numpy",
    "pillow",
    "sentencepiece",
    "tokenizers",
)


class Sources(NamedTuple):
    train: Source
    heldout: Source | None
    zero_shot: Source | None


class Run(NamedTuple):
    """All parts of a run, put together and checked."""

    folder: Folder
    config: ConfigDict
    steps: int
    preset: Preset
    model: CLIP
    mesh: Mesh
    sources: Sources
    tokenizer: Tokenizer
    batches: TrainingBatches
    rate: Callable[[Any], Any]
    optimizer: optax.GradientTransformation
    eval_every: int | None
    checkpoint_every: int | None

    @property
    def workdir(self) -> Path:
        """Where this machine has the run's files."""
        return self.folder.path

    @property
    def parameters(self) -> dict[str, int]:
        return parameter_counts(jax.eval_shape(self.model.init, jax.random.key(0)))

    @property
    def peak_flops(self) -> float | None:
        """FLOP/s of all devices together, where the chip is known."""
        peak = hardware.peak_flops(jax.devices()[0].device_kind)
        return None if peak is None else peak * jax.device_count()


def make(folder: Folder, config: ConfigDict) -> Run:
    """Opens the data, prepares the tokenizer in the run folder, and puts the rest together. Raises UserError."""
    mesh = make_mesh(config.mesh.data, config.mesh.fsdp, config.mesh.tensor, config.mesh.slices)
    check_batch(config, mesh)
    check_attention(config, jax.default_backend())
    image_size = configs.resolve_preset(config).architecture.image.image_size
    sources = open_sources(config, image_size)
    samples = len(sources.train)
    steps = configs.duration(config, "", samples)
    configs.check_lengths(config, steps, samples)

    tokenizer = prepare_tokenizer(folder.path, config, sources.train)
    preset = configs.resolve_preset(config, tokenizer.vocab_size)
    if preset.architecture.text.vocab_size < tokenizer.vocab_size:
        raise UserError(
            f"config.model.text.vocab_size={preset.architecture.text.vocab_size}: "
            f"the tokenizer has {tokenizer.vocab_size} tokens; leave it at -1"
        )
    rate = make_schedule(config, steps, samples)
    return Run(
        folder=folder,
        config=config,
        steps=steps,
        preset=preset,
        model=make_model(config, preset),
        mesh=mesh,
        sources=sources,
        tokenizer=tokenizer,
        batches=TrainingBatches(
            source=sources.train,
            order=Order(
                samples, config.batch_size, fold(config.seed, 1), config.data.shuffle_block, config.data.shuffle_window
            ),
            tokenizer=tokenizer,
            image_size=image_size,
            crop_scale=config.data.crop_scale,
            crop_ratio=config.data.crop_ratio,
            interpolation=preset.preprocess.interpolation,
            faults=Faults(config.data.max_bad_share),
        ),
        rate=rate,
        optimizer=make_optimizer(config, rate),
        eval_every=configs.duration(config, "eval.every_", samples),
        checkpoint_every=configs.duration(config, "checkpoint.every_", samples),
    )


def check_batch(config: ConfigDict, mesh: Mesh) -> None:
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
    """The fused kernel has its platform: ``cpu``, ``gpu`` or ``tpu``."""
    if config.model.attention == "cudnn" and platform != "gpu":
        raise UserError(f"config.model.attention=cudnn runs on NVIDIA GPUs, and this is a {platform}: leave it at xla")


def make_model(config: ConfigDict, preset: Preset) -> CLIP:
    """The preset's architecture with the config's way to compute it."""
    return CLIP(
        preset.architecture,
        jnp.dtype(config.model.dtype),
        config.model.scan,
        config.model.remat,
        config.model.patch_dropout,
        ATTENTION[config.model.attention],
    )


def make_schedule(config: ConfigDict, steps: int, samples: int) -> Schedule:
    """The learning rate of each of ``steps`` steps over a dataset of so many samples."""
    optimizer = config.optimizer
    return schedule(
        optimizer.schedule,
        optimizer.learning_rate,
        configs.duration(config, "optimizer.warmup_", samples) or 0,
        steps,
        timescale=optimizer.timescale,
        cooldown=configs.duration(config, "optimizer.cooldown_", samples) or 0,
    )


def make_optimizer(config: ConfigDict, rate: Schedule) -> optax.GradientTransformation:
    optimizer = config.optimizer
    options = {
        name: optimizer[name] for name in ("weight_decay", "decay", "beta1", "beta2", "clip_norm", "first_moment_dtype")
    }
    if optimizer.name == "adafactor":
        return optimizers.adafactor(rate, **options)
    return optimizers.adamw(rate, **options, eps=optimizer.eps)


def make_step(
    config: ConfigDict,
    preset: Preset,
    model: CLIP,
    optimizer: optax.GradientTransformation,
    rate: Schedule,
    mesh: Mesh,
) -> training_step.TrainStep:
    """The one compiled function of a run, for any mesh: also for one whose devices are not there (the plan)."""
    return training_step.make_train_step(
        model,
        preset.preprocess,
        optimizer,
        rate,
        mesh,
        max_logit_scale=config.loss.max_logit_scale,
        seed=config.seed,
        loss_name=config.loss.name,
        average_decay=config.ema_decay,
        micro_batches=1 if config.micro_batch == configs.AUTO else config.batch_size // config.micro_batch,
    )


def open_sources(config: ConfigDict, image_size: int) -> Sources:
    """The training source and those of evaluation, where they are named."""

    def source(where: str) -> Source:
        opened = open_source(
            where,
            image_size=image_size,
            caption=config.data.caption,
            truncated=config.data.truncated,
            tfds_dir=config.data.tfds_dir,
        )
        if not len(opened):
            raise UserError(f"{where}: no samples")
        return opened

    heldout = source(config.eval.heldout) if config.eval.heldout else None
    zero_shot = source(config.eval.zero_shot) if config.eval.zero_shot else None
    if zero_shot is not None and not zero_shot.class_names:
        raise UserError(f"config.eval.zero_shot={config.eval.zero_shot}: its samples have no labels to classify")
    return Sources(source(config.data.train), heldout, zero_shot)


def prepare_tokenizer(workdir: Path, config: ConfigDict, source: Source) -> Tokenizer:
    """The run's tokenizer, from its folder; made there first where it is not: on process 0, for all."""
    preset = configs.resolve_preset(config)
    kind, length = preset.tokenizer, preset.architecture.text.context_length
    file = run_folder.tokenizer_file(workdir, kind)
    if jax.process_index() == 0 and file is None:
        made = _make_tokenizer(workdir, kind, config, source, preset.architecture.text.vocab_size)
        run_folder.write_tokenizer(workdir, kind, made)
    if jax.process_count() > 1:
        file = run_folder.tokenizer_file(workdir, kind)
        made = _broadcast(file.read_bytes() if file is not None else b"")
        if run_folder.tokenizer_file(workdir, kind) is None:  # no disk is shared
            run_folder.write_tokenizer(workdir, kind, made)
    return run_folder.open_tokenizer(workdir, kind, length)


def _make_tokenizer(workdir: Path, kind: str, config: ConfigDict, source: Source, vocab_size: int) -> bytes:
    """The file's content: trained on the run's captions, or published (from a path, the cache or the hub)."""
    if kind == "sentencepiece" and not config.tokenizer.vocab:
        file = workdir / "tokenizer" / "training.model"
        tokenizers.train_sentencepiece(_captions(source, config.tokenizer.train_captions), vocab_size, file)
        made = file.read_bytes()
        file.unlink()
        return made
    if kind == "clip":
        merges = tokenizers.clip(config.tokenizer.vocab or None).codec.merges
        lines = ["#version: CLIP", *(" ".join(pair) for pair in merges)]
        return ("\n".join(lines) + "\n").encode()
    file = Path(config.tokenizer.vocab) if config.tokenizer.vocab else tokenizers.hub.download(kind, vocab_size)
    tokenizers.KINDS[kind](file, 64)  # raises UserError where it is not a vocabulary of this kind
    return file.read_bytes()


def _captions(source: Source, samples: int):
    """The captions of the first samples; faulty ones say nothing."""
    for index in range(min(samples, len(source))):
        try:
            yield from read(source, index).captions
        except BadSampleError:
            continue


def _broadcast(data: bytes) -> bytes:
    """Process 0's bytes on every process."""
    size = int(multihost_utils.broadcast_one_to_all(np.int64(len(data))))
    padded = np.zeros(size, np.uint8)
    if jax.process_index() == 0:
        padded[:] = np.frombuffer(data, np.uint8)
    return bytes(np.asarray(multihost_utils.broadcast_one_to_all(padded)))


def description(run: Run) -> dict[str, Any]:
    """What ``run.json`` keeps."""
    return {
        "clip_jax_version": __version__,
        "config": configs.to_json(run.config),
        "steps": run.steps,
        "model": {"name": run.config.model.name, "parameters": run.parameters, **presets.to_json(run.preset)},
        "tokenizer": {"kind": run.preset.tokenizer, "fingerprint": run.tokenizer.fingerprint},
        "data": {
            "train": {
                "name": run.sources.train.name,
                "samples": len(run.sources.train),
                "fingerprint": run.sources.train.fingerprint,
            }
        },
        "flops_per_pair": flops.training(run.preset.architecture),
        "versions": {"python": platform.python_version()}
        | {name: importlib.metadata.version(name) for name in VERSIONS},
        "devices": f"{jax.device_count()} x {jax.devices()[0].device_kind} on {jax.process_count()} process(es)",
    }
