"""Retrieval against hand-computed cases, brute force over all orders of ties, and invariances."""

import itertools

import jax
import numpy as np
import pytest

from clip_jax.devices.sharding import make_mesh
from clip_jax.evaluation import ranking
from clip_jax.evaluation.retrieval import rank_both, retrieval


def unit(x):
    return (x / np.linalg.norm(x, axis=1, keepdims=True)).astype(np.float32)


def random(images, texts, dim=6, seed=0):
    """Unit embeddings, and an image for each text; some images have several, some have none."""
    rng = np.random.default_rng(seed)
    return unit(rng.normal(size=(images, dim))), unit(rng.normal(size=(texts, dim))), rng.integers(0, images, texts)


def brute_force(similarity, positive, at, ties):
    """The metrics of one direction by sorting every row, in every order of the candidates where ties are expected."""
    candidates = similarity.shape[1]
    found = {f"R@{k}": [] for k in at if k < candidates} | {"rank": [], "AP": []}
    for row, right in zip(np.round(similarity, 5), positive, strict=True):
        if not right.any():
            continue
        if ties == "expected":
            orders = [list(order) for order in itertools.permutations(range(candidates))]
        else:  # equal candidates: wrong ones first, or right ones
            orders = [sorted(range(candidates), key=lambda c: right[c] == (ties == "pessimistic"))]
        rows = {name: [] for name in found}
        for order in orders:
            ranked = sorted(order, key=lambda c: -row[c])
            hits = right[ranked]
            first = int(np.argmax(hits))
            rows["rank"].append(1 + int((~hits[:first]).sum()))
            rows["AP"].append(np.mean(np.cumsum(hits)[hits] / (np.flatnonzero(hits) + 1)))
            for name in rows.keys() - {"rank", "AP"}:
                rows[name].append(hits[: int(name[2:])].any())
        for name, values in rows.items():
            found[name].append(np.mean(values))
    ranks, precision = found.pop("rank"), found.pop("AP")
    return {name: np.mean(values) for name, values in found.items()} | {
        "mean_rank": np.mean(ranks),
        "median_rank": np.median(ranks),
        "mAP": np.mean(precision),
    }


def both_by_brute_force(images, texts, owner, at=(1, 5, 10), ties="pessimistic"):
    similarity = images.astype(np.float64) @ texts.T.astype(np.float64)
    positive = owner[None, :] == np.arange(len(images))[:, None]
    i2t = brute_force(similarity, positive, at, ties)
    t2i = brute_force(similarity.T, positive.T, at, ties)
    return {f"i2t_{k}": v for k, v in i2t.items()} | {f"t2i_{k}": v for k, v in t2i.items()}


def test_big_visions_hand_computed_cases():
    """Distances of 4 images (rows) to 8 texts, two for each image, and the recall of the second case by hand.

    From big_vision's image_text_retrieval_test.py (Apache 2.0). In the last column two images are equally far.
    """
    rows = (
        ("0.8 0.8 0.1 0.5 0.1 0.2 0.5 0.1", "0.8 0.8 0.1 0.5 0.1 0.2 0.1 0.1"),
        ("0.5 0.4 0.0 0.0 0.4 0.2 0.6 0.4",) * 2,
        ("0.5 0.4 0.1 0.5 0.0 0.8 0.8 0.3",) * 2,
        ("0.5 0.4 0.1 0.5 0.4 0.2 0.3 0.3",) * 2,
    )
    for case, name, expected in ((0, "i2t", {"R@1": 0.5, "R@5": 0.75}), (1, "t2i", {"R@1": 0.375})):
        distance = np.array([row[case].split() for row in rows], float)
        texts = 0.4 * (1 - distance).T  # the cosines with four unit vectors; a fifth feature makes the length 1
        texts = np.concatenate([texts, np.sqrt(1 - np.sum(texts**2, axis=1, keepdims=True))], axis=1)
        found = retrieval(np.eye(4, 5, dtype=np.float32), texts.astype(np.float32), np.repeat(np.arange(4), 2))
        assert {k: found[f"{name}_{k}"] for k in expected} == expected


