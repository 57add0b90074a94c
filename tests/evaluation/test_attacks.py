"""Words, adversarial pixels and cues: attacks by hand, models that only read or only see textures, a constant model."""

import collections
import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from clip_jax import presets
from clip_jax.data.sources.shapes import open_shapes, variants
from clip_jax.data.sources.shapes.scenes import COMBINATIONS, SEEN
from clip_jax.devices.sharding import make_mesh
from clip_jax.evaluation import adversarial, cues, runner, typographic
from clip_jax.evaluation.embed import Embedded, Variables, make_embedder
from clip_jax.evaluation.prompts import Prompts
from clip_jax.evaluation.subject import Subject, Task
from tests.evaluation.test_embed import Letters
from tests.models.test_clip import SMALL, computed, params_of

SCENES = open_shapes("zero_shot", image_size=32, examples=48)
TASK = Task("t", "typographic", SCENES, Prompts(SCENES.class_names, ("a {}",)))


LABELS: dict[str, np.ndarray] = {}


class Fixed:
    """A model whose answer to every image is given: ``answer(source, index)`` is a class, None an answer for all."""

    name, scale, tokenizer = "fixed", 100.0, ""

    def __init__(self, answer):
        self.answer = answer

    def embed(self, source, texts):
        classes = len(source.class_names)
        answers = [self.answer(source, i) for i in range(len(source))]
        rows = [np.full(classes, classes**-0.5) if a is None else np.eye(classes)[a] for a in answers]
        if source.fingerprint not in LABELS:  # pictures are drawn once
            LABELS[source.fingerprint] = np.array([source[i].label for i in range(len(source))])
        labels = LABELS[source.fingerprint]
        empty = np.zeros((0, classes))
        indices = np.arange(len(source))
        return Embedded(np.array(rows, np.float32), empty, indices[:0], labels, (), indices, collections.Counter())

    def classifier(self, prompts):
        return np.eye(len(prompts.class_names), dtype=np.float32)


def run(task, answer):
    return runner.run(task, [Fixed(answer)]).metrics


def test_a_word_is_painted_inside_the_picture_and_is_that_of_a_wrong_class():
    pixels = np.full((64, 48, 3), 120, np.uint8)
    for size in (*typographic.SIZES, 0.9):
        painted = typographic.paint(pixels, "a very long class name", size, "key")
        changed = (painted != pixels).any(axis=2)
        assert painted.shape == pixels.shape and painted.dtype == np.uint8
        assert changed.any() and not changed[0].any() and not changed[:, -1].any()
    wide = typographic.paint(np.full((64, 200, 3), 120, np.uint8), "word", 0.2, "key")
    assert {0, 255} <= set(wide.ravel().tolist())
    wrong = [typographic.wrong_class(3, 5, str(i)) for i in range(60)]
    assert set(wrong) == {0, 1, 2, 4} and typographic.wrong_class(3, 5, "a") == typographic.wrong_class(3, 5, "a")
    small, large = (
        (SCENES[0].image != typographic.attacked(SCENES, SCENES.class_names, s)[0].image).sum() for s in (0.06, 0.2)
    )
    assert 0 < small < large


def test_a_model_that_reads_is_fooled_and_one_that_looks_is_not():
    def reads(source, i):
        sample = source[i]
        attacked = " typographic" in source.name
        return typographic.wrong_class(sample.label, 24, sample.key) if attacked else sample.label

    found = run(TASK, reads)
    assert (found["clean"], found["mean"], found["fooled"]) == (1, 0, 1)
    found = run(TASK, lambda source, i: source[i].label)
    assert (found["clean"], found["mean"], found["fooled"]) == (1, 1, 0)
    found = run(TASK, lambda source, i: None)
    assert [found[name] for name in ("clean", "mean", "fooled")] == pytest.approx([1 / 24] * 3)


def test_cues_of_a_model_that_sees_the_silhouette_the_filling_or_nothing():
    task = TASK._replace(protocol="cues")
    found = run(task, lambda source, i: i % 64)  # source[i].label, without drawing
    assert (found["shape_bias"], found["outline"], found["gray"]) == (1, 1, 1)

    def sees_texture(source, i):
        conflict = source.what.startswith("conflict")
        color, shape = divmod(i % 64, 8)
        return 8 * color + (cues.NAMES.index(cues.other_shape(i)) if conflict else shape)

    found = run(task, sees_texture)
    assert (found["shape_bias"], found["conflict_texture"], found["normal"]) == (0, 1, 1)
    found = run(task, lambda source, i: None)
    assert found["shape_bias"] == 0.5 and found["outline"] == pytest.approx(1 / 8)
    assert found["conflict_texture"] == pytest.approx(1 / 8)

    def names_a_shape_that_training_had_in_this_color(source, i):
        color, _ = COMBINATIONS[i % 64]
        return COMBINATIONS.index(next(combination for combination in SEEN if combination[0] == color))

    found = run(task, names_a_shape_that_training_had_in_this_color)
    assert found["normal"] == found["gray"] == found["conflict_shape"] == 1 / 8  # of held-out ones alone it were 0


