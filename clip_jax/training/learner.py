"""The learner: combines model, objectives, optimizer and mesh into a training step.

Runs, plans, tests and benchmarks all use it. Building the step reads no files and computes nothing, so a plan can
lower it for a mesh without devices.
"""

import functools
import math
import zlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import optax
from jax.sharding import AbstractMesh, Mesh
from jaxtyping import Array, Key

from clip_jax.data.augment import NONE, Augment
from clip_jax.data.augment_device import augment_batch
from clip_jax.data.views import Spec, View, batch_spec
from clip_jax.devices.sharding import batch_sharding, batch_shards, parameter_shardings, replicated, take_rows
from clip_jax.models import flops
from clip_jax.models.clip import CLIP, Architecture, Batch, Params
from clip_jax.objectives.objective import Ema, Metrics, Objective, Rows
from clip_jax.presets import Preprocess
from clip_jax.training import gradients
from clip_jax.training.gradients import Cached, Encoded
from clip_jax.training.rates import check_factors
from clip_jax.training.schedule import Schedule
from clip_jax.training.state import TrainState, check_frozen, join, matching, select

TOWERS = ("image", "text")
# Names of parts of the compiled step, by which a profile sorts its time.
OPTIMIZER, OBJECTIVE = "optimizer", "objective."
Step = Callable[[TrainState, Batch, Any], tuple[TrainState, Metrics]]


