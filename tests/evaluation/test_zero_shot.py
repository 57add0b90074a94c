"""Zero-shot classification: hand-computed cases, brute force, chance for a constant model."""

import json

import numpy as np
import pytest

from clip_jax.commands import main
from clip_jax.errors import UserError
from clip_jax.evaluation import label_maps, multi_label, runner, zero_shot
from tests.evaluation.test_every_protocol import NAMES, model, task_of

VECTORS = {"a cat": [1, 0, 0], "one cat": [0, 1, 0], "a dog": [0, 0, 1], "one dog": [0, 0, -1 / 2]}


def encode(texts):
    return np.array([VECTORS[text] for text in texts], np.float32)


def unit(*shape, seed=0):
    x = np.random.default_rng(seed).normal(size=shape)
    return (x / np.linalg.norm(x, axis=-1, keepdims=True)).astype(np.float32)


@pytest.mark.parametrize("block", [1, 8192])
def test_a_class_is_the_normalized_mean_of_its_prompts_in_any_blocks(block, monkeypatch):
    monkeypatch.setattr(zero_shot, "PROMPT_BLOCK", block)
    classes = zero_shot.classifier(["cat", "dog"], ["a {}", "one {}"], encode)
    np.testing.assert_allclose(classes, [[0.5**0.5, 0.5**0.5, 0], [0, 0, 1]], rtol=1e-6)


def test_accuracy_by_hand():
    classes = np.eye(3, dtype=np.float32)
    images = np.array([[1, 0, 0], [0.4, 0.5, 0], [0, 0.2, 0.9]], np.float32)
    found = zero_shot.accuracy(images, np.array([0, 0, 2]), classes)
    assert found == {"zero_shot_top1": pytest.approx(2 / 3)}


def test_top_5_exists_where_there_are_more_than_five_classes():
    classes = np.eye(7, dtype=np.float32)
    images = np.array([[7, 6, 5, 4, 3, 2, 1]] * 7, np.float32)
    found = zero_shot.accuracy(images, np.arange(7), classes)
    assert found == {"zero_shot_top1": pytest.approx(1 / 7), "zero_shot_top5": pytest.approx(5 / 7)}


@pytest.mark.parametrize("template", ["a photo", "{} {}", "{c}", "a {} {c}", "{", "{}}", "{0}", 3])
def test_a_template_has_one_place_for_the_class_name_in_recipes_commands_and_calls(template, capsys):
    with pytest.raises(UserError, match=r"write \{\} once, for the class name"):
        zero_shot.classifier(["cat"], [template], lambda prompts: np.ones((1, 2)))
    assert main(["classify", "--model=nowhere", "--image=x", "--labels=a", f"--template={template}"]) == 2
    assert f"--template: {str(template)!r}: write {{}} once" in capsys.readouterr().err


def test_a_template_alone_is_not_taken_for_a_list_of_letters():
    with pytest.raises(UserError, match="give a list"):
        zero_shot.classifier(["cat"], "a {}", lambda prompts: np.ones((1, 2)))


def test_braces_in_the_name_of_a_class_are_characters():
    seen = []
    zero_shot.classifier(["f{x}", "{}"], ["a {}"], lambda prompts: seen.extend(prompts) or np.ones((2, 2)))
    assert seen == ["a f{x}", "a {}"]


@pytest.mark.parametrize(("classes", "expected"), [(4, None), (5, 1.0)])
def test_top_5_is_none_below_five_classes_and_1_of_five(classes, expected):
    images, labels = unit(30, 8), np.arange(30) % classes
    found = zero_shot.scores(zero_shot.judge(images, labels, unit(classes, 8, seed=1)), labels, classes)
    assert found["top5"] == expected


