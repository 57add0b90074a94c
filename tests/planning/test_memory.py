"""The estimate of a step's memory against cases counted by hand."""

import jax
import pytest

from clip_jax.models.clip import parameter_counts
from clip_jax.planning.memory import array_bytes, bytes_per_device, saved_bytes, step_memory, unsharded_bytes
from tests.models.test_clip import SMALL
from tests.planning.plans import clip, mesh_of, planned, state_of


def memory_of(mesh, remat="none", batch_size=64, micro_batches=1, tiled=False):
    learner = planned(clip(remat), mesh, micro_batches=micro_batches)
    return step_memory(learner, learner.abstract_state(), batch_size, tiled=tiled)


def test_adamw_has_three_float32_numbers_for_each_parameter_on_every_data_parallel_device():
    model = clip()
    parameters = parameter_counts(jax.eval_shape(model.init, jax.random.key(0)))["total"]
    memory = memory_of(mesh_of(data=8))
    assert memory.parameters == memory.gradients == 4 * parameters
    counters = 3 * 4  # step, data_step, adam's count
    assert memory.state == 12 * parameters + counters


def test_fsdp_divides_what_has_the_width_and_tensor_what_has_heads_mlp_or_vocabulary():
    model = clip()
    qkv = 64 * 3 * 64 * 3 * 4  # of the image tower: width, (q, k, v), heads x dim, layers, float32

    def qkv_bytes(mesh):
        return bytes_per_device(state_of(model, mesh).params["image"]["transformer"]["blocks"]["attention"]["qkv"])

    assert [qkv_bytes(mesh_of(fsdp=n)) for n in (1, 4)] == [qkv, qkv // 4]
    assert [qkv_bytes(mesh_of(tensor=n)) for n in (1, 2)] == [qkv, qkv // 2]


def test_full_remat_keeps_one_input_of_each_block():
    kept = [saved_bytes(clip("full", layers=layers), 5) for layers in (3, 5)]
    tokens, width, bfloat16 = SMALL.image.tokens, SMALL.image.width, 2
    assert kept[1] - kept[0] == 5 * 2 * tokens * width * bfloat16


def test_dots_keeps_what_the_weights_made_and_none_keeps_the_attention_too():
    kept = {remat: [saved_bytes(clip(remat, layers=n), 1) for n in (3, 4)] for remat in ("none", "dots", "full")}
    a_layer = {remat: many - few for remat, (few, many) in kept.items()}
    tokens, width, mlp, bfloat16 = SMALL.image.tokens, SMALL.image.width, SMALL.image.mlp_width, 2
    weights_made = tokens * (width + 3 * width + width + mlp) * bfloat16  # and the block's input
    assert weights_made <= a_layer["dots"] <= weights_made + tokens * width * bfloat16  # with the last product's
    attention = SMALL.image.heads * tokens**2 * bfloat16
    assert a_layer["none"] > weights_made + attention


def test_activations_are_proportional_to_the_micro_batch_and_the_state_is_not():
    whole, parts = (memory_of(mesh_of(data=8), "full", micro_batches=n) for n in (1, 4))
    assert parts.activations == whole.activations // 4
    assert parts.state == whole.state
    assert parts.gradients == 2 * whole.gradients  # the sum so far and this one


def test_a_tpu_fills_two_axes_up_to_its_tiles_those_that_cost_least():
    """As the TPU compiler reports L/14's kept queries, keys and values, of 64 and of 128 pairs on a chip."""
    layers, tokens, heads, dim, bfloat16 = 24, 257, 16, 64, 2
    few, many = ((layers, pairs, tokens, 3, heads, dim) for pairs in (64, 128))
    assert array_bytes(few, bfloat16, tiled=True) == layers * 64 * 384 * 3 * heads * dim * bfloat16  # 3.38 GiB
    assert array_bytes(many, bfloat16, tiled=True) == array_bytes(many, bfloat16, tiled=False)
    assert array_bytes((10,), 4, tiled=True) == 40


def test_the_images_of_the_batch_are_held_twice_where_micro_batches_change_their_layout():
    """On a TPU: as they come, and in micro-batches whose pairs are the lanes. Elsewhere a part is a view."""
    pairs, image, text = 1024, 32 * 32 * 3, 4 * SMALL.text.context_length

    def inputs(micro_batches, tiled):
        """The difference to a batch of twice as many micro-batches, for the given number of pairs."""
        once, twice = (memory_of(mesh_of(), "full", n * pairs, n * micro_batches, tiled).working for n in (1, 2))
        return twice - once

    assert inputs(4, tiled=False) == pairs * (image + text)
    assert inputs(4, tiled=True) == pairs * (2 * image + text)  # of 256 pairs each
    assert inputs(32, tiled=True) == pairs * ((1 + 128 // 32) * image + text)  # of 32, filled up to 128


def test_a_width_that_fsdp_does_not_divide_is_told():
    model = clip()  # widths 64 and 48
    # Biases of queries, keys, values and of the MLP have no width.
    biases = 3 * (3 * 64 + 256) + 2 * (3 * 48 + 192)
    assert unsharded_bytes(state_of(model, mesh_of(fsdp=16)), mesh_of(fsdp=16)) == 4 * biases
    mesh = mesh_of(fsdp=32)
    text = sum(leaf.size for leaf in jax.tree.leaves(state_of(model, mesh).params["text"]) if leaf.ndim > 1)
    assert unsharded_bytes(state_of(model, mesh), mesh) == pytest.approx(4 * text, rel=0.05)
