"""Distillation: several teachers, embeddings, and stored teachers, against their definitions."""

import shutil

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import clip_jax
from clip_jax import commands, presets
from clip_jax.data import reinforced
from clip_jax.data.sources import open_source
from clip_jax.data.stream import read
from clip_jax.devices.sharding import make_mesh
from clip_jax.errors import UserError
from clip_jax.models.clip import CLIP
from clip_jax.objectives import distillation
from clip_jax.training import loop
from tests.losses import cases
from tests.models.test_clip import SMALL
from tests.training import runs

PAIRS, WIDTHS = 16, (SMALL.embed_dim, 24)


def objective(**settings):
    settings = distillation.SPEC.defaults | settings
    return distillation._objective(lambda rows: [], WIDTHS, 0, settings, CLIP(SMALL))


def embeddings():
    image, text = cases.embeddings(PAIRS, SMALL.embed_dim, 0.4)
    found = {"image": image, "text": text}
    for number, width in enumerate(WIDTHS):
        teacher_image, teacher_text = cases.embeddings(PAIRS, width, 0.6 + 0.1 * number)
        found |= {f"teacher_image_{number}": 20 * teacher_image, f"teacher_text_{number}": teacher_text}
    return found


def loss(made, params, rows):
    mesh = make_mesh(1, devices=jax.devices()[:1])
    return jax.jit(lambda params, rows: made.across(params, rows, {}, mesh)[0])(params, rows)


def test_of_several_teachers_the_target_is_the_mean_of_their_probabilities():
    """MobileCLIP averages after the softmax; the cross-entropy is linear in its target."""
    rows, scale = embeddings(), 14.0
    student = scale * rows["image"] @ rows["text"].T
    teachers = [rows[f"teacher_image_{k}"] @ rows[f"teacher_text_{k}"].T for k in range(2)]
    expected = 0
    for axis in (0, 1):
        target = np.mean([jax.nn.softmax(logits, axis=axis) for logits in teachers], axis=0)
        expected += -np.sum(target * jax.nn.log_softmax(student, axis=axis)) / PAIRS / 2
    params = {"logit_scale": jnp.log(jnp.float32(scale))}
    assert float(loss(objective(), params, rows)) == pytest.approx(float(expected), rel=1e-5)


@pytest.mark.parametrize("name", ["cosine", "mse"])
def test_embeddings_of_another_width_are_compared_after_a_projection(name):
    made, rows = objective(logits=0.0, features=3.0, feature_loss=name), embeddings()
    own = jax.tree.map(lambda box: box.value, made.init(jax.random.key(0)), is_leaf=lambda x: hasattr(x, "value"))
    assert sorted(own) == ["image_1", "text_1"]
    expected = 0
    for side in ("image", "text"):
        for number in range(2):
            ours, theirs = rows[side], rows[f"teacher_{side}_{number}"]
            theirs = theirs / np.linalg.norm(theirs, axis=1, keepdims=True)
            if number == 1:
                ours = ours @ own[f"{side}_1"]["projection"]
            if name == "cosine":
                cosine = np.sum(ours * theirs, axis=1) / np.linalg.norm(ours, axis=1)
                expected += 3 * np.mean(1 - cosine) / 4
            else:
                expected += 3 * np.mean(np.sum((ours - theirs) ** 2, axis=1)) / 4
    params = {"logit_scale": jnp.zeros(()), "objectives": {"distillation": own}}
    assert float(loss(made, params, rows)) == pytest.approx(float(expected), rel=1e-5)
    same = rows | {f"teacher_{side}_0": rows[side] for side in ("image", "text")}
    gradient = jax.grad(lambda rows: distillation.feature_loss(name, rows["image"], same["teacher_image_0"]))(same)
    assert np.abs(gradient["image"]).max() < 1e-6


