"""Meshes, parameter shardings and rows: everything lies where the rules say, on any shape of eight devices."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import PartitionSpec as P

from clip_jax.devices.sharding import (
    batch_sharding,
    make_mesh,
    mesh_shape,
    parameter_shardings,
    process_rows,
    to_devices,
)
from clip_jax.errors import UserError
from clip_jax.models.clip import CLIP
from clip_jax.planning.program import axes, collectives
from tests.models.test_clip import SMALL, computed


@pytest.mark.parametrize(
    ("sizes", "shape"),
    [((-1, 1, 1), (8, 1, 1)), ((2, -1, 2), (2, 2, 2)), ((8, 1, 1), (8, 1, 1)), ((1, 1, -1), (1, 1, 8))],
)
def test_one_axis_takes_what_the_others_leave(sizes, shape):
    assert mesh_shape(*sizes, devices=8) == shape


@pytest.mark.parametrize("sizes", [(3, 1, -1), (-1, -1, 1), (0, 1, 1), (4, 1, 1), (-1, 16, 1)])
def test_a_mesh_that_does_not_fit_is_refused(sizes):
    with pytest.raises(UserError, match=r"config\.mesh"):
        mesh_shape(*sizes, devices=8)


def test_between_slices_only_the_data_axis_runs():
    mesh = make_mesh(4, 2, 1, slices=2)
    first, second = jax.devices()[:4], jax.devices()[4:]
    assert set(mesh.devices[:2].flat) == set(first) and set(mesh.devices[2:].flat) == set(second)


@pytest.mark.parametrize(
    ("sizes", "message"),
    [((1, 8, 1, 2), r"mesh\.data=1 does not divide over 2 slices"), ((8, 1, 1, 3), r"mesh\.slices=3: the 8 devices")],
)
def test_slices_that_the_mesh_does_not_fit_are_refused(sizes, message):
    with pytest.raises(UserError, match=message):
        make_mesh(*sizes)


class TPU:
    """As much of a device as tells its slice."""

    def __init__(self, index):
        self.id, self.slice_index, self.process_index = index, index % 2, 0
        self.platform = self.device_kind = "test"


def test_slices_are_found_by_what_the_devices_say():
    mesh = make_mesh(-1, 2, devices=[TPU(i) for i in range(8)])
    assert [[d.slice_index for d in row] for row in mesh.devices.reshape(4, 2)] == [[0, 0], [0, 0], [1, 1], [1, 1]]
    with pytest.raises(UserError, match=r"mesh\.slices=4: the 8 devices are 2 slice"):
        make_mesh(-1, 2, slices=4, devices=[TPU(i) for i in range(8)])


def test_parameters_lie_by_their_logical_axes():
    mesh = make_mesh(2, 2, 2)
    shardings = parameter_shardings(jax.eval_shape(CLIP(SMALL).init, jax.random.key(0)), mesh)
    block = shardings["image"]["transformer"]["blocks"]
    assert block["attention"]["qkv"].spec == P(None, "fsdp", None, "tensor", None)
    assert block["attention"]["out"].spec == P(None, "tensor", None, "fsdp")
    assert block["mlp"]["up"].spec == P(None, "fsdp", "tensor")
    assert block["mlp"]["down"].spec == P(None, "tensor", "fsdp")
    assert shardings["text"]["token_embedding"].spec == P("tensor", "fsdp")
    assert shardings["logit_scale"].spec == P()


def test_an_axis_that_does_not_divide_stays_whole():
    shardings = parameter_shardings(jax.eval_shape(CLIP(SMALL).init, jax.random.key(0)), make_mesh(1, 1, 8))
    assert shardings["image"]["transformer"]["blocks"]["attention"]["qkv"].spec == P(
        None, "fsdp", None, None, None
    )  # two heads


def test_a_lookup_gathers_the_table_along_fsdp_and_never_replicates_tokens(capfd):
    """On a mesh of all three axes the partitioner finds no way of its own: it warns, and takes the last resort."""
    mesh, shapes = make_mesh(2, 2, 2), jax.eval_shape(CLIP(SMALL).init, jax.random.key(0))
    model = computed(SMALL, mesh=mesh)
    params = jax.tree.map(
        lambda leaf, sharding: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding),
        nn.meta.unbox(shapes),
        shardings := parameter_shardings(shapes, mesh),
    )

    def gradient(params, text):
        return jax.grad(lambda p: jnp.sum(model.encode_text(p, text) ** 2))(params)

    text = jax.ShapeDtypeStruct((64, 12), jnp.int32, sharding=batch_sharding(mesh))
    compiled = jax.jit(gradient, out_shardings=shardings).lower(params, text).compile().as_text()
    gathered = [(c.bytes, axes(c, mesh)) for c in collectives(compiled) if c.kind == "all-gather"]
    assert (100 // 2 * 48 * 4, ("fsdp",)) in gathered  # half of the rows, all of the features
    assert not any("data" in names for _, names in gathered)
    assert "rematerialization" not in capfd.readouterr().err


def test_rows_reach_the_devices_in_their_global_order():
    mesh = make_mesh(2, 2, 2)
    rows = process_rows(mesh, 12)
    assert rows.tolist() == list(range(12))  # one process holds them all
    array = to_devices({"x": np.arange(12)[:, None]}, mesh, 12)["x"]
    assert np.array_equal(array[:, 0], np.arange(12))
    assert {shard.data.shape for shard in array.addressable_shards} == {(3, 1)}
