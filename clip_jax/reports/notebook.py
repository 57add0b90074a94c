"""The report's figures and galleries in a notebook cell, for a run or for any images, texts and cosine similarities.

Each function returns a ``Shown``, to be the last expression of the cell. It is displayed in an iframe, because the
style sheet of the report would change the notebook's own. IPython is not imported.
"""

from collections.abc import Sequence
from html import escape
from pathlib import Path
from typing import NamedTuple

import numpy as np
from jaxtyping import Float, UInt8
from PIL import Image, ImageOps

from clip_jax.data import images as image_files
from clip_jax.reports import document, gallery, history, page, summary
from clip_jax.storage import run_folder

Images = Sequence[str | Path | Image.Image | np.ndarray]

PICTURE_PIXELS = 160
"""Largest side of a picture, so that a page with hundreds of them stays small."""

STYLES = (
    "main{padding:4px}section{margin:0}.cards{margin:0}.cards+section{margin-top:20px}body{background:var(--card)}"
    ".pictures{display:flex;flex-wrap:wrap;gap:14px}.pictures figure{margin:0;width:122px}"
    ".pictures figcaption{font-size:12.5px;line-height:1.3;margin-top:5px;overflow-wrap:anywhere;white-space:pre-line}"
)


class Shown(NamedTuple):
    """HTML that Jupyter, Colab and Kaggle display at its full height."""

    html: str

    def _repr_html_(self) -> str:
        tall = "this.style.height=this.contentDocument.documentElement.scrollHeight+8+'px'"
        return f'<iframe srcdoc="{escape(self.html)}" style="width:100%;border:0" onload="{tall}"></iframe>'


def curves(workdir: str | Path) -> Shown:
    """Training and held-out loss and accuracy of a run, below its headline numbers."""
    folder = run_folder.Folder(workdir).path
    config = run_folder.read(folder)["config"]
    logged = history.curves(history.read_metrics(folder / "metrics.jsonl"))
    evaluations = summary.by_evaluation(logged)
    return _shown(document.cards(summary.headline(logged, evaluations)) + page.learning(logged, evaluations, config))


def pictures(images: Images, texts: Sequence[str]) -> Shown:
    """Images side by side, each above its text, which may have several lines."""
    pixels = _pixels(images)
    figures = "".join(
        f'<figure><span class="picture i{i}" role="img"></span><figcaption>{escape(text)}</figcaption></figure>'
        for i, text in enumerate(texts)
    )
    return _shown(f'<div class="pictures">{figures}</div>', pixels)


def matrix(images: Images, texts: Sequence[str], similarity: Float[np.ndarray, "n m"]) -> Shown:
    """Cosine similarities of n images (columns) and m texts (rows); the best text of each image is framed."""
    cosines = np.asarray(similarity, np.float32)
    return _shown(gallery.heat_map(cosines, texts, framed=cosines.argmax(axis=1)), _pixels(images))


def pairs(images: Images, captions: Sequence[str], similarity: Float[np.ndarray, "n n"]) -> Shown:
    """Cosine similarities of n pairs, as in the report; matching images and captions are framed."""
    shown = _gallery(images, captions, similarity)
    return _shown(gallery.matrix(shown), shown.images)


def retrieval(images: Images, captions: Sequence[str], similarity: Float[np.ndarray, "n n"]) -> Shown:
    """The images that captions retrieve, first and hardest captions, as in the report."""
    shown = _gallery(images, captions, similarity)
    return _shown(gallery.retrieval(shown), shown.images)


def _gallery(images: Images, captions: Sequence[str], similarity: np.ndarray) -> gallery.Gallery:
    return gallery.Gallery(_pixels(images), tuple(captions), np.asarray(similarity, np.float32), "")


def _shown(body: str, pixels: UInt8[np.ndarray, "n side side 3"] | None = None) -> Shown:
    styles = "" if pixels is None else gallery.picture_styles(pixels, range(len(pixels)))
    return Shown(document.page("", body, STYLES + styles))


def _pixels(images: Images) -> UInt8[np.ndarray, "n side side 3"]:
    """The central square of each image, all resized to one size."""
    opened = [_opened(image) for image in images]
    side = min(PICTURE_PIXELS, max((min(image.size) for image in opened), default=1))
    return np.stack([np.asarray(ImageOps.fit(image, (side, side), Image.Resampling.LANCZOS)) for image in opened])


def _opened(image: str | Path | Image.Image | np.ndarray) -> Image.Image:
    if isinstance(image, Image.Image):
        return image.convert("RGB")
    return image_files.decode(Path(image).read_bytes() if isinstance(image, str | Path) else image)
