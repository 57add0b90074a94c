"""Builds a run from its config: opens the data, prepares the tokenizer, makes the learners and checks them."""

import importlib.metadata
import platform
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import jax
from jax.sharding import Mesh
from ml_collections import ConfigDict

from clip_jax import __version__, presets, version
from clip_jax import config as configs
from clip_jax.data.faults import Faults
from clip_jax.data.order import MixedOrder, Order, fold, mix
from clip_jax.data.sources import has_boxes, open_source
from clip_jax.data.sources.mixture import Mixture, open_mixture
from clip_jax.data.sources.sample import Source
from clip_jax.data.stream import TrainingBatches
from clip_jax.data.tokenizers import Tokenizer, stored
from clip_jax.devices import hardware
from clip_jax.devices.sharding import make_mesh
from clip_jax.errors import UserError
from clip_jax.evaluation import protocols
from clip_jax.evaluation.embed import make_embedder
from clip_jax.evaluation.protocols import Evaluation
from clip_jax.models import flops
from clip_jax.models.clip import parameter_counts
from clip_jax.objectives.contrastive import make_held_out_loss
from clip_jax.presets import Preset
from clip_jax.storage.run_folder import Folder
from clip_jax.training import stored_images
from clip_jax.training.learner import Learner
from clip_jax.training.setup import check_attention, check_batch, make_learner
from clip_jax.training.tokenizer import prepare_tokenizer

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


class Phase(NamedTuple):
    """An interval of steps that share one compiled training step; most runs have a single phase."""

    start: int
    stop: int
    """The steps of the phase are ``start + 1`` to ``stop``."""
    preset: Preset
    learner: Learner
    batches: TrainingBatches
    evaluations: tuple[Evaluation, ...]


class Run(NamedTuple):
    """All parts of a run."""

    folder: Folder
    config: ConfigDict
    steps: int
    mesh: Mesh
    train: Source
    tokenizer: Tokenizer
    faults: Faults
    phases: tuple[Phase, ...]
    checkpoint_every: int | None
    constants: dict[str, str]
    """The checksums of the teachers' weights that the run has used so far (``constants.py``)."""

    @property
    def stored_constants(self) -> dict[str, str]:
        """The fingerprint of each objective's stored embeddings, over all phases."""
        return {
            name: objective.constants_fingerprint
            for phase in self.phases
            for name, objective in phase.learner.objectives.items()
            if objective.constants_fingerprint
        }

    @property
    def workdir(self) -> Path:
        """The folder of this machine that has the run's files."""
        return self.folder.path

    @property
    def parameters(self) -> dict[str, int]:
        return parameter_counts(self.phases[-1].learner.abstract_state().params)

    @property
    def peak_flops(self) -> float | None:
        """FLOP/s of all devices together, where the chip is known."""
        peak = hardware.peak_flops(jax.devices()[0].device_kind)
        return None if peak is None else peak * jax.device_count()

    def flops(self, step: int) -> int:
        """The training FLOPs of all steps up to this one."""
        return self.config.batch_size * sum(
            (min(step, phase.stop) - phase.start)
            * flops.training(phase.learner.trained_architecture, phase.learner.frozen_towers)
            for phase in self.phases
            if phase.start < step
        )

    def seen(self, step: int) -> int:
        """The pairs of all steps up to this one, with those that a selection left out."""
        return self.config.batch_size * sum(
            (min(step, phase.stop) - phase.start) * phase.learner.ratio for phase in self.phases if phase.start < step
        )

    def phase_of(self, step: int) -> int:
        """The phase that a checkpoint of a step belongs to: the one that trained that step."""
        return max((i for i, phase in enumerate(self.phases) if phase.start < step), default=0)

    def phases_after(self, step: int) -> tuple[Phase, ...]:
        """The phases with steps left after ``step``."""
        return tuple(phase for phase in self.phases if phase.stop > step)