@pytest.mark.parametrize("labels", [np.arange(40) % 4, np.zeros(40, int), np.arange(40) % 3])
def test_a_constant_model_scores_chance_however_the_classes_are_distributed(labels):
    same = np.repeat(unit(1, 65), 40, 0)
    judged = zero_shot.judge(same, labels, same[:4])
    found = zero_shot.scores(judged, labels, 4, at=(1, 3))
    assert found == pytest.approx({"top1": 1 / 4, "top3": 3 / 4, "mean_per_class": 1 / 4})


@pytest.mark.parametrize("block", [7, 2048])
def test_it_equals_a_sort_of_every_row(block, monkeypatch):
    monkeypatch.setattr(zero_shot, "IMAGE_BLOCK", block)
    images, classes = unit(50, 8), unit(9, 8, seed=1)
    labels = np.random.default_rng(2).integers(0, 8, 50)  # the last class never occurs
    order = np.argsort(-(images @ classes.T), axis=1)
    judged = zero_shot.judge(images, labels, classes)
    found = zero_shot.scores(judged, labels, 9)
    assert judged.predicted.tolist() == order[:, 0].tolist()
    assert found["top1"] == np.mean(order[:, 0] == labels)
    assert found["top5"] == np.mean((order[:, :5] == labels[:, None]).any(axis=1))
    per_class = [np.mean(order[labels == c, 0] == c) for c in np.unique(labels)]
    assert found["mean_per_class"] == pytest.approx(np.mean(per_class))


def test_the_order_of_images_and_of_classes_does_not_matter():
    images, classes = unit(50, 8), unit(9, 8, seed=1)
    rng = np.random.default_rng(3)
    labels, image_order, class_order = rng.integers(0, 9, 50), rng.permutation(50), rng.permutation(9)
    shuffled = np.argsort(class_order)[labels[image_order]]
    ours = zero_shot.scores(zero_shot.judge(images, labels, classes), labels, 9)
    other = zero_shot.scores(zero_shot.judge(images[image_order], shuffled, classes[class_order]), shuffled, 9)
    assert ours == pytest.approx(other, abs=1e-12)


def test_a_restricted_label_set_is_restricted_before_the_nearest_is_chosen():
    images, classes = unit(40, 8), unit(9, 8, seed=1)
    only = [7, 2, 5]
    labels = np.array(only)[np.arange(40) % 3]
    judged = zero_shot.judge(images, labels, classes, only=only)
    nearest = np.array(only)[(images @ classes[only].T).argmax(axis=1)]
    assert judged.predicted.tolist() == nearest.tolist() and judged.hits().mean() == np.mean(nearest == labels)
    with pytest.raises(ValueError, match="14 images have no label among the classes"):
        zero_shot.judge(images, labels, classes, only=[2, 5])


def test_a_super_class_is_as_near_as_its_nearest_child():
    images, classes, parents = unit(40, 8), unit(9, 8, seed=1), np.array([0, 1, 2, 0, 1, 2, 0, 0, 2])
    labels = np.arange(40) % 3
    nearness = images @ classes.T
    grouped = np.stack([nearness[:, parents == p].max(axis=1) for p in range(3)], axis=1)
    judged = zero_shot.judge(images, labels, classes, parents=parents)
    assert judged.predicted.tolist() == grouped.argmax(axis=1).tolist()
    assert judged.hits().mean() == np.mean(grouped.argmax(axis=1) == labels)


def test_a_map_to_all_classes_of_the_same_parent_is_the_accuracy_of_super_classes(tmp_path):
    """``--labels`` with a class for each of its siblings: an image is right if its nearest class is one of them."""
    parents, task, subject = np.array([0, 1, 0, 1, 1]), task_of("zero_shot"), model(constant=False)
    siblings = {name: [NAMES[i] for i in np.flatnonzero(parents == p)] for name, p in zip(NAMES, parents, strict=True)}
    (tmp_path / "parents.json").write_text(json.dumps(siblings))
    labels = label_maps.read(str(tmp_path / "parents.json"), None, NAMES, NAMES, len(task.source))
    found = runner.run(task._replace(protocol="labels", labels=labels), [subject])
    embedded = subject.embed(task.source, texts=False)
    classes = subject.classifier(task.prompts)
    judged = zero_shot.judge(embedded.images, parents[embedded.labels], classes, parents=parents)
    assert found.hits["top1"].tolist() == judged.hits().tolist() and 0 < found.metrics["top1"] < 1
    assert found.metrics["top1"] > zero_shot.judge(embedded.images, embedded.labels, classes).hits().mean()


