"""The kernel for TPUs, interpreted: the definition's values and gradients, on any mesh, and where it is taken."""

from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AbstractDevice, AbstractMesh

from clip_jax.config import load, resolve_preset
from clip_jax.devices.sharding import AXES, make_mesh
from clip_jax.errors import UserError
from clip_jax.models import attention_tpu
from clip_jax.models.attention import cudnn, xla
from clip_jax.models.attention_choice import choose_attention
from clip_jax.models.attention_tpu import TPUAttention
from clip_jax.models.clip import CLIP
from clip_jax.planning.cycles import pallas_calls
from clip_jax.training.setup import make_model
from tests.models.test_clip import SMALL, computed, value_and_gradients
from tests.training import runs

KERNEL = TPUAttention(interpret=True)


def arrays(batch, queries, keys, heads, dim, dtype=jnp.float32):
    """Queries, keys, values, and the weights of a sum in which every number counts differently."""
    sizes = (queries, keys, keys, queries)
    rngs = jax.random.split(jax.random.key(0), 4)
    return [jax.random.normal(r, (batch, n, heads, dim), dtype) for r, n in zip(rngs, sizes, strict=True)]


def results(attend, query, key, value, weights, **options):
    """Values, and the gradients with respect to queries, keys and values."""
    mixed, backward = jax.vjp(lambda *a: attend(*a, **options), query, key, value)
    return mixed, *backward(weights)


def assert_equal(attend, given, atol=2e-5, **options):
    for found, expected in zip(
        jax.jit(lambda *a: results(attend, *a, **options))(*given), results(xla, *given, **options), strict=True
    ):
        assert found.dtype == expected.dtype and found.shape == expected.shape
        np.testing.assert_allclose(np.float32(found), np.float32(expected), atol=atol)


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize(
    ("queries", "keys", "heads", "dim"),
    [
        *((16, 16, 2, 64), (77, 77, 3, 64), (129, 129, 1, 72), (5, 140, 2, 32), (140, 5, 1, 128), (9, 9, 2, 8)),
        *((20, 20, 16, 72), (5, 140, 8, 80), (20, 20, 4, 96)),  # groups of heads that fill whole columns
    ],
)
def test_values_and_gradients_are_those_of_the_definition(causal, queries, keys, heads, dim):
    assert_equal(KERNEL, arrays(2, queries, keys, heads, dim), causal=causal)


def test_heads_are_padded_only_where_no_group_of_them_fills_whole_columns_and_the_fast_memory():
    def width(attend, heads, dim, tokens=64):
        (call,) = pallas_calls(jax.make_jaxpr(attend)(*arrays(1, tokens, tokens, heads, dim)[:3]))
        return call.invars[0].aval.shape[-1]

    assert [width(KERNEL, *case) for case in ((16, 72), (8, 80), (3, 128))] == [1152, 640, 384]
    assert [width(KERNEL, *case) for case in ((8, 72), (16, 70), (3, 64))] == [8 * 128, 16 * 128, 4 * 64]
    assert width(KERNEL, 16, 72, tokens=1000) == 16 * 128
    assert width(replace(KERNEL, vmem=2**30), 16, 72, tokens=1000) == 1152


@pytest.mark.slow
def test_long_sequences_are_computed_in_tiles_of_queries(monkeypatch):
    monkeypatch.setattr(attention_tpu, "QUERY_TILE", 128)
    assert_equal(KERNEL, arrays(1, 300, 300, 2, 64), causal=True)
    assert_equal(KERNEL, arrays(1, 150, 150, 4, 96), causal=True)


@pytest.mark.parametrize(("heads", "dim"), [(2, 64), (4, 96)])
def test_bfloat16_is_as_exact_as_xla(heads, dim):
    given = arrays(2, 50, 50, heads, dim, jnp.bfloat16)
    exact = results(xla, *(x.astype(jnp.float32) for x in given))
    for found, other, true in zip(results(KERNEL, *given), results(xla, *given), exact, strict=True):
        assert found.dtype == jnp.bfloat16
        error, usual = (np.abs(np.float32(x) - true).max() for x in (found, other))
        assert error < 2 * usual


@pytest.mark.parametrize(
    ("causal", "shared"),
    [(True, False), *(pytest.param(*case, marks=pytest.mark.slow) for case in ((False, False), (True, True)))],
)
def test_a_query_that_sees_no_key_is_zero_and_has_finite_gradients(causal, shared):
    mask = np.random.default_rng(0).random((1 if shared else 3, 20, 33)) < 0.4
    mask[0, 3] = False
    given = arrays(3, 20, 33, 2, 64)
    assert_equal(KERNEL, given, causal=causal, mask=jnp.asarray(mask))
    found = results(KERNEL, *given, causal=causal, mask=jnp.asarray(mask))
    assert not np.any(found[0][0, 3]) and not np.any(found[1][0, 3])
    assert_equal(KERNEL, given, causal=causal, mask=jnp.asarray(mask[:, :1]))  # one row for all queries
    assert_equal(KERNEL, arrays(3, 20, 33, 4, 96), causal=causal, mask=jnp.asarray(mask))