def written(small_run, tmp_path, *more):
    data, out = f"tar:{small_run.parent / 'train'}", tmp_path / "reinforced"
    arguments = [f"--data={data}", f"--output={out}", "--views=3", "--captions=2", "--shard-size=20", "--batch-size=16"]
    arguments += [f"--teacher={small_run}", "--crop-scale=0.5,1", *more]
    assert commands.main(["reinforce", *arguments]) == 0
    return data, out


@pytest.mark.slow
def test_stored_embeddings_are_those_of_the_crops_that_training_takes(small_run, tmp_path, capsys):
    data, out = written(small_run, tmp_path)
    before = {path.name: path.read_bytes() for path in out.iterdir()}
    (out / "text_1.npy").unlink()
    with pytest.raises(UserError, match="shard 1 of 3 is missing"):
        reinforced.open_store(str(out))
    capsys.readouterr()
    written(small_run, tmp_path)
    assert capsys.readouterr().out.splitlines()[0] == "shard 0: done before"
    assert {path.name: path.read_bytes() for path in out.iterdir()} == before
    assert commands.main(["reinforce", f"--data={data}", f"--output={out}", f"--teacher={small_run}"]) == 2
    assert "begun with another" in capsys.readouterr().err

    teacher, store, source = clip_jax.load(small_run), reinforced.open_store(str(out)), open_source(data)
    assert store.teachers == [(teacher.embed_dim, pytest.approx(teacher.scale))]
    size = teacher.image_size
    made = reinforced.views(
        store, image_size=size, context_length=32, tokenizer=teacher.tokenizer, interpolation="bicubic"
    )
    index = 23
    sample = read(source, index)._replace(index=index)
    seen = set()
    for seed in range(20):
        arrays = {"image": np.zeros((size, size, 3), np.uint8), "text": np.zeros(32, np.int32)}
        arrays |= {f"teacher_{side}": np.zeros(teacher.embed_dim, np.float16) for side in ("image", "text")}
        for view in made.values():
            view.fill(sample, np.random.default_rng(seed), arrays)
        image, text = (arrays[f"teacher_{side}"].astype(np.float32) for side in ("image", "text"))
        np.testing.assert_allclose(teacher.encode_image(arrays["image"])[0], image, atol=2e-3)
        np.testing.assert_allclose(teacher.encode_tokens(arrays["text"][None])[0], text, atol=2e-3)
        seen.add(arrays["image"].tobytes())
    assert len(seen) == 3


@pytest.mark.slow
def test_a_student_of_another_size_learns_from_stored_embeddings_of_its_own_data_alone(small_run, tmp_path):
    _, out = written(small_run, tmp_path)
    student = {
        "objectives.distillation.weight": "1",
        "objectives.distillation.stored": str(out),
        "objectives.distillation.features": "1",
        "model.image.image_size": "48",
        "model.embed_dim": "16",
        "steps": "4",
    }
    recipe = str(small_run.parent / "recipe.py")
    assert loop.run(workdir=str(tmp_path / "run"), recipe=recipe, overrides=student) == 0
    lines = [line for line in runs.metrics(tmp_path / "run") if "train/loss" in line]
    assert len(lines) == 4 and all(line["train/distillation/loss"] > 0 for line in lines)
    other = shutil.copytree(small_run.parent / "held_out", tmp_path / "other")
    with pytest.raises(UserError, match="stored: written for other data than"):
        loop.run(workdir=str(tmp_path / "two"), recipe=recipe, overrides=student | {"data.train": f"tar:{other}"})


def test_a_teacher_is_in_the_step_or_stored_and_each_has_a_name_and_weights(tmp_path):
    for settings, message in (
        ({"stored": "x", "teacher": "ViT-B/32"}, "not both"),
        ({"stored": str(tmp_path)}, "no reinforce.json"),
        ({"teacher": "ViT-B/32,ViT-B/16", "teacher_weights": "a"}, "as many of each"),
    ):
        with pytest.raises(UserError, match=message):
            distillation.make(distillation.SPEC.defaults | settings, CLIP(SMALL), presets.HALF, None)
