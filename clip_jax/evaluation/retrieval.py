"""Image-text retrieval from embeddings, without a similarity matrix of the whole set.

Recall@k is CLIP's hit rate: a query counts when any of its positives is among the k nearest. Image to text, every
caption of the image is a positive; text to image, the caption's one image. Ties are broken against the model: a
candidate as near as the positive counts as nearer, so that a constant model scores 0.
"""

import numpy as np
from jaxtyping import Float, Int

BLOCK = 1024


def ranks(
    images: Float[np.ndarray, "images dim"], texts: Float[np.ndarray, "texts dim"], owner: Int[np.ndarray, " texts"]
) -> tuple[Int[np.ndarray, " queries"], Int[np.ndarray, " texts"]]:
    """(image to text, text to image): the number of wrong candidates at least as near as the (best) right one.

    ``owner[t]`` is the image that text t describes. Images without a text are no queries and are left
    out of the first array. Raises ValueError for embeddings that are not finite.
    """
    if not (np.isfinite(images).all() and np.isfinite(texts).all()):
        raise ValueError("embeddings are not finite")
    text_to_image = np.empty(len(texts), np.int64)
    for start in range(0, len(texts), BLOCK):
        block = slice(start, min(start + BLOCK, len(texts)))
        similarity = texts[block] @ images.T
        rows = np.arange(len(similarity))
        right = similarity[rows, owner[block]]
        text_to_image[block] = (similarity >= right[:, None]).sum(axis=1) - 1

    queries = np.unique(owner)
    image_to_text = np.empty(len(queries), np.int64)
    for start in range(0, len(queries), BLOCK):
        block = queries[start : start + BLOCK]
        similarity = images[block] @ texts.T
        positive = owner[None, :] == block[:, None]
        best = np.where(positive, similarity, -np.inf).max(axis=1)
        wrong = np.where(positive, -np.inf, similarity)
        image_to_text[start : start + len(block)] = (wrong >= best[:, None]).sum(axis=1)
    return image_to_text, text_to_image


def recall(
    images: Float[np.ndarray, "images dim"],
    texts: Float[np.ndarray, "texts dim"],
    owner: Int[np.ndarray, " texts"],
    at: tuple[int, ...] = (1, 5, 10),
) -> dict[str, float]:
    """``{"i2t_R@1": ..., "t2i_R@1": ..., ...}``, shares of queries.

    A k that reaches the number of candidates is left out: any model finds everything among them.
    """
    image_to_text, text_to_image = ranks(images, texts, owner)
    result = {}
    for name, rank, candidates in (("i2t", image_to_text, len(texts)), ("t2i", text_to_image, len(images))):
        result |= {f"{name}_R@{k}": float(np.mean(rank < k)) for k in at if k < candidates}
    return result