def test_no_array_of_scores_leaves_the_kernel():
    given = arrays(2, 100, 100, 4, 64)
    program = jax.make_jaxpr(lambda *a: results(TPUAttention(), *a))(*given)
    assert str(program).count("pallas_call[") == 2  # one forward, one backward
    outside = [variable.aval.shape[-2:] for equation in program.eqns for variable in equation.outvars]
    assert not {(100, 100), (128, 128)} & set(outside)


@pytest.mark.parametrize("sizes", [(2, 1, 1), (1, 2, 2), (2, 1, 2)])
def test_batch_and_heads_are_split_over_the_mesh(sizes):
    mesh = make_mesh(*sizes, devices=jax.devices()[: int(np.prod(sizes))])
    split = TPUAttention(mesh, interpret=True)
    assert_equal(split, arrays(4, 20, 20, 4, 64), causal=True)
    assert_equal(split, arrays(4, 20, 20, 4, 64), mask=jnp.ones((1, 20, 20), bool).at[:, :, 3].set(False))


WITH_IT = [
    ("dots", True),
    *(pytest.param(*case, marks=pytest.mark.exhaustive) for case in (("none", False), ("full", True))),
]


@pytest.mark.slow
@pytest.mark.every_jax
@pytest.mark.parametrize(("remat", "scan"), WITH_IT)
def test_a_model_with_it_has_the_same_parameters_embeddings_and_gradients(remat, scan):
    expected, expected_gradients = value_and_gradients(CLIP(SMALL))
    found, gradients = value_and_gradients(computed(SMALL, remat=remat, scan=scan, attend=KERNEL))
    # Sums in another order; the value is a small difference of large terms.
    assert float(found) == pytest.approx(float(expected), abs=1e-5)
    for gradient, other in zip(jax.tree.leaves(gradients), jax.tree.leaves(expected_gradients), strict=True):
        np.testing.assert_allclose(gradient, other, atol=1e-5 * max(1.0, float(np.abs(other).max())))


def described(platform, tensor=1):
    device = AbstractDevice("", None, platform)
    return AbstractMesh((1, 1, tensor), AXES, abstract_device=device)


CHOICES = [
    ("tpu", "auto", jnp.bfloat16, 1, "tpu", "auto, on tpu"),
    ("tpu", "auto", jnp.float32, 2, "tpu", "auto, on tpu"),
    ("tpu", "auto", jnp.bfloat16, 64, "xla", "auto, mesh.tensor=64 does not divide 2 heads"),
    ("tpu", "tpu", jnp.float32, 1, "tpu", "as set"),
    ("tpu", "xla", jnp.bfloat16, 1, "xla", "as set"),
    ("gpu", "auto", jnp.bfloat16, 1, "cudnn", "auto, on gpu"),
    ("gpu", "auto", jnp.float32, 1, "xla", "cudnn needs model.dtype=bfloat16"),
    ("cpu", "auto", jnp.bfloat16, 1, "xla", "auto, on cpu"),
]


@pytest.mark.parametrize(("platform", "setting", "dtype", "tensor", "taken", "why"), CHOICES)
def test_auto_takes_the_kernel_of_the_meshs_platform(platform, setting, dtype, tensor, taken, why):
    choice = choose_attention(setting, dtype, SMALL, described(platform, tensor))
    assert choice.name == taken and why in choice.reason


def test_auto_stays_auto_in_the_config_and_xla_stays_xla(tmp_path):
    recipe = str(runs.write_recipe(tmp_path))
    config = load(recipe, {})
    mesh, preset = described("tpu"), resolve_preset(config)
    assert make_model(config, preset, mesh).compute.attend == TPUAttention(mesh)
    assert config.model.attention == "auto"
    config = load(recipe, {"model.attention": "xla"})
    assert make_model(config, preset, mesh).compute.attend is xla
    config = load(recipe, {"model.attention": "auto", "model.dtype": "bfloat16"})
    gpu = described("gpu")
    assert make_model(config, preset, gpu).compute.attend in (cudnn, xla)


def test_a_tower_that_is_too_long_for_the_kernel_takes_xla_and_says_so():
    long = replace(SMALL, text=replace(SMALL.text, context_length=2000))
    choice = choose_attention("auto", jnp.bfloat16, long, described("tpu"))
    assert str(choice) == "xla (auto, the TPU kernel takes at most 1,152 tokens, not 2,000)"


def test_heads_that_the_mesh_does_not_divide_are_one_line():
    with pytest.raises(UserError, match=r"mesh\.tensor=64 does not divide 2 heads"):
        choose_attention("tpu", jnp.bfloat16, SMALL, described("tpu", 64))
