import re

import numpy as np

from clip_jax.reports.gallery import RETRIEVED_IMAGES, Gallery, caption_ranks, image_styles, matrix, retrieval


def pairs(similarity, captions=None) -> Gallery:
    similarity = np.asarray(similarity, np.float32)
    n = len(similarity)
    images = np.random.default_rng(0).integers(0, 256, (n, 8, 8, 3), np.uint8)
    return Gallery(images, captions or tuple(f"caption {j}" for j in range(n)), similarity, "held out")


def shown_images(html: str) -> list[int]:
    return [int(i) for i in re.findall(r'class="picture i(\d+)"', html)]


def test_the_rank_of_a_caption_counts_the_images_before_its_own():
    similarity = np.array([[0.9, 0.8, 0.1], [0.2, 0.7, 0.3], [0.1, 0.9, 0.2]])
    # Caption 0: its image leads. Caption 1 (0.8, 0.7, 0.9): two before its own. Caption 2 (0.1, 0.3, 0.2): one.
    assert caption_ranks(similarity).tolist() == [1, 3, 2]


def test_a_model_that_tells_nothing_apart_ranks_last():
    assert caption_ranks(np.ones((5, 5))).tolist() == [5] * 5
    assert caption_ranks(np.full((5, 5), np.nan)).tolist() == [5] * 5


def test_the_matrix_frames_the_pairs_and_counts_what_finds_its_partner():
    html = matrix(pairs([[0.9, 0.8, 0.1], [0.2, 0.7, 0.3], [0.1, 0.9, 0.2]]))
    rows = re.findall(r"<tr><th scope=.*?</tr>", html)
    framed = [[cell.startswith("right") for cell in re.findall(r'<td class="([^"]*)"', row)] for row in rows]
    assert framed == np.eye(3, dtype=bool).tolist()
    # Rows are captions: the first holds image 0, 1, 2 with caption 0.
    assert re.findall(r">(-?\.\d\d)</td>", rows[0]) == [".90", ".20", ".10"]
    assert "1 of 3 captions find their image first, 2 of 3 images their caption." in html


def test_the_matrix_shows_the_first_sixteen_pairs_at_most(gallery):
    assert shown_images(matrix(gallery)) == list(range(16))


def test_a_matrix_of_equal_or_undefined_similarities_is_written():
    for value in (0.5, np.nan):
        assert matrix(pairs(np.full((2, 2), value))).count('style="--v:0.00"') == 4


def test_images_stand_in_order_of_similarity_and_the_captions_own_is_framed():
    similarity = np.diag([0.3] * 4) + np.array([0.1, 0.5, 0.2, 0.05])[:, None] * (1 - np.eye(4))
    html = retrieval(pairs(similarity)).split('<figure class="retrieved">')[1:]
    assert shown_images(html[0]) == [1, 0, 2, 3]
    assert re.findall(r'found right"><span class="picture i(\d)', html[0]) == ["0"]
    assert "its image ranks 2" in html[0] and "found first" in html[1]


def test_the_right_image_is_shown_however_low_it_ranks():
    similarity = np.linspace(1, 0, 12)[:, None] * np.ones(12)
    similarity[0, 0] = -1
    first = retrieval(pairs(similarity)).split('<figure class="retrieved">')[1]
    assert shown_images(first) == [*range(1, RETRIEVED_IMAGES + 1), 0]
    assert "its image ranks 12" in first


def test_the_captions_of_the_lowest_ranks_are_shown_after_the_first_ones():
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
