"""Image-text retrieval from embeddings, with any number of captions per image.

Definitions. Image to text, the query is an image with at least one caption, the candidates are all captions and every
caption of the image is a positive. Text to image, the query is a caption and its one image the positive; images
without a caption are candidates, too.

- ``R@k``: the share of queries with any positive among the k nearest: CLIP's hit rate, not the recall of information
  retrieval (Radford et al. 2021; ``text_retrieval_recall@k`` and ``image_retrieval_recall@k`` in CLIP_benchmark, named
  by what is retrieved). Left out where k reaches the number of candidates: it would be 1 for any model.
- ``mean_rank``, ``median_rank``: of the best positive among the negatives, from 1.
- ``mAP``: mean average precision; with one positive per query, the mean reciprocal rank.

Traps. Numbers with one caption per image and with five differ by 20 points: ``captions_per_image`` is reported. A
caption that occurs for two images is a positive for its own image alone, as in CLIP. Ties are pessimistic unless asked
otherwise (see ``ranking``); PyTorch's and NumPy's sorts order them by index, so that a constant model may look perfect.
"""

import numpy as np
from jax.sharding import Mesh
from jaxtyping import Float, Int

from clip_jax.evaluation.ranking import Ranked, average_precision, check_finite, first_rank, hit, rank

RECALL_AT = (1, 5, 10)


def rank_both(
    images: Float[np.ndarray, "images dim"],
    texts: Float[np.ndarray, "texts dim"],
    owner: Int[np.ndarray, " texts"],
    mesh: Mesh | None = None,
) -> tuple[Ranked, Ranked]:
    """(image to text, text to image) for unit embeddings; ``owner[t]`` is the image that text t describes.

    Images without a text, and texts of no image (owner -1), are candidates and no queries. Raises ValueError for
    embeddings that are not finite and for an owner that is no image.
    """
    check_finite(images=images, texts=texts)
    if len(owner) != len(texts) or (len(owner) and not -1 <= owner.min() <= owner.max() < len(images)):
        raise ValueError(f"owner: {len(owner)} indices of {len(images)} images are needed, one for each text")
    described = np.unique(owner[owner >= 0])
    if not len(described):
        raise ValueError("owner: no text describes any image")
    image_to_text = rank(images[described], described, _captions_of(described, owner), texts, owner, mesh)
    queries = np.flatnonzero(owner >= 0)
    image_numbers = np.arange(len(images))
    text_to_image = rank(texts[queries], owner[queries], owner[queries, None], images, image_numbers, mesh)
    return image_to_text, text_to_image


def retrieval(
    images: Float[np.ndarray, "images dim"],
    texts: Float[np.ndarray, "texts dim"],
    owner: Int[np.ndarray, " texts"],
    *,
    at: tuple[int, ...] = RECALL_AT,
    ties: str = "pessimistic",
    mesh: Mesh | None = None,
) -> dict[str, float]:
    """``{"i2t_R@1": ..., "i2t_mean_rank": ..., "i2t_median_rank": ..., "i2t_mAP": ..., "t2i_R@1": ..., ...}``."""
    image_to_text, text_to_image = rank_both(images, texts, owner, mesh)
    return summarize(image_to_text, len(texts), "i2t", at, ties) | summarize(
        text_to_image, len(images), "t2i", at, ties
    )


def summarize(ranked: Ranked, candidates: int, name: str, at: tuple[int, ...], ties: str) -> dict[str, float]:
    """The metrics of one direction, named ``<name>_R@k`` and so on."""
    ranks = first_rank(ranked, ties)
    recalls = {f"{name}_R@{k}": float(hit(ranked, k, ties).mean()) for k in at if k < candidates}
    return recalls | {
        f"{name}_mean_rank": float(ranks.mean()),
        f"{name}_median_rank": float(np.median(ranks)),
        f"{name}_mAP": float(average_precision(ranked, ties).mean()),
    }


def _captions_of(images: np.ndarray, owner: np.ndarray) -> Int[np.ndarray, "images captions"]:
    """The texts of each image, padded with -1."""
    order = np.argsort(owner, kind="stable")
    order = order[np.searchsorted(owner[order], 0) :]  # without the texts of no image
    first, count = np.searchsorted(owner[order], images), np.bincount(owner[order], minlength=images[-1] + 1)[images]
    column = np.arange(count.max())
    inside = column < count[:, None]
    return np.where(inside, order[np.where(inside, first[:, None] + column, 0)], -1)
