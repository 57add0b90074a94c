"""A small model on meshes without devices, for tests of the plan."""

import dataclasses

import jax.numpy as jnp
import optax
from jax.sharding import AbstractMesh

from clip_jax.devices.sharding import AXES
from clip_jax.models.attention import xla
from clip_jax.models.clip import CLIP
from clip_jax.models.compute import Compute
from tests.models.test_clip import SMALL
from tests.training.steps import learner_of

BIASED = dataclasses.replace(SMALL, init_logit_bias=-10.0)


def mesh_of(data=1, fsdp=1, tensor=1):
    return AbstractMesh((data, fsdp, tensor), AXES)


def clip(remat="none", dtype=jnp.bfloat16, attend=xla, **image):
    tower = dataclasses.replace(SMALL.image, **image)
    return CLIP(dataclasses.replace(BIASED, image=tower), Compute(dtype=dtype, remat=remat, attend=attend))


def planned(model, mesh, **options):
    """The learner of a plan, with AdamW."""
    return learner_of(mesh, model=model, optimizer=optax.adamw(1e-3), **options)


def state_of(model, mesh):
    return planned(model, mesh).abstract_state()