def test_a_case_by_hand():
    """Three images on the axes; the second text lies nearer to the first image than to its own."""
    images = np.eye(3, dtype=np.float32)
    texts = np.array([[1, 0, 0], [0.9, 0.5, 0], [0, 0.1, 0.9]], np.float32)
    assert retrieval(images, texts, np.arange(3), at=(1, 2)) == pytest.approx(
        {
            "i2t_R@1": 1,
            "i2t_R@2": 1,
            "i2t_mean_rank": 1,
            "i2t_median_rank": 1,
            "i2t_mAP": 1,
            "t2i_R@1": 2 / 3,
            "t2i_R@2": 1,
            "t2i_mean_rank": 4 / 3,
            "t2i_median_rank": 1,
            "t2i_mAP": (1 + 1 / 2 + 1) / 3,
        }
    )


@pytest.mark.parametrize(("queries", "candidates"), [(3, 7), (2048, 1024)])
def test_it_equals_brute_force_with_several_captions_an_image_in_any_blocks(queries, candidates, monkeypatch):
    monkeypatch.setattr(ranking, "QUERY_BLOCK", queries)
    monkeypatch.setattr(ranking, "CANDIDATE_BLOCK", candidates)
    images, texts, owner = random(20, 50)
    assert len(np.unique(owner)) < 20 and np.bincount(owner).max() > 3
    assert retrieval(images, texts, owner) == pytest.approx(both_by_brute_force(images, texts, owner), abs=1e-6)


@pytest.mark.parametrize("ties", ranking.TIES)
def test_ties_follow_the_policy(ties):
    """Vectors of few values, so that most similarities are equal to others."""
    rng = np.random.default_rng(3)
    for _ in range(4):
        images, texts = (unit(rng.integers(0, 2, (n, 2)) + 0.5) for n in (4, 6))
        owner = rng.integers(0, 4, 6)
        expected = both_by_brute_force(images, texts, owner, at=(1, 2, 3), ties=ties)
        assert retrieval(images, texts, owner, at=(1, 2, 3), ties=ties) == pytest.approx(expected, abs=1e-6)


def test_a_constant_model_finds_nothing_and_chance_under_expected_ties():
    ones = np.full((10, 7), 7**-0.5, np.float32)
    found = retrieval(ones, ones, np.arange(10), at=(1, 5))
    assert {found[f"{way}_R@{k}"] for way in ("i2t", "t2i") for k in (1, 5)} == {0.0}
    expected = retrieval(ones, ones, np.arange(10), at=(1, 5), ties="expected")
    for way in ("i2t", "t2i"):
        assert expected[f"{way}_R@1"] == pytest.approx(1 / 10) and expected[f"{way}_R@5"] == pytest.approx(5 / 10)
        assert expected[f"{way}_mean_rank"] == pytest.approx(5.5)


def test_a_constant_model_finds_nothing_at_real_sizes():
    """The last bits of equal products depend on where in the matrix they are: no luck may come of it."""
    row = unit(np.random.default_rng(0).normal(size=(1, 77)))
    images, texts = np.repeat(row, 1500, 0), np.repeat(-row, 2100, 0)
    found = retrieval(images, texts, np.arange(2100) % 1500)
    assert found["i2t_R@10"] == found["t2i_R@10"] == 0 and found["t2i_mean_rank"] == 1500


@pytest.mark.parametrize(("images", "texts", "expected"), [(1, 1, True), (1, 6, False), (4, 1, False), (2, 2, False)])
def test_scores_are_all_equal_only_if_those_of_both_directions_are(images, texts, expected):
    x, y, _ = random(4, 6)
    x, y = x[np.arange(4) % images], y[np.arange(6) % texts]
    ranked = rank_both(x, y, np.array([0, 0, 1, 2, 3, 3]))
    assert all(ranking.all_equal(p, n) for p, n in zip(ranked, (6, 4), strict=True)) == expected


