"""Galleries of held-out pairs: the similarity matrix of images and captions, and the images that captions retrieve."""

import base64
import io
from collections.abc import Iterable, Sequence
from html import escape
from typing import NamedTuple

import numpy as np
from jaxtyping import Float, Float32, Int, UInt8
from PIL import Image

from clip_jax.data import images as image_files
from clip_jax.data.sources import Source
from clip_jax.presets import Preprocess

GALLERY_PAIRS = 16
MATRIX_PAIRS = 16
RETRIEVED_IMAGES = 6
FIRST_CAPTIONS = 6
HARDEST_CAPTIONS = 4

# Twice the size shown, for high-density screens.
THUMBNAIL_PIXELS = 160
# Images up to this size are embedded as PNG: JPEG artifacts would be visible, and they are small anyway.
LOSSLESS_PIXELS = 72
# The shade grows faster than the similarity, so that the best matches stand out from the average ones.
SHADE_POWER = 1.5
# Above this shade, white text is easier to read than the page's text color (equal contrast, WCAG 2).
DARK_CELL = 0.8


class Gallery(NamedTuple):
    """Held-out pairs: image i and caption i match; ``similarity[i, j]`` is the cosine of image i and caption j."""

    images: UInt8[np.ndarray, "n height width 3"]
    captions: tuple[str, ...]
    similarity: Float32[np.ndarray, "n n"]
    evaluation: str
    """The evaluation's name in the metrics, ``eval/<name>/...``; the page begins with it."""
    of: int = 0
    """Images of the evaluation that these are a part of; 0: these are all."""


def make_gallery(
    name: str,
    source: Source,
    preprocess: Preprocess,
    image_size: int,
    *,
    images: Float[np.ndarray, "images dim"],
    texts: Float[np.ndarray, "texts dim"],
    owner: Int[np.ndarray, " texts"],
    captions: Sequence[str],
    indices: Int[np.ndarray, " images"],
) -> Gallery:
    """The gallery of the evaluation ``name``: evenly spaced images of a source, each with its first caption.

    ``images`` and ``texts`` are unit embeddings; text t is ``captions[t]`` and describes image ``owner[t]``, which is
    ``source[indices[owner[t]]]``.
    """
    chosen = np.unique(np.linspace(0, len(images) - 1, GALLERY_PAIRS).astype(int))
    _, first = np.unique(owner, return_index=True)
    pixels = [
        image_files.resize_and_crop(
            source[int(index)].image,
            image_size,
            resize=preprocess.resize,
            interpolation=preprocess.interpolation,
            exif=preprocess.exif,
        )
        for index in indices[chosen]
    ]
    return Gallery(
        images=np.stack(pixels),
        captions=tuple(captions[text] for text in first[chosen]),
        similarity=(images[chosen] @ texts[first[chosen]].T).astype(np.float32),
        evaluation=name,
        of=len(images),
    )


def caption_ranks(similarity: Float32[np.ndarray, "n n"]) -> Int[np.ndarray, " n"]:
    """The rank of the matching image for each caption, from 1. Ties count against the matching image.

    Otherwise a model that gives every pair the same similarity would look perfect.
    """
    return (_finite(similarity) >= np.diagonal(_finite(similarity))).sum(axis=0)


def matrix(gallery: Gallery) -> str:
    """A heat map of the similarities of the first pairs: one row per caption, one column per image."""
    n = min(len(gallery.captions), MATRIX_PAIRS)
    similarity = gallery.similarity[:n, :n]
    low, high = _range(similarity)
    captions_right = int((caption_ranks(similarity) == 1).sum())
    images_right = int((caption_ranks(similarity.T) == 1).sum())
    note = (
        f"Cosine similarity of every image (columns) and every caption (rows), {_cosine(low)} to {_cosine(high)}; "
        "matching pairs are framed. "
        f"{captions_right} of {n} captions rank their image first, {images_right} of {n} images their caption"
        f"{_part(gallery, n)}."
    )
    return f'<p class="note">{note}</p>{heat_map(similarity, gallery.captions[:n], framed=range(n))}'


def heat_map(similarity: Float32[np.ndarray, "n m"], captions: Sequence[str], framed: Sequence[int]) -> str:
    """A table of cosine similarities: one column per image, one row per caption.

    In column i, the cell of row ``framed[i]`` is framed. The images come from ``picture_styles``.
    """
    low, high = _range(similarity)
    head = "".join(f'<th scope="col">{_picture(i, f"image {i + 1}")}</th>' for i in range(len(similarity)))
    body = ""
    for j, caption in enumerate(captions):
        cells = "".join(_cell(row[j], low, high, right=framed[i] == j) for i, row in enumerate(similarity))
        body += f'<tr><th scope="row">{_caption(caption)}</th>{cells}</tr>'
    head = f"<thead><tr><td></td>{head}</tr></thead>"
    table = f'<table class="matrix" style="--n:{len(similarity)}">{head}<tbody>{body}</tbody></table>'
    return f'<div class="scroll">{table}</div>'


def _part(gallery: Gallery, shown: int) -> str:
    """Says that ranks among a few are not the metrics, which are among all."""
    if gallery.of <= shown:
        return ""
    return f", among these {shown} alone: the recalls above are among all {gallery.of:,} images of the evaluation"


