"""Maps of patches against the formula in NumPy; intersection over union by hand."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from clip_jax.commands import evaluate, main
from clip_jax.data.sources.shapes import open_shapes
from clip_jax.errors import UserError
from clip_jax.evaluation import dense, runner
from clip_jax.evaluation.masks import IGNORE, MaskedScenes
from clip_jax.models.resnet import ResNetTower
from clip_jax.reports import maps
from tests.data.shards import jpeg
from tests.evaluation.test_every_protocol import model, task_of
from tests.models.test_clip import SMALL, computed, inputs, params_of


def norm(x, own):
    x = np.asarray(x, np.float64)
    mean, variance = x.mean(axis=-1, keepdims=True), x.var(axis=-1, keepdims=True)
    return (x - mean) / np.sqrt(variance + 1e-5) * np.asarray(own["scale"]) + np.asarray(own["bias"])


def test_a_patch_goes_through_the_values_and_the_mlp_of_the_last_block():
    model = computed(SMALL)
    params, (pixels, _) = params_of(model), inputs(2)
    found = dense.patch_embeddings(model, params, pixels)
    x = np.asarray(model.image_tokens(params, pixels, -2), np.float64)[:, 1:]
    block = jax.tree.map(lambda leaf: np.asarray(leaf[-1], np.float64), params["image"]["transformer"]["blocks"])
    attention, mlp = block["attention"], block["mlp"]
    value = np.einsum("btw,whd->bthd", norm(x, block["norm_1"]), attention["qkv"][:, 2]) + attention["qkv_bias"][2]
    x = x + np.einsum("bthd,hdw->btw", value, attention["out"]) + attention["out_bias"]
    hidden = norm(x, block["norm_2"]) @ mlp["up"] + mlp["up_bias"]
    x = x + np.asarray(jax.nn.gelu(hidden, approximate=False)) @ mlp["down"] + mlp["down_bias"]
    x = norm(x, params["image"]["norm_post"]) @ np.asarray(params["image"]["projection"])
    expected = (x / np.linalg.norm(x, axis=-1, keepdims=True)).reshape(2, 4, 4, -1)
    np.testing.assert_allclose(found, expected, atol=2e-5)


@pytest.mark.parametrize(
    "changed",
    [{"layers": 1}, pytest.param({"pooling": "attention", "norm_before_pooling": True}, marks=pytest.mark.slow)],
)
def test_every_pooling_has_a_unit_vector_for_each_patch_that_follows_the_patch(changed):
    image = dataclasses.replace(SMALL.image, class_token="pooling" not in changed, **changed)
    model = computed(dataclasses.replace(SMALL, image=image))
    params, (pixels, _) = params_of(model), inputs(1)
    found = np.asarray(dense.patch_embeddings(model, params, pixels))
    assert found.shape == (1, 4, 4, 40) and np.allclose(np.linalg.norm(found, axis=-1), 1, atol=1e-5)
    moved = np.asarray(dense.patch_embeddings(model, params, pixels.at[:, :8, 24:].add(2.0)))
    change = np.abs(moved - found).max(axis=-1)[0]
    assert change.argmax() == 3 and change[0, 3] > 1e-3


def test_a_resnet_has_no_such_maps():
    tower = ResNetTower(image_size=32, stages=(1, 1, 1, 1), width=8, heads=4)
    model = computed(dataclasses.replace(SMALL, image=tower))
    with pytest.raises(UserError, match="ResNet"):
        dense.patch_embeddings(model, {"image": {}}, np.zeros((1, 32, 32, 3), np.float32))


def test_mean_iou_by_hand():
    mask = np.array([[0, 0, 1, IGNORE], [0, 2, 1, 1]])
    maps = np.eye(4)[[[0, 1, 1, 1], [0, 0, 1, 0]]]
    mean, each = dense.mean_iou(dense.confusion(maps, mask))
    assert each == [2 / 5, 2 / 4, 0.0, None] and mean == pytest.approx((2 / 5 + 2 / 4) / 3)
    assert dense.mean_iou(np.zeros((2, 2), int)) == (None, [None, None])
    with pytest.raises(ValueError, match="class 2; there are 2"):
        dense.confusion(maps[..., :2], mask)


def test_a_pixel_that_is_equally_near_to_several_classes_is_a_share_of_each():
    maps = np.array([[[0.5, 0.5, 0.1], [0.5, 0.5 + 5e-7, 0.5], [0.2, 0.1, 0.4]]])
    counts = dense.confusion(maps, np.array([[0, 1, 1]]))
    np.testing.assert_allclose(counts, [[1 / 2, 1 / 2, 0], [1 / 3, 1 / 3, 1 / 3 + 1], [0, 0, 0]])


def test_patches_that_are_not_finite_are_refused_in_an_evaluation_and_in_segment(tmp_path, monkeypatch, capsys):
    (tmp_path / "a.jpg").write_bytes(jpeg(1))
    subject = model(constant=True)
    monkeypatch.setattr(evaluate, "open_subject", lambda *arguments, **options: subject)
    monkeypatch.setattr(dense, "patch_embeddings", lambda *_: jnp.full((1, 4, 4, 8), 0.3).at[0, 1, 2].set(jnp.nan))
    message = "constant on an image: patches: 1 of 16 embeddings are not finite; the model is broken"
    with pytest.raises(UserError, match=message):
        runner.run(task_of("dense"), [subject])
    arguments = ["--model=x", "--labels=a cat,a dog", f"--image={tmp_path / 'a.jpg'}", f"--output={tmp_path / 'out'}"]
    assert main(["segment", *arguments]) == 2
    error = capsys.readouterr().err
    assert message in error and error.count("\n") == 1 and not list((tmp_path / "out").iterdir())


def test_masks_of_the_scenes_are_their_objects_and_maps_are_drawn():
    scenes = MaskedScenes(open_shapes("heldout", image_size=64, examples=12))
    for i in range(12):
        mask, objects = scenes.mask(i), scenes.source.describe(i)[0].objects
        names = {scenes.class_names[c] for c in np.unique(mask[mask != IGNORE])}
        assert names == {f"{each.color} {each.shape}" for each in objects} and (mask == IGNORE).mean() > 0.3
    cosines = np.stack([scenes.mask(0) == c for c in np.unique(scenes.mask(0))], axis=-1).astype(float)
    sheet = maps.draw(scenes[0].image, cosines, ["a very long label indeed"] * cosines.shape[-1])
    assert sheet.width > 3 * 64 and np.asarray(sheet).std() > 10
    assert np.allclose(dense.upsample(np.full((2, 3, 1), 0.5), 8, 9), 0.5)