def test_a_perfect_model_finds_everything_and_k_beyond_the_candidates_is_left_out():
    images, _, _ = random(8, 8)
    found = retrieval(images, images, np.arange(8), at=(1, 7, 8, 100))
    assert {name for name in found if "R@" in name} == {f"{way}_R@{k}" for way in ("i2t", "t2i") for k in (1, 7)}
    assert set(found.values()) == {1.0}


def test_duplicate_captions_count_for_their_own_image_alone():
    """Two images share a caption: one of two equal images is found, whichever it is."""
    images = np.eye(3, dtype=np.float32)
    texts = unit(np.array([[1, 1, 0], [1, 1, 0], [0, 0, 1]]))
    assert retrieval(images, texts, np.arange(3), at=(1,))["t2i_R@1"] == pytest.approx(1 / 3)
    assert retrieval(images, texts, np.arange(3), at=(1,), ties="expected")["t2i_R@1"] == pytest.approx(2 / 3)


def test_images_without_captions_and_captions_without_an_image_are_candidates_only():
    images, texts, owner = random(12, 30, seed=2)
    owner[owner == 3] = -1
    image_to_text, text_to_image = rank_both(images, texts, owner)
    assert len(image_to_text.above) == len(np.unique(owner[owner >= 0]))
    assert len(text_to_image.above) == (owner >= 0).sum()
    assert retrieval(images, texts, owner) == pytest.approx(both_by_brute_force(images, texts, owner), abs=1e-6)


def test_the_order_of_images_and_texts_does_not_matter():
    images, texts, owner = random(30, 70)
    rng = np.random.default_rng(1)
    image_order, text_order = rng.permutation(30), rng.permutation(70)
    new_number = np.argsort(image_order)
    shuffled = retrieval(images[image_order], texts[text_order], new_number[owner[text_order]])
    assert shuffled == pytest.approx(retrieval(images, texts, owner), abs=1e-12)


@pytest.mark.parametrize("devices", [1, 3, 8])
def test_the_number_of_devices_does_not_matter(devices):
    images, texts, owner = random(30, 71)
    mesh = make_mesh(devices, devices=jax.devices()[:devices])
    assert retrieval(images, texts, owner, mesh=mesh) == retrieval(images, texts, owner)


def test_similarities_of_all_pairs_never_exist(monkeypatch):
    monkeypatch.setattr(ranking, "QUERY_BLOCK", 64)
    monkeypatch.setattr(ranking, "CANDIDATE_BLOCK", 32)
    shapes = jax.ShapeDtypeStruct((64, 8), "float32"), jax.ShapeDtypeStruct((64,), "int32")
    blocks = [jax.ShapeDtypeStruct((100, 32, *tail), dtype) for tail, dtype in (((8,), "float32"), ((), "int32"))]
    lowered = ranking._counter(None).lower(
        *shapes, jax.ShapeDtypeStruct((64, 1), "float32"), *blocks, jax.ShapeDtypeStruct((100, 32), "float32")
    )
    assert lowered.compile().memory_analysis().temp_size_in_bytes < 64 * 3200 * 4 / 4


@pytest.mark.parametrize("which", [0, 1])
def test_embeddings_that_are_not_finite_are_refused(which):
    images, texts, owner = random(4, 4)
    (images, texts)[which][2, 1] = np.nan
    with pytest.raises(ValueError, match="1 of 4 embeddings are not finite"):
        retrieval(images, texts, owner)


def test_an_owner_that_is_no_image_is_refused():
    images, texts, owner = random(4, 4)
    owner[0] = 4
    with pytest.raises(ValueError, match="owner"):
        retrieval(images, texts, owner)
