"""Recall against hand-computed cases, brute force and invariances."""

import numpy as np
import pytest

from clip_jax.evaluation import retrieval


def random(images, texts, dim=6, seed=0):
    rng = np.random.default_rng(seed)
    unit = [x / np.linalg.norm(x, axis=1, keepdims=True) for x in (rng.normal(size=(n, dim)) for n in (images, texts))]
    return unit[0].astype(np.float32), unit[1].astype(np.float32), np.sort(rng.integers(0, images, texts))


def test_a_case_by_hand():
    """Three images on the axes; the second text lies nearer to the first image than to its own."""
    images = np.eye(3, dtype=np.float32)
    texts = np.array([[1, 0, 0], [0.9, 0.5, 0], [0, 0.1, 0.9]], np.float32)
    image_to_text, text_to_image = retrieval.ranks(images, texts, np.arange(3))
    assert image_to_text.tolist() == [0, 0, 0]
    assert text_to_image.tolist() == [0, 1, 0]
    assert retrieval.recall(images, texts, np.arange(3), at=(1, 2)) == {
        "i2t_R@1": 1.0,
        "i2t_R@2": 1.0,
        "t2i_R@1": pytest.approx(2 / 3),
        "t2i_R@2": 1.0,
    }


@pytest.mark.parametrize("block", [3, 1024])
def test_ranks_equal_brute_force_with_several_captions_an_image(block, monkeypatch):
    monkeypatch.setattr(retrieval, "BLOCK", block)
    images, texts, owner = random(20, 50)
    similarity = images @ texts.T
    image_to_text, text_to_image = retrieval.ranks(images, texts, owner)
    for t in range(50):
        assert text_to_image[t] == sum(similarity[i, t] > similarity[owner[t], t] for i in range(20))
    for rank, i in zip(image_to_text, np.unique(owner), strict=True):
        best = max(similarity[i, t] for t in range(50) if owner[t] == i)
        assert rank == sum(similarity[i, t] > best for t in range(50) if owner[t] != i)


def test_a_constant_model_finds_nothing():
    ones = np.ones((10, 4), np.float32) / 2
    assert set(retrieval.recall(ones, ones, np.arange(10), at=(1, 5)).values()) == {0.0}


def test_a_perfect_model_finds_everything():
    images, _, _ = random(8, 8)
    assert set(retrieval.recall(images, images, np.arange(8), at=(1, 5)).values()) == {1.0}


def test_recall_among_so_few_candidates_that_any_model_has_it_is_left_out():
    images, texts, owner = random(4, 8)
    assert set(retrieval.recall(images, texts, owner, at=(1, 4, 5, 8))) == {"i2t_R@1", "i2t_R@4", "i2t_R@5", "t2i_R@1"}
    assert retrieval.recall(images[:1], images[:1], np.arange(1)) == {}


def test_the_order_of_pairs_does_not_matter():
    images, texts, _ = random(30, 30)
    shuffled = np.random.default_rng(1).permutation(30)
    owner = np.arange(30)
    assert retrieval.recall(images, texts, owner) == retrieval.recall(images[shuffled], texts[shuffled], owner)


def test_embeddings_that_are_not_finite_are_refused():
    images, texts, owner = random(4, 4)
    images[2, 1] = np.nan
    with pytest.raises(ValueError, match="not finite"):
        retrieval.ranks(images, texts, owner)
