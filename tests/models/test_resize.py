"""Position embeddings at other sizes: properties of the resampling weights, and the leaves that change."""

import dataclasses

import flax.linen as nn
import jax
import numpy as np
import pytest

from clip_jax import presets
from clip_jax.interop import table
from clip_jax.interop.merge import merge
from clip_jax.models.clip import CLIP, Architecture
from clip_jax.models.resize import bicubic, linear, resize_positions
from clip_jax.models.resnet import ResNetTower
from clip_jax.models.text import TextTower
from clip_jax.models.vit import ImageTower

TEXT = TextTower(12, 100, 16, 1, 1, 16)
CLASS_TOKEN, NO_CLASS_TOKEN = ImageTower(32, 8, 16, 1, 1, 16), presets.siglip_image(32, 8, 16, 1, 1, 16, "gelu")
RESNET = ResNetTower(64, (1, 1, 1, 1), 2, 1)


def shapes(architecture):
    return nn.meta.unbox(jax.eval_shape(CLIP(architecture).init, jax.random.key(0)))


@pytest.mark.parametrize(("image", "path"), [
    (CLASS_TOKEN, "image/position_embedding"),
    (NO_CLASS_TOKEN, "image/position_embedding"),
    (RESNET, "image/attention_pooling/spatial_embedding"),
])  # fmt: skip
@pytest.mark.parametrize("patches", [7, 3])
def test_a_model_at_another_size_differs_in_its_position_embeddings_alone(image, path, patches):
    architecture = Architecture(image, TEXT, 16)
    other = Architecture(
        dataclasses.replace(image, image_size=patches * image.patch_size),
        dataclasses.replace(TEXT, context_length=7),
        16,
    )
    params = jax.tree.map(lambda leaf: np.ones(leaf.shape, np.float32), shapes(architecture))
    params, report = merge(shapes(other), params)
    assert set(report.resized) == {path, "text/position_embedding"} and not report.initialized
    assert jax.tree.map(np.shape, params) == jax.tree.map(np.shape, shapes(other))
    for leaf in jax.tree.leaves(params):  # resampling keeps a constant
        np.testing.assert_allclose(leaf, 1, rtol=1e-5)
    assert table.parameter_shapes(other)[path][0] == patches**2 + (image is not NO_CLASS_TOKEN)


@pytest.mark.parametrize(("old", "new"), [(7, 12), (14, 9), (5, 5), (16, 1)])
def test_resampling_keeps_constants_and_its_own_size(old, new):
    for weights in (bicubic(old, new), linear(old, new)):
        np.testing.assert_allclose(weights.sum(axis=1), 1, rtol=1e-6)
        if old == new:
            np.testing.assert_allclose(weights, np.eye(old), atol=1e-6)


def test_resizing_keeps_a_constant_and_a_linear_ramp():
    ramp = np.linspace(0, 1, 8, dtype=np.float32)
    grid = np.stack(np.meshgrid(ramp, ramp, indexing="ij"), axis=-1).reshape(64, 2)
    resized = resize_positions(np.concatenate([np.full((1, 2), 9, np.float32), grid]), 257, image=True)
    np.testing.assert_array_equal(resized[0], 9)
    middle = resized[1:].reshape(16, 16, 2)[4:-4, 4:-4]  # The edges bend.
    np.testing.assert_allclose(np.diff(middle[:, :, 0], axis=0), 1 / 14, atol=1e-4)
    np.testing.assert_allclose(np.diff(middle[:, :, 1], axis=1), 1 / 14, atol=1e-4)
    np.testing.assert_allclose(resize_positions(grid, 16, image=True).reshape(4, 4, 2)[:, 0, 1], 0.07, atol=0.08)