def test_an_image_with_several_labels_is_right_with_any_and_chance_is_their_share():
    """ImageNet's ReaL labels, padded with -1."""
    classes = np.eye(4, dtype=np.float32)
    images = np.array([[3, 2, 1, 0], [0, 3, 2, 1], [1, 0, 2, 3]], np.float32)
    labels = np.array([[1, 0], [3, -1], [3, 2]])
    judged = zero_shot.judge(images, labels, classes)
    assert judged.hits(1).tolist() == [1, 0, 1] and judged.hits(3).tolist() == [1, 1, 1]
    assert zero_shot.scores(judged, None, 4)["mean_per_class"] is None
    same = np.ones((1, 4), np.float32) / 2
    constant = zero_shot.judge(same, np.array([[1, 3]]), np.repeat(same, 4, 0))
    assert constant.hits()[0] == pytest.approx(2 / 4) and constant.all_equal and not judged.all_equal


def test_embeddings_that_are_not_finite_and_labels_that_are_no_class_are_refused():
    images, classes = unit(4, 8), unit(3, 8, seed=1)
    with pytest.raises(ValueError, match="labels are between 0 and 3, the classes are 3"):
        zero_shot.judge(images, np.arange(4), classes)
    images[1, 2] = np.inf
    with pytest.raises(ValueError, match="1 of 4 embeddings are not finite"):
        zero_shot.judge(images, np.zeros(4, int), classes)


def test_average_precision_and_auc_by_hand():
    scores, positive = np.array([0.9, 0.8, 0.7, 0.6]), np.array([True, False, True, False])
    assert multi_label.average_precision(scores, positive) == pytest.approx((1 + 2 / 3) / 2)
    # VOC's 11 points: precision 1 up to recall 0.5, then 2/3.
    assert multi_label.average_precision(scores, positive, points=11) == pytest.approx((6 + 5 * 2 / 3) / 11)
    assert multi_label.roc_auc(scores, positive) == pytest.approx(3 / 4)


def test_a_constant_model_has_chance_and_classes_without_positives_are_left_out():
    images = np.repeat(unit(1, 65), 41, 0)
    scores = multi_label.class_scores(images, images[:3])
    positive = np.zeros((41, 3), bool)
    positive[:10, 0], positive[:, 1] = True, True
    assert multi_label.multi_label(scores, positive) == pytest.approx(
        {"mAP": (10 / 41 + 1) / 2, "roc_auc": 0.5, "classes_left_out": 2}
    )
    scores[3, 0] = np.nan
    with pytest.raises(ValueError, match="not finite"):
        multi_label.multi_label(scores, positive)


def test_multi_label_does_not_depend_on_the_order_of_images():
    rng = np.random.default_rng(0)
    scores, positive = np.round(rng.normal(size=(60, 4)), 1), rng.random((60, 4)) < 0.3
    order = rng.permutation(60)
    expected = multi_label.multi_label(scores, positive)
    assert multi_label.multi_label(scores[order], positive[order]) == pytest.approx(expected, abs=1e-12)


def test_f1_is_the_mean_over_the_classes_that_occur():
    labels, predicted = np.array([0, 0, 0, 1, 1, 2]), np.array([0, 0, 1, 1, 3, 2])
    nothing = np.zeros(6, int)
    found = zero_shot.f1_macro(zero_shot.Judged(predicted, nothing, nothing, nothing + 1, 5), labels)
    assert found == pytest.approx(np.mean([4 / 5, 2 / 4, 2 / 2, 0]))  # class 3 is predicted, class 4 nowhere
