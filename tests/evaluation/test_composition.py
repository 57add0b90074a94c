"""Composition, robustness and bias metrics by hand; a constant model scores 0 under strict inequality."""

import numpy as np
import pytest

from clip_jax.data.sources.shapes import open_shapes
from clip_jax.evaluation import bias, composition, robustness


def test_winoground_by_hand():
    right = [[0.9, 0.1], [0.2, 0.8]]
    text_only = [[0.5, 0.6], [0.4, 0.9]]  # each image prefers its caption; the first caption prefers the second image
    image_only = [[0.5, 0.4], [0.6, 0.9]]
    found = composition.winoground(np.array([right, text_only, image_only, np.transpose(right)[::-1]]))
    assert found == {"text": 0.5, "image": 0.5, "group": 0.25}


def test_a_constant_model_scores_0_and_is_recognized():
    same = np.full((5, 2, 2), 0.3)
    assert set(composition.winoground(same).values()) == {0.0}
    assert composition.true_caption_wins(same[:, 0, 0], same[:, 1, 0]).sum() == 0
    assert composition.all_equal(same[:, 0, 0], same[:, 1, 0] + 1e-8)
    assert not composition.all_equal(np.array([0.3, 0.4]), np.array([0.3, 0.3]))
    same[2, 0, 1] = np.nan
    with pytest.raises(ValueError, match="not finite"):
        composition.winoground(same)


def test_swaps_are_false_of_their_scene_and_of_every_kind():
    source, kinds = open_shapes("heldout", examples=60), set()
    for index in range(60):
        scene, _ = source.describe(index)
        nouns = {f"{each.color} {each.shape}" for each in scene.objects}
        found = list(composition.swaps(scene, index))
        assert found == list(composition.swaps(scene, index))
        for swap in found:
            kinds.add(swap.kind)
            assert swap.true != swap.false
            if swap.kind in ("binding", "relation", "order"):
                assert sorted(swap.true.split()) == sorted(swap.false.split())
            if swap.kind in ("color", "shape"):
                assert swap.true.removeprefix("a ") in nouns and swap.false.removeprefix("a ") not in nouns
    assert kinds == {"color", "shape", "size", "binding", "relation", "count", "negation", "order"}


def test_curves_by_size_number_distance_and_order_of_mention_by_hand():
    source = open_shapes("heldout", image_size=32, examples=40)
    scenes = [source.describe(i)[0] for i in range(40)]
    rows, made = [], []
    for i, scene in enumerate(scenes):
        found = [*composition.swaps(scene, i), *composition.mentions(scene, i)]
        rows += [i] * len(found)
        made += found
    for swap in (s for s in made if s.kind.startswith("mention")):  # one word differs, a color
        different = [(t, f) for t, f in zip(swap.true.split(), swap.false.split(), strict=True) if t != f]
        assert len(different) == 1 and different[0][1] not in swap.true
    kinds = [swap.kind for swap in made]
    wins = np.array([float(kind in ("color", "mention 2", "binding")) for kind in kinds])
    curves = composition.curves([scenes[i] for i in rows], kinds, wins)
    assert curves["color, by order of mention"] == [[1.0, 0.0], [2.0, 1.0], [3.0, 0.0]]
    assert curves["color and shape, by the number of objects"] == [[1.0, 0.5], [2.0, 0.5], [3.0, 0.5]]
    sizes = [x for x, _ in curves["color and shape, by the object's size / side"]]
    assert len(sizes) >= 2 and all(0 < x < 1 for x in sizes)
    for x, y in curves["binding and relation, by distance / side"]:
        of = [
            kind == "binding"
            for kind, i in zip(kinds, rows, strict=True)
            if kind in ("binding", "relation")
            and round(np.hypot(*(np.subtract(*[(o.x, o.y) for o in scenes[i].objects[:2]]))), 1) == x
        ]
        assert y == np.mean(of)


@pytest.mark.parametrize("kind", robustness.CORRUPTIONS)
def test_corruptions_grow_with_their_severity_and_repeat(kind):
    pixels = np.random.default_rng(0).integers(0, 256, (48, 48, 3), np.uint8)
    changed = [robustness.corrupt(pixels, kind, severity, "a") for severity in robustness.SEVERITIES]
    distance = [np.mean(np.abs(c.astype(float) - pixels)) for c in changed]
    assert all(c.dtype == np.uint8 and c.shape == pixels.shape for c in changed)
    assert 0 < distance[0] < distance[4]
    assert np.array_equal(changed[2], robustness.corrupt(pixels, kind, 3, "a"))
    if kind in ("noise", "impulse"):
        assert not np.array_equal(changed[2], robustness.corrupt(pixels, kind, 3, "b"))


def test_a_corrupted_source_keeps_labels_and_captions():
    source = open_shapes("zero_shot", examples=24, image_size=32)
    corrupted = robustness.corrupted(source, "blur", 5)
    assert corrupted[3]._replace(image=b"") == source[3]._replace(image=b"")
    assert len(corrupted) == 24 and corrupted.class_names == source.class_names
    assert corrupted.fingerprint != robustness.corrupted(source, "blur", 4).fingerprint


def test_effective_robustness_is_the_distance_from_the_line_of_the_baseline():
    logit = np.array([[0.0, -1.0], [2.0, 1.0], [4.0, 3.0]])  # under the shift, one logit less
    baseline = 1 / (1 + np.exp(-logit))
    assert robustness.effective_robustness(0.5, 1 / (1 + np.e), baseline) == pytest.approx(0)
    assert robustness.effective_robustness(0.5, 0.5, baseline) == pytest.approx(0.5 - 1 / (1 + np.e))


def test_group_accuracies_by_hand():
    found = bias.group_accuracy(np.array([1, 0, 1, 1]), [("f", 1), ("f", 1), ("m", 1), ("m", 2)])
    assert found["groups"] == {("f", 1): (0.5, 2), ("m", 1): (1.0, 1), ("m", 2): (1.0, 1)}
    assert found["worst"] == 0.5 and found["worst_group"] == ("f", 1) and found["gap"] == 0.5


def test_skew_and_ndkl_by_hand():
    half = np.array([0.5, 0.5])
    assert bias.max_skew(np.array([0, 1, 0, 1]), half, 4) == pytest.approx(0)
    assert bias.max_skew(np.array([0, 0, 0, 1]), half, 4) == pytest.approx(np.log(1.5))
    assert bias.max_skew(np.array([0, 0, 1, 1]), half, 2) == pytest.approx(np.log(2))
    assert bias.max_skew(np.array([0, 1]), half, 100) == pytest.approx(0)
    # First hit alone: KL = ln 2 with weight 1; both: KL = 0 with weight 1 / log2(3).
    assert bias.ndkl(np.array([0, 1]), half) == pytest.approx(np.log(2) / (1 + 1 / np.log2(3)))
    with pytest.raises(ValueError, match="sum to 1"):
        bias.ndkl(np.array([0, 1]), np.array([0.5, 0.6]))
