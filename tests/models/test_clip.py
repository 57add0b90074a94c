"""The towers: sizes as published, initialization as in the released code, the same numbers however they are run."""

import dataclasses
import functools

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from clip_jax import presets
from clip_jax.models import flops
from clip_jax.models.clip import CLIP, Architecture, parameter_counts, unit
from clip_jax.models.compute import REMAT_POLICIES, Compute
from clip_jax.models.text import TextTower
from clip_jax.models.vit import ImageTower

SMALL = Architecture(ImageTower(32, 8, 64, 3, 2, 256), TextTower(12, 100, 48, 2, 2, 192), 40)


@functools.cache
def initializer(clip):
    return jax.jit(lambda key: nn.meta.unbox(clip.init(key)))


def params_of(clip, seed=0):
    """Initial parameters, by one program per model."""
    return initializer(clip)(jax.random.key(seed))


def computed(architecture, **compute):
    """A model with another way to compute it."""
    return CLIP(architecture, Compute(**compute))


def batch_of(*arrays):
    return dict(zip(("image", "text"), arrays, strict=True))


def inputs(batch=4):
    rng = np.random.default_rng(1)
    image = rng.normal(size=(batch, 32, 32, 3)).astype(np.float32)
    return jnp.asarray(image), jnp.asarray(rng.integers(0, 100, (batch, 12)), jnp.int32)


# Millions of parameters (image, text) and forward GFLOPs (image, text): OpenCLIP's model profile.
PUBLISHED = {
    "ViT-B/32": ((87.9, 63.4), (8.82, 5.96)),
    "ViT-B/16": ((86.2, 63.4), (35.13, 5.96)),
    "ViT-L/14": ((304.0, 123.7), (162.03, 13.30)),
}


@pytest.mark.parametrize("name", PUBLISHED)
def test_parameters_and_flops_are_the_published_ones(name):
    architecture = presets.preset(name).architecture
    counts = parameter_counts(jax.eval_shape(CLIP(architecture).init, jax.random.key(0)))
    computed = flops.forward(architecture)
    (image, text), (image_gflops, text_gflops) = PUBLISHED[name]
    assert counts["image"] / 1e6 == pytest.approx(image, abs=0.06)
    assert counts["text"] / 1e6 == pytest.approx(text, abs=0.06)
    assert counts["total"] == counts["image"] + counts["text"] + 1
    assert computed["image"] / 1e9 == pytest.approx(image_gflops, rel=0.015)
    assert computed["text"] / 1e9 == pytest.approx(text_gflops, rel=0.015)


def test_flops_equal_the_compilers_count_of_an_unrolled_model():
    """Forward by tower, and a whole training pair. The compiler counts norms and activations too: 5 % of this width.
    Its attention is a sixth of the model, so that nothing is too small to be missed."""
    shape = {"width": 256, "layers": 2, "heads": 2, "mlp_width": 1024}
    architecture = Architecture(ImageTower(64, 4, **shape), TextTower(256, 100, **shape), 256)
    clip = computed(architecture, scan=False)
    params = nn.meta.unbox(jax.eval_shape(clip.init, jax.random.key(0)))
    image, text = jax.ShapeDtypeStruct((1, 64, 64, 3), jnp.float32), jax.ShapeDtypeStruct((1, 256), jnp.int32)

    def loss(params, image, text):
        outputs = clip.forward(params, {}, batch_of(image, text), train=True)
        return jnp.sum(outputs.image * outputs.text)

    def counted(function, *arguments):
        return jax.jit(function).lower(params, *arguments).cost_analysis()["flops"]

    estimated = flops.forward(architecture)
    assert 0.95 * counted(clip.encode_image, image) < estimated["image"] < counted(clip.encode_image, image)
    assert 0.95 * counted(clip.encode_text, text) < estimated["text"] < counted(clip.encode_text, text)
    assert flops.training(architecture) == pytest.approx(counted(jax.grad(loss), image, text), rel=0.03)


def moments(x):
    return float(np.mean(x)), float(np.std(x)), float(np.max(np.abs(x)))


def test_image_blocks_start_as_pytorch_does_and_text_blocks_as_gpt_2():
    architecture = Architecture(ImageTower(32, 8, 256, 4, 4, 1024), TextTower(16, 1000, 256, 4, 4, 1024), 128)
    params = params_of(CLIP(architecture))
    image, text = (params[tower]["transformer"]["blocks"] for tower in ("image", "text"))

    def is_uniform(x, bound):
        _, deviation, largest = moments(x)
        assert largest <= bound * 1.0001 and largest > 0.98 * bound
        assert deviation == pytest.approx(bound / 3**0.5, rel=0.05)

    def is_normal(x, stddev):
        mean, deviation, largest = moments(x)
        assert deviation == pytest.approx(stddev, rel=0.05) and abs(mean) < 0.1 * stddev and largest > 3 * stddev

    is_uniform(image["attention"]["qkv"], (1.5 / 256) ** 0.5)  # Xavier over the fused 3w x w matrix
    is_uniform(image["attention"]["out"], 256**-0.5)
    is_uniform(image["mlp"]["up"], 256**-0.5)
    is_uniform(image["mlp"]["up_bias"], 256**-0.5)
    is_uniform(image["mlp"]["down"], 1024**-0.5)
    is_uniform(image["mlp"]["down_bias"], 1024**-0.5)
    is_uniform(params["image"]["patch_embedding"], (3 * 8 * 8) ** -0.5)
    is_normal(params["image"]["position_embedding"], 256**-0.5)
    is_normal(params["image"]["projection"], 256**-0.5)

    residual = 256**-0.5 * (2 * 4) ** -0.5
    is_normal(text["attention"]["qkv"], 256**-0.5)
    is_normal(text["attention"]["out"], residual)
    is_normal(text["mlp"]["up"], (2 * 256) ** -0.5)
    is_uniform(text["mlp"]["up_bias"], 256**-0.5)
    is_normal(text["mlp"]["down"], residual)
    is_uniform(text["mlp"]["down_bias"], 1024**-0.5)
    is_normal(params["text"]["token_embedding"], 0.02)
    is_normal(params["text"]["position_embedding"], 0.01)
    is_normal(params["text"]["projection"], 256**-0.5)
    assert float(jnp.exp(params["logit_scale"])) == pytest.approx(1 / 0.07, rel=1e-6)
    for tower in (image, text):
        assert not np.any(tower["attention"]["qkv_bias"]) and not np.any(tower["attention"]["out_bias"])


