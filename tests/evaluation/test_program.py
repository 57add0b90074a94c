"""The compiled evaluation encoders: their collectives move parameters, and never activations of the batch."""

import jax
import pytest

from clip_jax import presets
from clip_jax.devices.sharding import batch_sharding, make_mesh
from clip_jax.evaluation.embed import Variables, make_encoders
from clip_jax.planning.program import collectives
from tests.models.test_clip import SMALL
from tests.training.steps import learner_of

PAIRS = 512


@pytest.mark.parametrize("shape", [(1, 8, 1), (2, 2, 2)])
def test_a_device_receives_the_parameters_and_the_embeddings_and_no_activations(shape):
    """Where parameters are split over fsdp they are gathered once, layer by layer; with tensor parallelism each layer's
    output is summed besides, over the tensor axis alone."""
    mesh = make_mesh(*shape)
    learner = learner_of(mesh)
    state = learner.abstract_state()
    encoders = make_encoders(learner.model, presets.HALF, mesh)
    pixels = jax.ShapeDtypeStruct((PAIRS, 32, 32, 3), "uint8", sharding=batch_sharding(mesh))
    valid = jax.ShapeDtypeStruct((PAIRS,), "bool", sharding=batch_sharding(mesh))
    compiled = encoders.image.lower(Variables(state.params, {}), pixels, valid).compile()
    tower, parameters = SMALL.image, sum(leaf.size for leaf in jax.tree.leaves(state.params["image"])) * 4
    gathered = sum(c.traffic for c in collectives(compiled.as_text()) if c.kind == "all-gather")
    embeddings = PAIRS * (SMALL.embed_dim * 4 + 1)
    assert gathered <= 1.1 * (parameters + embeddings)
    others = sum(c.traffic for c in collectives(compiled.as_text()) if c.kind != "all-gather")
    shards, tensor = shape[0] * shape[1], shape[2]
    layer = PAIRS // shards * tower.tokens * tower.width * 4
    sums = 2 * tower.layers * layer * 2 * (tensor - 1) // tensor
    assert others <= 1.1 * sums + 0.05 * parameters


def test_the_test_sees_activations_that_move():
    """The same encoder without its mesh, as it was once compiled: the partitioner exchanges the global batch."""
    mesh = make_mesh(1, 8, 1)
    learner = learner_of(mesh)
    state = learner.abstract_state()
    from dataclasses import replace

    loose = replace(learner.model, compute=learner.model.compute._replace(mesh=None))
    encoders = make_encoders(loose, presets.HALF, mesh)
    pixels = jax.ShapeDtypeStruct((PAIRS, 32, 32, 3), "uint8", sharding=batch_sharding(mesh))
    valid = jax.ShapeDtypeStruct((PAIRS,), "bool", sharding=batch_sharding(mesh))
    compiled = encoders.image.lower(Variables(state.params, {}), pixels, valid).compile()
    parameters = sum(leaf.size for leaf in jax.tree.leaves(state.params["image"])) * 4
    assert sum(c.traffic for c in collectives(compiled.as_text())) > 5 * parameters