def make_run(folder: Folder, config: ConfigDict, previous: Mapping[str, Any] | None) -> Run:
    """Opens the data, prepares the tokenizer in the run folder, and puts the rest together. Raises UserError.

    ``previous``: the content of ``run.json``, if there is a checkpoint to resume from.
    """
    mesh = make_mesh(config.mesh.data, config.mesh.fsdp, config.mesh.tensor, config.mesh.slices)
    check_batch(config, mesh)
    check_attention(config, jax.default_backend())
    phase_configs = configs.phases(config)
    image_size = max(configs.resolve_preset(phase.config).architecture.image.image_size for phase in phase_configs)
    # All sources are opened before anything heavy: a mistyped one is reported at once.
    opened = {name: open_evaluation(config, name, image_size) for name in config.eval if config.eval[name].source}
    train = open_training(config, image_size)
    order = make_order(config, train)
    examples = order.epoch
    steps = configs.duration(config, "", examples)
    for phase in phase_configs:
        check_labels(phase.config, train)
        configs.check_lengths(phase.config, steps, examples)

    tokenizer = prepare_tokenizer(folder.path, config, train)
    faults = Faults()
    stops = [*(phase.start for phase in phase_configs[1:]), steps]
    if any(phase.start >= steps for phase in phase_configs):
        raise UserError(f"config.phases: a phase starts at step {phase_configs[-1].start} of a run of {steps}")
    phases, before = [], 0
    for (start, phase_config), stop in zip(phase_configs, stops, strict=True):
        preset = resolve_preset(phase_config, tokenizer)
        length, words = preset.architecture.text.context_length, tokenizer
        if length != tokenizer.context_length:
            words = stored.open_tokenizer(folder.path, preset.tokenizer, length)
        learner = make_learner(phase_config, mesh, steps=steps, examples=examples, tokenizer=words)
        check_stored(learner, train)
        stored_images.check_source(phase_config.data.image_embeddings, train)
        batches = TrainingBatches(train, order, learner.views, faults, learner.ratio, start, before)
        before += (stop - start) * learner.ratio
        evaluations = make_evaluations(phase_config, learner, preset, words, opened, examples)
        phases.append(Phase(start, stop, preset, learner, batches, evaluations))
    return Run(
        folder=folder,
        config=config,
        steps=steps,
        mesh=mesh,
        train=train,
        tokenizer=tokenizer,
        faults=faults,
        phases=tuple(phases),
        checkpoint_every=configs.duration(config, "checkpoint.every_", examples),
        # Earlier versions recorded a name and a path instead of a checksum.
        constants={name: found for name, found in (previous or {}).get("constants", {}).items() if " " not in found},
    )


def resolve_preset(config: ConfigDict, tokenizer: Tokenizer) -> Preset:
    """The config's model with the tokenizer's vocabulary. Raises UserError for a vocabulary that is too small."""
    preset = configs.resolve_preset(config, tokenizer.vocab_size)
    if preset.architecture.text.vocab_size < tokenizer.vocab_size:
        raise UserError(
            f"config.model.text.vocab_size={preset.architecture.text.vocab_size}: "
            f"the tokenizer has {tokenizer.vocab_size} tokens; leave it at -1"
        )
    return preset


def open_training(config: ConfigDict, image_size: int) -> Source:
    train = config.data.train
    if isinstance(train, str):
        return _open(config, train, config.data.caption, image_size, config.data.boxes)
    # A caption setting of its own is the third part of an entry.
    boxes = config.data.boxes
    if boxes and not any(has_boxes(where) for where, *_ in train):
        raise UserError(f"config.data.boxes={boxes}: no source of config.data.train can have boxes; leave it out")
    opened = [
        _open(config, where, *(caption or [config.data.caption]), image_size, boxes if has_boxes(where) else "")
        for where, _, *caption in train
    ]
    return open_mixture(opened, [weight for _, weight, *_ in train])


def make_order(config: ConfigDict, train: Source) -> Order | MixedOrder:
    """Which examples make batch k of the run."""
    data, seed = config.data, fold(config.seed, 1)
    if not isinstance(train, Mixture):
        return Order(len(train), config.batch_size, seed, data.shuffle_block, data.shuffle_window)
    return mix(
        [len(part) for part in train.parts],
        [weight for _, weight, *_ in data.train],
        config.batch_size,
        seed,
        by_share=data.mixture == "share",
        block=data.shuffle_block,
        window=data.shuffle_window,
    )


def open_evaluation(config: ConfigDict, name: str, image_size: int) -> tuple[Source, Source | None]:
    """The source of a named evaluation, with a caption setting of its own, and the one that a probe is fitted on."""
    evaluation = config.eval[name]
    source, caption = evaluation.source, evaluation.caption or config.data.caption
    boxes = config.data.boxes if evaluation.protocol == "grounding" and has_boxes(source) else ""
    train = _open(config, evaluation.train, caption, image_size) if evaluation.train else None
    return _open(config, source, caption, image_size, boxes), train


