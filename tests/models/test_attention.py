"""cuDNN's attention: the same function as XLA's, and really cuDNN's kernel where a program is for an NVIDIA GPU.

The kernel itself runs on GPUs only. Here its call runs with JAX's other implementation of the same interface.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax._src.cudnn import fused_attention_stablehlo

from clip_jax.config import load, resolve_preset
from clip_jax.errors import UserError
from clip_jax.models.attention import cudnn, xla
from clip_jax.models.clip import CLIP
from clip_jax.planning.memory import saved_bytes
from clip_jax.training import loop
from tests.models.test_clip import SMALL, assert_the_same, batch_of, computed, inputs, params_of
from tests.planning.plans import clip
from tests.training import runs


@pytest.fixture
def any_device(monkeypatch):
    """JAX's own definition of the interface that cuDNN's kernel has."""
    original = jax.nn.dot_product_attention

    def stand_in(*arrays, implementation, **options):
        assert implementation == "cudnn"
        return original(*arrays, implementation="xla", **options)

    monkeypatch.setattr(jax.nn, "dot_product_attention", stand_in)


def loss_and_gradients(attend, causal, tokens):
    """A sum in which every number counts differently, and its gradients."""
    shape = (2, tokens, 2, 8)
    weights, *heads = (jax.random.normal(key, shape) for key in jax.random.split(jax.random.key(0), 4))
    return jax.value_and_grad(lambda *a: jnp.sum(weights * attend(*a, causal=causal)), argnums=(0, 1, 2))(*heads)


@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("tokens", [6, 7])
def test_both_are_one_function_for_even_and_odd_lengths(any_device, causal, tokens):
    value, gradients = loss_and_gradients(cudnn, causal, tokens)
    expected, expected_gradients = loss_and_gradients(xla, causal, tokens)
    assert float(value) == pytest.approx(float(expected), rel=1e-5)
    for gradient, other in zip(gradients, expected_gradients, strict=True):
        np.testing.assert_allclose(gradient, other, atol=1e-5)


@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize(("queries", "keys"), [(5, 8), (8, 5), (7, 7)])
def test_masks_and_lengths_are_those_of_a_softmax_over_visible_keys(any_device, causal, queries, keys):
    """A query that sees no key has the result zero, and finite gradients."""
    shape, rng = (2, 2, 8), np.random.default_rng(0)
    query, key, value = (
        jnp.asarray(rng.normal(size=(shape[0], n, *shape[1:])), jnp.float32) for n in (queries, keys, keys)
    )
    mask = rng.random((2, queries, keys)) < 0.6
    mask[0, 1] = False
    visible = mask & np.tril(np.ones((queries, keys), bool)) if causal else mask

    expected = np.zeros(query.shape)
    for b, q, h in np.ndindex(query.shape[:3]):
        seen = np.flatnonzero(visible[b, q])
        if len(seen):
            logits = np.asarray(key)[b, seen, h] @ np.asarray(query)[b, q, h] / np.sqrt(shape[2])
            weights = np.exp(logits - logits.max())
            expected[b, q, h] = weights / weights.sum() @ np.asarray(value)[b, seen, h]
    for attend in (xla, cudnn):
        found = attend(query, key, value, causal=causal, mask=jnp.asarray(mask))
        np.testing.assert_allclose(found, expected, atol=1e-5)
    gradient = jax.grad(lambda q: jnp.sum(xla(q, key, value, causal=causal, mask=jnp.asarray(mask)) ** 2))(query)
    assert np.isfinite(gradient).all()


@pytest.mark.slow
@pytest.mark.parametrize(
    "remat", ["dots", *(pytest.param(policy, marks=pytest.mark.exhaustive) for policy in ("none", "named", "full"))]
)
def test_a_model_with_it_has_the_same_parameters_embeddings_and_gradients(any_device, remat):
    assert_the_same(CLIP(SMALL), computed(SMALL, remat=remat, attend=cudnn))


@pytest.mark.parametrize(("remat", "forward"), [("none", 1), ("dots", 2), ("full", 2)])
def test_a_program_for_an_nvidia_gpu_calls_the_kernel_in_both_towers(monkeypatch, remat, forward):
    monkeypatch.setattr(fused_attention_stablehlo, "check_cudnn_version", lambda: 91000)
    model = computed(SMALL, dtype=jnp.bfloat16, remat=remat, attend=cudnn)

    def total(params, image, text):
        return jnp.sum(jnp.concatenate(model.forward(params, {}, batch_of(image, text), train=True)[:2]))

    traced = jax.jit(jax.grad(total)).trace(jax.eval_shape(functools.partial(params_of, model)), *inputs())
    program = traced.lower(lowering_platforms=("cuda",)).as_text()
    towers = 2
    assert program.count("@__cudnn$fmhaSoftmax(") == forward * towers
    assert program.count("@__cudnn$fmhaSoftmaxBackward(") == towers


@pytest.mark.slow
def test_the_plan_counts_no_attention_weights_where_the_kernel_keeps_none():
    def of_a_layer(attend):
        few, many = (saved_bytes(clip(attend=attend, layers=n), 1) for n in (3, 4))
        return many - few

    tower, float32, bfloat16 = SMALL.image, 4, 2
    each_query, padded = tower.heads * tower.tokens * float32, tower.tokens * tower.width * bfloat16
    softmax = tower.heads * tower.tokens**2 * (float32 + bfloat16) + 2 * each_query  # and its maxima and sums
    assert of_a_layer(xla) - softmax == of_a_layer(cudnn) - each_query - padded  # an odd length is cut from a copy


def test_it_needs_bfloat16_and_heads_of_a_multiple_of_eight_features(tmp_path):
    recipe = str(runs.write_recipe(tmp_path))
    with pytest.raises(UserError, match=r"model.attention=cudnn has no effect with model.dtype=float32.*bfloat16"):
        load(recipe, {"model.attention": "cudnn"})
    config = load(recipe, {"model.attention": "cudnn", "model.dtype": "bfloat16", "model.text.heads": "8"})
    with pytest.raises(UserError, match=r"text: width=32 and heads=8 make heads of 4 features.*multiples of 8"):
        resolve_preset(config)


def test_a_run_without_an_nvidia_gpu_is_refused_in_one_line(tmp_path):
    overrides = {"model.attention": "cudnn", "model.dtype": "bfloat16"}
    with pytest.raises(UserError, match="attention=cudnn runs on NVIDIA GPUs, and this is a cpu: leave it at auto"):
        loop.run(workdir=str(tmp_path / "run"), recipe=str(runs.write_recipe(tmp_path)), overrides=overrides)
