"""What a step has to do against the program that does it: FLOPs of its jaxpr, collectives of its compiled text."""

import dataclasses
import itertools

import jax
import jax.numpy as jnp
import pytest

from clip_jax.devices.hardware import Machines, tpu
from clip_jax.devices.sharding import make_mesh
from clip_jax.objectives.cost import Transfer
from clip_jax.planning import program
from clip_jax.planning.memory import step_memory
from clip_jax.planning.program import Collective
from clip_jax.planning.roofline import roofline
from clip_jax.planning.work import Work, compiled_transfers, step_work
from tests.models.test_clip import SMALL
from tests.planning.plans import clip, mesh_of, planned, state_of

BATCH = 64


def work_of(model, mesh, slices=1, **options):
    learner = planned(model, mesh, **options)
    state = learner.abstract_state()
    memory = step_memory(learner, state, BATCH, tiled=False)
    return step_work(learner, state, memory, batch_size=BATCH, slices=slices)


def traced(model, mesh, **options):
    """(the training step, its arguments)"""
    learner = planned(model, mesh, **options)
    return learner.step(), (learner.abstract_state(), learner.batch_spec(BATCH), {})


@pytest.mark.parametrize(
    ("remat", "micro_batches", "loss", "patch_dropout"),
    [
        *itertools.product(("none", "dots", "named", "full"), (1, 4), ("softmax",), (0.0,)),
        ("none", 1, "sigmoid", 0.0),
        ("full", 4, "sigmoid", 0.0),
        ("dots", 1, "softmax", 0.5),
        ("full", 4, "softmax", 0.5),
    ],
)
def test_flops_are_those_of_the_step_as_it_is_written(remat, micro_batches, loss, patch_dropout):
    model, mesh = clip(remat), make_mesh()
    options = {"loss": loss, "micro_batches": micro_batches, "patch_dropout": patch_dropout}
    step, arguments = traced(model, mesh, **options)
    counted = program.matmul_flops(jax.make_jaxpr(step)(*arguments))
    # MFU counts three forward passes; nobody needs the gradient by the pixels.
    by_pixels = BATCH * 2 * SMALL.image.grid**2 * SMALL.image.patch_size**2 * 3 * SMALL.image.width
    assert 8 * work_of(model, mesh, **options).flops == counted + by_pixels


@pytest.mark.slow
def test_a_data_parallel_step_moves_its_gradients_twice():
    model, mesh = clip(dtype=jnp.float32), make_mesh()
    step, arguments = traced(model, mesh)
    compiled = program.collectives(step.lower(*arguments).compile().as_text())
    estimated = {t.what: t.ici_bytes for t in work_of(model, mesh).transfers}
    moved = sum(c.traffic for c in compiled if c.kind == "all-reduce")
    assert moved == pytest.approx(estimated["gradients summed over the batch"], rel=0.02)
    embeddings = sum(c.traffic for c in compiled if c.kind in ("all-gather", "reduce-scatter", "collective-permute"))
    assert embeddings == pytest.approx(estimated["embeddings and their gradients"], rel=0.1)


def test_fsdp_gathers_weights_in_each_pass_and_scatters_gradients():
    model = clip(width=64)
    shards = {t.what: t.ici_bytes for t in work_of(model, mesh_of(fsdp=4)).transfers}
    total = sum(leaf.size for leaf in jax.tree.leaves(state_of(model, mesh_of()).params))
    bfloat16 = 2
    assert shards["weights gathered along fsdp"] == pytest.approx(2 * 3 / 4 * total * bfloat16, rel=0.02)
    assert shards["gradients scattered along fsdp"] == pytest.approx(3 / 4 * total * bfloat16, rel=0.02)


def test_between_slices_only_a_share_of_the_summed_gradients_travels():
    model = clip()
    one, two = ({t.what: t for t in work_of(model, mesh_of(data=8), slices=n).transfers} for n in (1, 2))
    name = "gradients summed over the batch"
    total = sum(leaf.size for leaf in jax.tree.leaves(state_of(model, mesh_of()).params)) * 2
    assert one[name] == Transfer(name, pytest.approx(2 * 7 / 8 * total, rel=1e-4), 0)
    assert two[name] == Transfer(name, pytest.approx(2 * 3 / 4 * total, rel=1e-4), pytest.approx(total / 4, rel=1e-3))


def test_texts_come_from_other_slices_and_images_do_not():
    name = "embeddings and their gradients"
    one, two = (next(t for t in work_of(clip(), mesh_of(data=8), slices=n).transfers if t.what == name) for n in (1, 2))
    bfloat16 = 2
    # A grid of 2 x 4: each row is a slice, and half of a column's texts are in the other one. Twice: gathered, and
    # their gradients scattered.
    assert two.dcn_bytes == 2 * (BATCH // 4) * SMALL.embed_dim * bfloat16 // 2
    assert two.ici_bytes + two.dcn_bytes == one.ici_bytes


def test_what_comes_from_another_slice_comes_once_for_all_devices_of_a_group_there():
    groups = ((0, 1, 2, 3),)
    coordinates = [(0, 0), (0, 1), (1, 0), (1, 1)]
    compiled = [Collective("all-reduce", 1000, groups, 2), Collective("all-gather", 4000, groups, 1)]
    # Each gets 3/4 of the 4000 gathered; 2000 are in the other slice, half of them come to each of two devices.
    # A sum is scattered and gathered: 2 x 3/4 of 1000, twice; 2 x 500 cross, for two devices, twice.
    assert set(compiled_transfers(compiled, coordinates)) == {
        Transfer("all-gather", 2000, 1000),
        Transfer("all-reduce", 2000, 1000),
    }


def test_the_slowest_resource_bounds_the_step():
    work = Work(0, flops=197 * 10**10, hbm_bytes=819 * 10**6, transfers=(Transfer("x", 200 * 10**7, 3125 * 10**4),))
    one = roofline(work, tpu("v5e-256", slices=2))
    assert one == pytest.approx((0.01, 0.001, 0.01, 0.01))
    assert one.overlapped == pytest.approx(0.01)
    assert one.serial == pytest.approx(0.031)
    assert roofline(work._replace(flops=0), tpu("v5e-256", slices=2)).bound in ("ici", "dcn")


def test_two_devices_share_their_chip():
    chip = tpu("tpu7x-8").chip
    work = Work(0, flops=int(chip.flops), hbm_bytes=0, transfers=())
    assert roofline(work, Machines(chip, (2, 2, 1))).compute == pytest.approx(2)
    assert roofline(work, Machines(dataclasses.replace(chip, devices_per_chip=1), (2, 2, 1))).compute == pytest.approx(
        1
    )