def test_gray_pictures_have_no_color_and_outlines_and_fillings_are_different_pictures():
    scene, _ = SCENES.describe(0)
    gray = cues.redrawn(SCENES, "gray")[0].image
    assert (gray[..., 0] == gray[..., 1]).all() and (gray[..., 0] == gray[..., 2]).all()
    line = variants.outline(scene, 64)
    distance = variants._distance(scene.objects[0], scene.objects[0].radius, 64)
    assert line[distance < -4].min() > 200 and line[abs(distance) < 0.4].max() < 120
    fills = [variants.filled(scene, fill, 1.0, 64) for fill in ("circle", "star")]
    assert not np.array_equal(*fills) and fills[0].shape == (64, 64, 3)
    plain = [variants.filled(scene, fill, 0.0, 64) for fill in ("circle", "star")]
    assert np.array_equal(*plain)
    mask = variants.mask(scene, ("x", f"{scene.objects[0].color} {scene.objects[0].shape}"), 255, 64)
    assert np.array_equal(mask == 1, distance <= 0) and set(np.unique(mask)) == {1, 255}


def test_fgsm_and_pgd_of_a_linear_loss_end_in_the_corner_of_the_ball():
    slope = jnp.asarray(np.random.default_rng(0).normal(size=(4, 4, 3)), jnp.float32)
    pixels = jnp.asarray(np.random.default_rng(1).integers(0, 256, (5, 4, 4, 3)), jnp.uint8)

    def log_probability(x):
        return jnp.sum(x * slope, axis=(1, 2, 3))

    corner = jnp.clip(pixels - 4 * jnp.sign(slope), 0, 255)
    np.testing.assert_array_equal(adversarial.fgsm(log_probability, pixels, 4.0), corner)
    found = adversarial.pgd(log_probability, pixels, 4.0, jnp.arange(5))
    np.testing.assert_allclose(found, corner, atol=1e-4)

    start = adversarial.pgd(lambda x: 0 * jnp.sum(x, axis=(1, 2, 3)), pixels, 4.0, jnp.array([0, 1, 2, 3, 3]))
    moved = np.asarray(start) - np.asarray(pixels, np.float32)
    assert np.abs(moved).max() <= 4 and np.abs(moved).mean() > 1 and (start >= 0).all() and (start <= 255).all()
    inside = ((pixels > 4) & (pixels < 251))[3] & ((pixels > 4) & (pixels < 251))[4]
    np.testing.assert_allclose(moved[3][inside], moved[4][inside], atol=1e-4)
    assert not np.allclose(moved[0], moved[1], atol=0.1)


def test_an_ensemble_whose_models_see_different_pixels_is_not_attacked():
    models = [Fixed(lambda source, i: source[i].label) for _ in range(2)]
    for model, size in zip(models, (32, 64), strict=True):
        model.embedder = types.SimpleNamespace(image_size=size, preprocess=presets.HALF)
    found = runner.run(TASK._replace(protocol="adversarial"), models)
    assert found.metrics == {"mean": None, "clean": 1.0} and found.curves == {}


def subject(batch_size, devices=2):
    mesh = make_mesh(devices, devices=jax.devices()[:devices])
    embedder = make_embedder(computed(SMALL, mesh=mesh), presets.HALF, Letters(), mesh, batch_size, workers=2)
    return Subject("small", embedder, Variables(params_of(computed(SMALL)), {}), 100.0, "")


@pytest.mark.slow
def test_attacks_on_a_model_lower_its_accuracy_and_do_not_depend_on_batches(monkeypatch):
    monkeypatch.setattr(adversarial, "EPSILONS", (8,))
    scenes = open_shapes("zero_shot", image_size=32, examples=26)
    task = Task("a", "adversarial", scenes, Prompts(("red circle", "blue star", *scenes.class_names[2:]), ("a {}",)))
    found = [runner.run(task, [subject(batch)]) for batch in (10, 26)]
    np.testing.assert_allclose(found[0].hits["mean"], found[1].hits["mean"])
    metrics = found[0].metrics
    assert metrics["clean"] > 0 and metrics["pgd"] <= metrics["fgsm"] < metrics["clean"] + 1e-9
    assert metrics["pgd"] < metrics["clean"] and [x for x, _ in found[0].curves["pgd, by radius in 255ths"]] == [0, 8]
