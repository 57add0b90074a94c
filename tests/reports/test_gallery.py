import re
from types import SimpleNamespace

import numpy as np

from clip_jax.data import images as image_files
from clip_jax.presets import Preprocess
from clip_jax.reports.gallery import (
    GALLERY_PAIRS,
    RETRIEVED_IMAGES,
    Gallery,
    caption_ranks,
    image_styles,
    make_gallery,
    matrix,
    retrieval,
)


def pairs(similarity, captions=None) -> Gallery:
    similarity = np.asarray(similarity, np.float32)
    n = len(similarity)
    images = np.random.default_rng(0).integers(0, 256, (n, 8, 8, 3), np.uint8)
    return Gallery(images, captions or tuple(f"caption {j}" for j in range(n)), similarity, "held out")


PREPROCESS = Preprocess((0.5,) * 3, (0.5,) * 3, "shortest", "bicubic")


def source_of(size: int) -> list:
    rng = np.random.default_rng(1)
    return [SimpleNamespace(image=rng.integers(0, 256, (20, 24, 3), np.uint8)) for _ in range(size)]


def test_a_gallery_has_evenly_spaced_images_with_their_first_captions():
    source = source_of(64)
    rng = np.random.default_rng(0)
    # Image i has i % 3 + 1 captions and is example 2 i + 1 of the source: the others could not be used.
    owner = np.repeat(np.arange(31), np.arange(31) % 3 + 1)
    images, texts = rng.standard_normal((31, 4)), rng.standard_normal((len(owner), 4))
    captions = [f"caption {np.sum(owner[:t] == i)} of image {i}" for t, i in enumerate(owner)]
    gallery = make_gallery(
        "scenes",
        source,
        PREPROCESS,
        16,
        images=images,
        texts=texts,
        owner=owner,
        captions=captions,
        indices=2 * np.arange(31) + 1,
    )
    chosen = range(0, 31, 2)
    assert len(chosen) == GALLERY_PAIRS and gallery.evaluation == "scenes"
    assert gallery.captions == tuple(f"caption 0 of image {i}" for i in chosen)
    for row, i in enumerate(chosen):
        expected = image_files.resize_and_crop(source[2 * i + 1].image, 16, resize="shortest", interpolation="bicubic")
        np.testing.assert_array_equal(gallery.images[row], expected)
        for column, j in enumerate(chosen):
            text = texts[captions.index(f"caption 0 of image {j}")]
            np.testing.assert_allclose(gallery.similarity[row, column], images[i] @ text, rtol=1e-6)


def test_a_gallery_of_few_images_has_each_once():
    one_hot = np.eye(3)
    gallery = make_gallery(
        "few",
        source_of(3),
        PREPROCESS,
        16,
        images=one_hot,
        texts=one_hot,
        owner=np.arange(3),
        captions=("a", "b", "c"),
        indices=np.arange(3),
    )
    assert gallery.captions == ("a", "b", "c")
    np.testing.assert_array_equal(gallery.similarity, one_hot)


def shown_images(html: str) -> list[int]:
    return [int(i) for i in re.findall(r'class="picture i(\d+)"', html)]


def test_the_rank_of_a_caption_counts_the_images_before_its_own():
    similarity = np.array([[0.9, 0.8, 0.1], [0.2, 0.7, 0.3], [0.1, 0.9, 0.2]])
    # Caption 0: its image leads. Caption 1 (0.8, 0.7, 0.9): two before its own. Caption 2 (0.1, 0.3, 0.2): one.
    assert caption_ranks(similarity).tolist() == [1, 3, 2]


def test_equal_similarities_rank_every_image_last():
    assert caption_ranks(np.ones((5, 5))).tolist() == [5] * 5
    assert caption_ranks(np.full((5, 5), np.nan)).tolist() == [5] * 5


def test_the_matrix_frames_matching_pairs_and_counts_those_ranked_first():
    html = matrix(pairs([[0.9, 0.8, 0.1], [0.2, 0.7, 0.3], [0.1, 0.9, 0.2]]))
    rows = re.findall(r"<tr><th scope=.*?</tr>", html)
    framed = [[cell.startswith("right") for cell in re.findall(r'<td class="([^"]*)"', row)] for row in rows]
    assert framed == np.eye(3, dtype=bool).tolist()
    # Rows are captions: the first holds image 0, 1, 2 with caption 0.
    assert re.findall(r">(-?\.\d\d)</td>", rows[0]) == [".90", ".20", ".10"]
    assert "1 of 3 captions rank their image first, 2 of 3 images their caption." in html


def test_the_matrix_shows_the_first_sixteen_pairs_at_most(gallery):
    assert shown_images(matrix(gallery)) == list(range(16))


def test_a_matrix_of_equal_or_undefined_similarities_is_drawn_in_the_lightest_shade():
    for value in (0.5, np.nan):
        assert matrix(pairs(np.full((2, 2), value))).count('style="--v:0.00"') == 4


def test_images_are_sorted_by_similarity_and_the_matching_one_is_framed():
    similarity = np.diag([0.3] * 4) + np.array([0.1, 0.5, 0.2, 0.05])[:, None] * (1 - np.eye(4))
    html = retrieval(pairs(similarity)).split('<figure class="retrieved">')[1:]
    assert shown_images(html[0]) == [1, 0, 2, 3]
    assert re.findall(r'found right"><span class="picture i(\d)', html[0]) == ["0"]
    assert "its image ranks 2" in html[0] and "ranked first" in html[1]


def test_the_matching_image_is_shown_however_low_it_ranks():
    similarity = np.linspace(1, 0, 12)[:, None] * np.ones(12)
    similarity[0, 0] = -1
    first = retrieval(pairs(similarity)).split('<figure class="retrieved">')[1]
    assert shown_images(first) == [*range(1, RETRIEVED_IMAGES + 1), 0]
    assert "its image ranks 12" in first


def test_the_captions_with_the_lowest_ranks_follow_the_first_captions():
    similarity = np.eye(20)
    similarity[:5, 17] = 2  # Five images before caption 17's own, one before caption 11's.
    similarity[0, 11] = 2
    shown = re.findall(r">caption (\d+)</span>", retrieval(pairs(similarity)))
    assert shown == ["0", "1", "2", "3", "4", "5", "17", "11"]


def test_every_image_shown_is_embedded_once(gallery):
    embedded = [int(i) for i in re.findall(r"\.i(\d+)\{background-image:url\(data:image/", image_styles(gallery))]
    assert embedded == sorted(set(shown_images(matrix(gallery) + retrieval(gallery))))


def test_html_in_captions_is_escaped():
    html = matrix(hostile := pairs(np.eye(2), ('<script>alert("1")</script>', "a & b"))) + retrieval(hostile)
    assert "<script>" not in html and "&lt;script&gt;alert(&quot;1&quot;)" in html and "a &amp; b" in html