@dataclass(frozen=True)
class Learner:
    """The parts of a training step. ``make_learner`` (``training/setup.py``) builds one from a config."""

    model: CLIP
    preprocess: Preprocess
    views: Mapping[str, View]
    objectives: Mapping[str, Objective]
    weights: Mapping[str, float]
    """The weight of each objective in the loss."""
    optimizer: optax.GradientTransformation
    rate: Schedule
    mesh: Mesh | AbstractMesh
    micro_batches: int = 1
    run_emas: Mapping[str, Ema] = field(default_factory=dict)
    """EMAs of the parameters, by name, besides those that objectives read."""
    frozen: tuple[str, ...] = ()
    """Patterns of paths of parameters that are not trained: no gradient, no moments, no backward pass."""
    rate_factors: tuple[Mapping[str, float], ...] = ()
    """The optimizer's learning rate factors: path pattern -> factor. Every pattern must match a parameter."""
    update_flops: Callable[[Params], int] = lambda params: 0
    """FLOPs of an update on one device, from shapes and shardings, where they are not negligible."""
    augment: Augment = NONE
    """Augmentations that the step applies on the device; the data workers apply those of the views."""
    patch_dropout: float = 0.0
    seed: int = 0

    @property
    def emas(self) -> dict[str, Ema]:
        """All EMAs of the state: the run's and those that objectives read."""
        found = dict(self.run_emas)
        for objective in self.objectives.values():
            found |= objective.emas
        return found

    @functools.cached_property
    def frozen_towers(self) -> tuple[str, ...]:
        """The towers without a backward pass: all of their parameters are frozen."""
        trained = select(self.abstract_state().params, self.frozen, trainable=True) if self.frozen else TOWERS
        return tuple(tower for tower in TOWERS if tower not in trained)

    @functools.cached_property
    def trained_architecture(self) -> Architecture:
        """The architecture as trained, for counting FLOPs: patch dropout and stored images applied."""
        architecture = self.model.architecture
        if "image_embedding" in self.views["image"].arrays:
            return replace(architecture, image=architecture.image.stored())
        if not self.patch_dropout:
            return architecture
        return replace(architecture, image=architecture.image.dropping(self.patch_dropout))

    @property
    def ratio(self) -> int:
        """The size of the batch that the step receives, as a multiple of the batch that it trains on."""
        return math.prod(objective.ratio for objective in self.objectives.values())

    def flops_shares(self, batch_size: int) -> dict[str, float]:
        """The share of the towers (without recomputation) and of each objective in a step's FLOPs."""
        pairs, tensor = batch_size // batch_shards(self.mesh), self.mesh.shape["tensor"]
        counts = {"towers": pairs * flops.training(self.trained_architecture, self.frozen_towers) // tensor}
        options = dict(batch_size=batch_size, micro_batches=self.micro_batches, mesh=self.mesh, slices=1)
        counts |= {name: objective.cost(**options).flops for name, objective in self.objectives.items()}
        return {name: count / sum(counts.values()) for name, count in counts.items()}

    def batch_spec(self, batch_size: int) -> Spec:
        """The global batch that the step takes to train on ``batch_size`` pairs: name -> shape, type and sharding."""
        return batch_spec(self.views, self.ratio * batch_size, self.mesh)

    # State

    def _boxed_state(self, rng: Key[Array, ""]) -> TrainState:
        """A fresh state whose parameters and moments are boxed with their logical axes."""
        params = self.model.init(rng)
        objective_params = {
            name: objective.init(jax.random.fold_in(rng, zlib.crc32(name.encode())))
            for name, objective in self.objectives.items()
        }
        objective_params = {name: tree for name, tree in objective_params.items() if tree}
        if objective_params:
            params["objectives"] = objective_params
        check_frozen(params, self.frozen)
        check_factors(params, self.rate_factors)
        aux = {name: objective.init_aux() for name, objective in self.objectives.items()}
        zero = jnp.zeros((), jnp.int32)
        return TrainState(
            step=zero,
            data_step=zero,
            params=params,
            batch_stats=self.model.init_batch_stats(),
            # The optimizer sees boxed parameters, so that its moments are boxed, and thus sharded, like them.
            opt_state=self.optimizer.init(select(params, self.frozen, trainable=True)),
            ema={name: matching(params, ema.of) for name, ema in self.emas.items()},
            aux={name: value for name, value in aux.items() if jax.tree.leaves(value)},
        )

    @functools.cached_property
    def _abstract_state(self) -> TrainState:
        return self._abstract(jax.eval_shape(self._boxed_state, jax.random.key(0)))

    def abstract_state(self) -> TrainState:
        """The state's shapes with the sharding of every leaf: nothing is computed."""
        return self._abstract_state

    def create_state(self, seed: int | None = None) -> TrainState:
        """A newly initialized state, created sharded: no device ever holds more than its shards."""
        create = jax.jit(lambda rng: nn.meta.unbox(self._boxed_state(rng)), out_shardings=self.shardings())
        return create(jax.random.key(self.seed if seed is None else seed))

    def shardings(self) -> TrainState:
        return jax.tree.map(lambda leaf: leaf.sharding, self.abstract_state())

    def abstract_constants(self) -> dict[str, Params]:
        """The shapes and shardings of the objectives' constants, which are neither trained, donated nor saved."""
        boxed = {name: objective.abstract_constants() for name, objective in self.objectives.items()}
        return self._abstract({name: tree for name, tree in boxed.items() if tree})

    def load_constants(self) -> dict[str, Params]:
        """The objectives' constants, on the devices."""
        return {
            name: self.objectives[name].load_constants(jax.tree.map(lambda leaf: leaf.sharding, tree))
            for name, tree in self.abstract_constants().items()
        }

    def _abstract(self, boxed: Any) -> Any:
        return jax.tree.map(
            lambda leaf, sharding: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding),
            nn.meta.unbox(boxed),
            parameter_shardings(boxed, self.mesh),
        )

    # Step

    def lower(self, batch_size: int, text_length: int | None = None) -> jax.stages.Lowered:
        """Lowers the step for a global batch; the mesh may be abstract.

        ``text_length`` is the length in tokens of texts that are cut to a bucket (``text_buckets.py``).
        """
        batch = self.batch_spec(batch_size)
        if text_length is not None:
            text = batch["text"]
            batch["text"] = jax.ShapeDtypeStruct((text.shape[0], text_length), text.dtype, sharding=text.sharding)
        return self.step().lower(self.abstract_state(), batch, self.abstract_constants())

    def step(self) -> Step:
        """The jitted training step ``(state, batch, constants) -> (state, metrics)``; the state is donated."""
        shardings = self.shardings()
        constants = jax.tree.map(lambda leaf: leaf.sharding, self.abstract_constants())
        trainable = select(shardings.params, self.frozen, trainable=True)

        def constrain(gradient: Params) -> Params:
            # Without it the partitioner may replicate the gradients of sharded parameters.
            return jax.lax.with_sharding_constraint(gradient, trainable)

        def train_step(state: TrainState, batch: Batch, constants: Any) -> tuple[TrainState, Metrics]:
            if self.augment != NONE:
                batch = batch | {"image": augment_batch(batch["image"], self.augment, self.seed, state.data_step)}
            batch, chosen = self.choose(state, batch, constants)
            batch = batch | {"row": jnp.arange(batch["text"].shape[0])}
            for objective in self.objectives.values():
                batch = batch | objective.prepare(batch)
            results = self._gradient(state, batch, constants, constrain)
            gradient = constrain(results.gradient)
            trained = select(state.params, self.frozen, trainable=True)
            with jax.named_scope(OPTIMIZER):
                updates, opt_state = self.optimizer.update(gradient, state.opt_state, trained)
                params = optax.apply_updates(trained, updates)
            params = join(params, select(state.params, self.frozen, trainable=False))
            for objective in self.objectives.values():
                params = objective.constrain(params)
            metrics = (
                results.metrics
                | chosen
                | {
                    "loss": results.loss,
                    "grad_norm": optax.global_norm(gradient),
                    "param_norm": optax.global_norm(state.params),
                    "update_norm": optax.global_norm(updates),
                    "logit_scale": jnp.exp(state.params["logit_scale"]),
                    "learning_rate": self.rate(state.step),
                }
            )
            if "logit_bias" in state.params:
                metrics["logit_bias"] = state.params["logit_bias"]
            new_state = TrainState(
                step=state.step + 1,
                data_step=state.data_step + 1,
                params=params,
                batch_stats=results.encoded.batch_stats,
                opt_state=opt_state,
                ema={
                    name: update_ema(state.ema[name], matching(params, ema.of), ema.decay, state.step)
                    for name, ema in self.emas.items()
                },
                aux={
                    name: self.objectives[name].update(
                        aux, results.encoded.sums.get(name, {}), results.encoded.cached.get(name, {})
                    )
                    for name, aux in state.aux.items()
                },
            )
            return new_state, metrics

        return jax.jit(
            train_step,
            in_shardings=(shardings, batch_sharding(self.mesh), constants),
            out_shardings=(shardings, replicated(self.mesh)),
            donate_argnums=0,
        )

    def choose(self, state: TrainState, batch: Batch, constants: Any) -> tuple[Batch, Metrics]:
        """Selects the rows of the batch that the step trains on; returns them and the metrics of the selection."""
        for name, objective in self.objectives.items():
            if objective.choose is not None:
                rng = jax.random.fold_in(
                    jax.random.fold_in(jax.random.key(self.seed), state.step), zlib.crc32(name.encode())
                )
                keys = jax.vmap(jax.random.fold_in, (None, 0))(rng, jnp.arange(len(batch["text"])))
                parts = objective.ratio * self.micro_batches
                rows, metrics = objective.choose(
                    state.params, state.batch_stats, constants.get(name, {}), batch, keys, parts
                )
                return {key: take_rows(value, rows, self.mesh) for key, value in batch.items()}, metrics
        return batch, {}

    def _gradient(
        self, state: TrainState, batch: Batch, constants: Any, constrain: Callable[[Params], Params]
    ) -> gradients.Gradient:
        frozen = select(state.params, self.frozen, trainable=False)
        trained = select(state.params, self.frozen, trainable=True)

        def forward(trained: Params, batch_stats: Params, batch: Batch) -> Encoded:
            return self.forward(state, join(trained, frozen), batch_stats, batch, constants)

        def across(trained: Params, cached: Cached) -> tuple[Array, Metrics]:
            return self.across(join(trained, frozen), cached, batch)

        if self.micro_batches == 1:
            results = gradients.full_batch(forward, across, trained, state.batch_stats, batch)
        else:
            options = dict(parts=self.micro_batches, mesh=self.mesh, constrain=constrain)
            results = gradients.micro_batches(forward, across, trained, state.batch_stats, batch, **options)
        logged = {
            f"{name}/{key}": value
            for name, sums in results.encoded.sums.items()
            for key, value in sums.items()
            if value.ndim == 0
        }
        return results._replace(metrics=results.metrics | logged)

    def forward(self, state: TrainState, params: Params, batch_stats: Params, batch: Batch, constants: Any) -> Encoded:
        """Runs both towers and evaluates the objectives on each row; ``params`` replaces ``state.params``."""
        # Keys depend only on seed, step and row, so that resumed runs and micro-batches draw the same numbers.
        rng = jax.random.fold_in(jax.random.key(self.seed), state.step)
        keys = jax.vmap(jax.random.fold_in, (None, 0))(rng, batch["row"])
        if "image" in batch:
            batch = batch | {"image": self.preprocess.normalize(batch["image"])}
        outputs = self.model.forward(
            params, batch_stats, batch, train=True, keys=keys, patch_dropout=self.patch_dropout
        )
        cached, sums, local = {}, {}, None
        for name, objective in self.objectives.items():
            rows = Rows(
                params=params,
                batch_stats=batch_stats,
                ema=state.ema,
                aux=state.aux.get(name, {}),
                constants=constants.get(name, {}),
                outputs=outputs,
                batch=batch,
                keys=jax.vmap(jax.random.fold_in, (0, None))(keys, zlib.crc32(name.encode())),
            )
            if embeddings := objective.embed(rows):
                cached[name] = embeddings
            if objective.local is not None:
                with jax.named_scope(f"{OBJECTIVE}{name}"):
                    term, sums[name] = objective.local(rows)
                sums[name] = sums[name] | {"loss": jax.lax.stop_gradient(term)}
                local = _weighted_sum(local, self.weights[name], term)
        return Encoded(cached, local, jax.lax.stop_gradient(sums), outputs.batch_stats)

    def across(self, params: Params, cached: Cached, batch: Batch) -> tuple[Array, Metrics]:
        """The weighted sum of the terms across the batch, and their metrics."""
        total, metrics = None, {}
        for name, objective in self.objectives.items():
            if objective.across is None:
                continue
            with jax.named_scope(f"{OBJECTIVE}{name}"):
                term, found = objective.across(params, cached.get(name, {}), batch, self.mesh)
            metrics |= found
            if len(self.objectives) > 1:
                metrics[f"{name}/loss"] = term
            total = _weighted_sum(total, self.weights[name], term)
        return jnp.zeros(()) if total is None else total, metrics


def _weighted_sum(total: Array | None, weight: float, term: Array) -> Array:
    """``total + weight * term``, without no-op multiplications and additions in the compiled program."""
    term = term if weight == 1 else weight * term
    return term if total is None else total + term


def update_ema(ema: Params, params: Params, decay: float, step: Array) -> Params:
    """``decay * ema + (1 - decay) * params``, with a smaller decay in early steps.

    The decay is ``min(decay, (1 + step) / (10 + step))``, as in ``tf.train.ExponentialMovingAverage``.
    """
    decay = jnp.minimum(decay, (1.0 + step) / (10.0 + step))
    return jax.tree.map(lambda old, new: decay * old + (1 - decay) * new, ema, params)