def _range(similarity: np.ndarray) -> tuple[float, float]:
    finite = similarity[np.isfinite(similarity)]
    return (float(finite.min()), float(finite.max())) if finite.size else (0.0, 1.0)


def retrieval(gallery: Gallery) -> str:
    """The most similar images for the first captions, and for those whose matching image ranks lowest."""
    ranks = caption_ranks(gallery.similarity)
    first, hardest = _shown_captions(ranks)
    total = len(ranks)
    note = f"The most similar of {total} images, best first; the matching image is framed{_part(gallery, total)}."
    parts = [f'<p class="note">{note}</p>']
    parts.append(f'<div class="captions">{"".join(_retrieved(gallery, j, int(ranks[j])) for j in first)}</div>')
    if hardest:
        parts.append("<h3>Captions whose matching image ranks lowest</h3>")
        parts.append(f'<div class="captions">{"".join(_retrieved(gallery, j, int(ranks[j])) for j in hardest)}</div>')
    return "".join(parts)


def image_styles(gallery: Gallery) -> str:
    """CSS with the images that ``matrix`` and ``retrieval`` show, each embedded once however often it is shown."""
    shown = set(range(min(len(gallery.captions), MATRIX_PAIRS)))
    first, hardest = _shown_captions(caption_ranks(gallery.similarity))
    for j in (*first, *hardest):
        shown.update((j, *_best_images(gallery.similarity, j)))
    return picture_styles(gallery.images, sorted(shown))


def picture_styles(images: UInt8[np.ndarray, "n height width 3"], shown: Iterable[int]) -> str:
    """CSS that makes image i the background of the class ``i<i>``."""
    height, width = images.shape[1:3]
    rules = [f".picture{{aspect-ratio:{width}/{height}}}"]
    rules += [f".i{i}{{background-image:url({_data_uri(images[i])})}}" for i in shown]
    return "".join(rules)


def _shown_captions(ranks: np.ndarray) -> tuple[Sequence[int], Sequence[int]]:
    """The first captions, as an unselected sample; and the worst-ranked among the others."""
    first = range(min(len(ranks), FIRST_CAPTIONS))
    others: Iterable[int] = np.argsort(-ranks, kind="stable").tolist()
    hardest = [j for j in others if j not in first and ranks[j] > 1]
    return first, hardest[:HARDEST_CAPTIONS]


def _best_images(similarity: np.ndarray, j: int) -> list[int]:
    column = _finite(similarity)[:, j]
    is_match = np.arange(len(column)) == j
    # Ties count against the matching image, as in caption_ranks.
    return np.lexsort((is_match, -column))[:RETRIEVED_IMAGES].tolist()


def _retrieved(gallery: Gallery, j: int, rank: int) -> str:
    best = _best_images(gallery.similarity, j)
    found = "".join(_figure(gallery, i, j) for i in best)
    if j not in best:
        found += f'<span class="gap">…</span>{_figure(gallery, j, j)}'
    verdict = "ranked first" if rank == 1 else f"its image ranks {rank}"
    good = ' class="good"' if rank == 1 else ""
    caption = f"<figcaption>{_caption(gallery.captions[j])}<small{good}>{verdict}</small></figcaption>"
    return f'<figure class="retrieved">{caption}<div class="strip">{found}</div></figure>'


def _figure(gallery: Gallery, i: int, j: int) -> str:
    right = " right" if i == j else ""
    return f'<span class="found{right}">{_picture(i, gallery.captions[i])}{_cosine(gallery.similarity[i, j])}</span>'


def _cell(value: float, low: float, high: float, *, right: bool) -> str:
    shade = ((value - low) / (high - low)) ** SHADE_POWER if high > low and np.isfinite(value) else 0.0
    classes = f"{'right' if right else ''} {'dark' if shade > DARK_CELL else ''}".strip()
    text = _cosine(value)
    text = text.replace("0.", ".", 1) if abs(value) < 1 else text  # Sixteen columns are narrow.
    return f'<td class="{classes}" style="--v:{shade:.2f}">{text}</td>'


def _cosine(value: float) -> str:
    return f"{value:.2f}".replace("-0.00", "0.00")


def _caption(caption: str) -> str:
    # Captions from the web can be paragraphs: the style sheet shows three lines, the tooltip everything.
    return f'<span class="caption" dir="auto" title="{escape(caption)}">{escape(caption)}</span>'


def _picture(i: int, name: str) -> str:
    return f'<span class="picture i{i}" role="img" aria-label="{escape(name)}" title="{escape(name)}"></span>'


def _data_uri(pixels: UInt8[np.ndarray, "height width 3"]) -> str:
    image = Image.fromarray(pixels)
    buffer = io.BytesIO()
    if max(image.size) <= LOSSLESS_PIXELS:
        image.save(buffer, "PNG", optimize=True)
        kind = "png"
    else:
        image.thumbnail((THUMBNAIL_PIXELS, THUMBNAIL_PIXELS), Image.Resampling.LANCZOS)
        image.save(buffer, "JPEG", quality=85)
        kind = "jpeg"
    return f"data:image/{kind};base64,{base64.b64encode(buffer.getvalue()).decode()}"


def _finite(similarity: np.ndarray) -> np.ndarray:
    """Replaces NaN, which does not compare, by the lowest possible similarity."""
    return np.where(np.isnan(similarity), -np.inf, similarity)