def test_every_layer_of_a_stack_starts_differently():
    qkv = params_of(CLIP(SMALL))["image"]["transformer"]["blocks"]["attention"]["qkv"]
    assert qkv.shape == (3, 64, 3, 2, 32)
    assert not np.array_equal(qkv[0], qkv[1])


@functools.cache
def value_and_gradients(model: CLIP):
    """A sum over all pairs of embeddings, and its gradients with respect to the initial parameters."""

    def total(params):
        outputs = model.forward(params, {}, batch_of(*inputs()), train=True)
        return jnp.sum(outputs.image @ outputs.text.T)

    return jax.device_get(jax.value_and_grad(total)(params_of(model)))  # one program would round otherwise


def assert_the_same(plain: CLIP, other: CLIP) -> None:
    """Parameter trees, values and gradients of two ways to compute a model."""
    (a, gradients_a), (b, gradients_b) = value_and_gradients(plain), value_and_gradients(other)
    assert jax.tree.map(jnp.shape, gradients_b) == jax.tree.map(jnp.shape, gradients_a)
    assert float(a) == pytest.approx(float(b), rel=1e-5)
    for x, y in zip(jax.tree.leaves(gradients_a), jax.tree.leaves(gradients_b), strict=True):
        assert np.linalg.norm(x - y) <= 1e-5 * np.linalg.norm(x) + 1e-6


@pytest.mark.slow
@pytest.mark.parametrize(
    ("scan", "remat"),
    [(False, "none"), (False, "full"), *((True, remat) for remat in REMAT_POLICIES)],
)
def test_scan_and_remat_change_neither_tree_nor_numbers(scan, remat):
    assert_the_same(CLIP(SMALL), computed(SMALL, scan=scan, remat=remat))


@pytest.mark.slow
def test_bfloat16_compute_keeps_float32_parameters_and_embeddings():
    clip = computed(SMALL, dtype=jnp.bfloat16)
    params = params_of(clip)
    assert {leaf.dtype for leaf in jax.tree.leaves(params)} == {jnp.dtype("float32")}
    outputs = clip.forward(params, {}, batch_of(*inputs()), train=False)
    exact = CLIP(SMALL).forward(params, {}, batch_of(*inputs()), train=False)
    assert outputs.image.dtype == outputs.text.dtype == jnp.float32
    np.testing.assert_allclose(outputs.image, exact.image, atol=0.03)


def test_text_behind_the_end_token_changes_nothing():
    """The tower is causal and pools at the (first) highest token id."""
    clip, (_, text) = CLIP(SMALL), inputs()
    text = text.at[:, 6].set(99).at[:, 7:].set(0)
    changed = text.at[:, 7:].set(5)
    params = params_of(clip)
    np.testing.assert_allclose(clip.encode_text(params, text), clip.encode_text(params, changed), rtol=1e-6)
    np.testing.assert_allclose(clip.encode_text(params, text), clip.encode_text(params, text[:, :7]), atol=1e-5)
    earlier = clip.encode_text(params, text.at[:, 2].set(7))
    assert not np.allclose(clip.encode_text(params, text), earlier, atol=1e-3)


def test_patches_are_what_a_convolution_sees():
    clip, (image, _) = CLIP(SMALL), inputs(2)
    kernel = params_of(clip)["image"]["patch_embedding"].reshape(8, 8, 3, 64)
    convolved = jax.lax.conv_general_dilated(image, kernel, (8, 8), "VALID", dimension_numbers=("NHWC", "HWIO", "NHWC"))
    patches = image.reshape(2, 4, 8, 4, 8, 3).transpose(0, 1, 3, 2, 4, 5).reshape(2, 16, -1)
    np.testing.assert_allclose(patches @ kernel.reshape(-1, 64), convolved.reshape(2, 16, 64), rtol=1e-4, atol=1e-5)


def test_quickgelu_is_an_architecture_of_its_own():
    exact, quick = presets.preset("ViT-B-32"), presets.preset("ViT-B/32-quickgelu")
    assert (exact.architecture.image.activation, quick.architecture.image.activation) == ("gelu", "quick_gelu")
    assert dataclasses.replace(quick.architecture.image, activation="gelu") == exact.architecture.image


def test_embeddings_are_of_unit_length():
    clip = CLIP(SMALL)
    for embedding in clip.forward(params_of(clip), {}, batch_of(*inputs()), train=False)[:2]:
        np.testing.assert_allclose(np.linalg.norm(embedding, axis=1), 1, rtol=1e-6)
    assert float(jnp.linalg.norm(unit(jnp.array([3.0, 4.0])))) == pytest.approx(1)
