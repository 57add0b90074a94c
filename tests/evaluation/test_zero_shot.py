"""Zero-shot classification: the mean of unit prompts, made unit; a constant model scores chance."""

import numpy as np
import pytest

from clip_jax.commands import main
from clip_jax.errors import UserError
from clip_jax.evaluation import zero_shot

VECTORS = {"a cat": [1, 0, 0], "one cat": [0, 1, 0], "a dog": [0, 0, 1], "one dog": [0, 0, -1 / 2]}


def encode(texts):
    return np.array([VECTORS[text] for text in texts], np.float32)


def test_a_class_is_the_normalized_mean_of_its_prompts():
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


def test_a_constant_model_scores_chance():
    same = np.ones((40, 4), np.float32)
    assert zero_shot.accuracy(same, np.arange(40) % 4, same[:4])["zero_shot_top1"] == 0.25


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
