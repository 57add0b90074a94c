"""The training step's parts for any mesh, and without data: what is planned is what trains."""

from typing import NamedTuple

import jax
import jax.numpy as jnp
import optax
from jax.sharding import AbstractMesh, Mesh
from ml_collections import ConfigDict

from clip_jax import config as configs
from clip_jax.models.clip import CLIP
from clip_jax.presets import Preset
from clip_jax.sharding import batch_sharding
from clip_jax.training import setup
from clip_jax.training.state import State, abstract_state
from clip_jax.training.step import TrainStep

STEPS = 1_000_000
"""For the schedule, whose length changes no shape; warm-ups of epochs are reckoned of as many samples."""


class Parts(NamedTuple):
    """A config's model, optimizer and state (shapes with shardings) on a mesh."""

    config: ConfigDict
    mesh: Mesh | AbstractMesh
    preset: Preset
    model: CLIP
    optimizer: optax.GradientTransformation
    state: State

    @property
    def micro_batches(self) -> int:
        return 1 if self.config.micro_batch == configs.AUTO else self.config.batch_size // self.config.micro_batch

    def make_step(self) -> TrainStep:
        rate = setup.make_schedule(self.config, STEPS, STEPS)
        return setup.make_step(self.config, self.preset, self.model, self.optimizer, rate, self.mesh)

    def lower(self) -> jax.stages.Lowered:
        """The step for a batch of the config's size, ready to be compiled; the mesh has devices, here or not."""
        image, text = self.model.architecture.image, self.model.architecture.text
        rows, batch = batch_sharding(self.mesh), self.config.batch_size
        pixels = jax.ShapeDtypeStruct((batch, image.image_size, image.image_size, 3), jnp.uint8, sharding=rows)
        tokens = jax.ShapeDtypeStruct((batch, text.context_length), jnp.int32, sharding=rows)
        return self.make_step().lower(self.state, {"image": pixels, "text": tokens})


def make_parts(config: ConfigDict, mesh: Mesh | AbstractMesh, state: State | None = None) -> Parts:
    """``state`` may be that of other parts on the same mesh. Raises UserError where the batch does not divide."""
    setup.check_batch(config, mesh)
    preset = configs.resolve_preset(config)
    model = setup.make_model(config, preset)
    optimizer = setup.make_optimizer(config, setup.make_schedule(config, STEPS, STEPS))
    if state is None:
        state = abstract_state(model, optimizer, mesh, average=config.ema_decay > 0)
    return Parts(config, mesh, preset, model, optimizer, state)
