"""A small model on meshes without devices, for tests of the plan."""

import dataclasses

import jax.numpy as jnp
import optax
from jax.sharding import AbstractMesh

from clip_jax.models.clip import CLIP
from clip_jax.sharding import AXES
from clip_jax.training.state import abstract_state
from tests.models.test_clip import SMALL

BIASED = dataclasses.replace(SMALL, init_logit_bias=-10.0)


def mesh_of(data=1, fsdp=1, tensor=1):
    return AbstractMesh((data, fsdp, tensor), AXES)


def clip(remat="none", dtype=jnp.bfloat16, **image):
    tower = dataclasses.replace(SMALL.image, **image)
    return CLIP(dataclasses.replace(BIASED, image=tower), dtype, scan=True, remat=remat)


def state_of(model, mesh):
    return abstract_state(model, optax.adamw(1e-3), mesh)