def check_labels(config: ConfigDict, train: Source) -> None:
    """Raises UserError if labels decide what is a positive, and the examples have none."""
    contrastive = config.objectives.contrastive
    if contrastive.weight > 0 and contrastive.positives == "labels" and not train.class_names:
        raise UserError(
            f"config.objectives.contrastive.positives=labels: the examples of {train.name} have no labels; "
            "captions makes those with equal captions positives of each other"
        )


def check_stored(learner: Learner, train: Source) -> None:
    """Raises UserError if what an objective has stored for examples is for those of other data."""
    for name, objective in learner.objectives.items():
        if objective.source_fingerprint not in ("", train.fingerprint):
            raise UserError(
                f"config.objectives.{name}.stored: written for other data than {train.name}, or before it changed; "
                "repeat clip-jax reinforce with a new --output"
            )


def _open(config: ConfigDict, where: str, caption: str, image_size: int, boxes: str = "") -> Source:
    opened = open_source(
        where,
        image_size=image_size,
        image=config.data.image,
        caption=caption,
        truncated=config.data.truncated,
        links_to=config.data.links_to,
        max_bad_share=config.data.max_bad_share,
        long_reads=config.data.shuffle_block > 1,
        tfds_dir=config.data.tfds_dir,
        boxes=boxes,
    )
    if not len(opened):
        raise UserError(f"{where}: no examples")
    return opened


def make_evaluations(
    config: ConfigDict,
    learner: Learner,
    preset: Preset,
    tokenizer: Tokenizer,
    opened: dict[str, tuple[Source, Source | None]],
    examples: int,
) -> tuple[Evaluation, ...]:
    """The evaluations of a phase; those with the same batch size share their compiled encoders."""
    embedders, made = {}, []
    contrastive = config.objectives.contrastive
    loss = make_held_out_loss(contrastive.loss, learner.mesh) if contrastive.weight > 0 else None
    for name, (source, train) in opened.items():
        settings = config.eval[name]
        batch_size = config.batch_size if settings.batch_size == configs.AUTO else settings.batch_size
        if batch_size not in embedders:
            embedders[batch_size] = make_embedder(
                learner.model, preset.preprocess, tokenizer, learner.mesh, batch_size, config.data.workers
            )
        evaluation = Evaluation(
            name=name,
            protocol=settings.protocol,
            source=source,
            templates=tuple(settings.templates),
            every=configs.duration(config, f"eval.{name}.every_", examples),
            embedder=embedders[batch_size],
            loss=loss,
            tokenizer=preset.tokenizer,
            train=train,
        )
        protocols.check(evaluation)
        made.append(evaluation)
    return tuple(made)


def description(run: Run) -> dict[str, Any]:
    """The content of ``run.json``. ``model`` is the last phase's, which is what a finished run loads as."""
    first, last = run.phases[0], run.phases[-1]
    values = {
        "clip_jax_version": __version__,
        **({"commit": commit} if (commit := version.commit()) else {}),
        "config": _settings(run.config),
        "steps": run.steps,
        "model": {"name": run.config.model.name, "parameters": run.parameters, **presets.to_json(last.preset)},
        "tokenizer": {"kind": last.preset.tokenizer, "fingerprint": run.tokenizer.fingerprint},
        "data": {"train": {"name": run.train.name, "samples": len(run.train), "fingerprint": run.train.fingerprint}},
        "flops_per_pair": flops.training(first.learner.trained_architecture, first.learner.frozen_towers),
        "flops_shares": last.learner.flops_shares(run.config.batch_size),
        "versions": {"python": platform.python_version()}
        | {name: importlib.metadata.version(name) for name in VERSIONS},
        "devices": f"{jax.device_count()} x {jax.devices()[0].device_kind} on {jax.process_count()} process(es)",
    }
    if len(run.phases) > 1:
        values["phases"] = [{"start": phase.start, **presets.to_json(phase.preset)} for phase in run.phases]
    constants = run.constants | run.stored_constants
    return values | ({"constants": constants} if constants else {})


def _settings(config: ConfigDict) -> dict[str, Any]:
    """What a restart takes up again. Mended data is accepted once: a later change is another one."""
    settings = configs.to_json(config)
    settings["data"]["changed"] = configs.defaults().data.changed
    return settings
