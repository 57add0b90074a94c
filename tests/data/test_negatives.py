"""Hard negatives are in the caption's own words, not true of its image, and follow from the generator alone."""

import numpy as np
import pytest

from clip_jax.data.negatives import hard_negatives


def every(caption, **options):
    return set(hard_negatives(caption, 100, np.random.default_rng(0), **options))


@pytest.mark.parametrize(
    ("caption", "negative"),
    [
        ("A red circle and a blue square", "A blue circle and a red square"),
        ("a red circle and a blue square", "a red square and a blue circle"),
        ("Small dogs, large cats", "Large dogs, small cats"),
        ("three birds in the sky", "four birds in the sky"),
        ("a cup left of a plate", "a cup right of a plate"),
        ("a picture of a cup left of a plate", "a picture of a plate left of a cup"),
        ("a cup to the left of the small plate, at night", "the small plate to the left of a cup, at night"),
    ],
)
def test_words_of_a_kind_counts_opposites_and_order(caption, negative):
    assert negative in every(caption)


def test_a_caption_without_such_words_has_none_and_nothing_is_true_of_the_image():
    assert every("salt and pepper") == set() == every("a red car and a red bus")
    caption, other = "a red circle and a blue square", "a blue circle and a red square"
    assert caption not in every(caption) and other not in every(caption, avoid=(other,))


def test_the_number_and_the_order_follow_from_the_generator():
    caption = "two red dogs left of a blue cat above a green bird"
    found = [hard_negatives(caption, 3, np.random.default_rng(seed)) for seed in (1, 1, 2)]
    assert found[0] == found[1] != found[2] and len(set(found[0])) == 3
