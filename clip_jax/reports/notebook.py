"""What a notebook's cell shows: the report's figures and galleries, of a run or of any images, texts and cosines.

Each function gives a ``Shown`` as the cell's last line. It is a frame of its own in the output, for the report's style
sheet is not the notebook's. IPython is not imported.
"""

from collections.abc import Sequence
from html import escape
from pathlib import Path
from typing import NamedTuple

import numpy as np
from jaxtyping import Float, UInt8
from PIL import Image, ImageOps

from clip_jax import run_folder
from clip_jax.data import images as image_files
from clip_jax.reports import document, gallery, history, page, summary

Images = Sequence[str | Path | Image.Image | np.ndarray]

PICTURE_PIXELS = 160
"""Side of the largest pictures; a page is to stay small with hundreds of them."""

STYLES = (
    "main{padding:4px}section{margin:0}.cards{margin:0}.cards+section{margin-top:20px}body{background:var(--card)}"
    ".pictures{display:flex;flex-wrap:wrap;gap:14px}.pictures figure{margin:0;width:122px}"
    ".pictures figcaption{font-size:12.5px;line-height:1.3;margin-top:5px;overflow-wrap:anywhere;white-space:pre-line}"
)


class Shown(NamedTuple):
    """HTML that Jupyter, Colab and Kaggle show, as tall as it is."""

    html: str

    def _repr_html_(self) -> str:
        tall = "this.style.height=this.contentDocument.documentElement.scrollHeight+8+'px'"
        return f'<iframe srcdoc="{escape(self.html)}" style="width:100%;border:0" onload="{tall}"></iframe>'


def curves(workdir: str | Path) -> Shown:
    """Loss and accuracy of a run, in training and held out, with its numbers in a line above."""
    folder = run_folder.Folder(workdir).path
    config = run_folder.read(folder)["config"]
    logged = history.curves(history.iterate_metrics(folder / "metrics.jsonl"))
    datasets = summary.evaluations(logged)
    return _shown(document.cards(summary.headline(logged, datasets)) + page.learning(logged, datasets, config))


def pictures(images: Images, texts: Sequence[str]) -> Shown:
    """Images beside each other, each with its text below it; a text may have several lines."""
    pixels = _pixels(images)
    figures = "".join(
        f'<figure><span class="picture i{i}" role="img"></span><figcaption>{escape(text)}</figcaption></figure>'
        for i, text in enumerate(texts)
    )
    return _shown(f'<div class="pictures">{figures}</div>', pixels)


def matrix(images: Images, texts: Sequence[str], similarity: Float[np.ndarray, "n m"]) -> Shown:
    """Cosines of n images (columns) with m texts (rows); each image's best text is framed."""
    cosines = np.asarray(similarity, np.float32)
    return _shown(gallery.heat_map(cosines, texts, framed=cosines.argmax(axis=1)), _pixels(images))


def pairs(images: Images, captions: Sequence[str], similarity: Float[np.ndarray, "n n"]) -> Shown:
    """Cosines of images and captions that belong together (those are framed), as in the report."""
    shown = _gallery(images, captions, similarity)
    return _shown(gallery.matrix(shown), shown.images)


def retrieval(images: Images, captions: Sequence[str], similarity: Float[np.ndarray, "n n"]) -> Shown:
    """What some captions find among all the images, and which captions are the hardest, as in the report."""
    shown = _gallery(images, captions, similarity)
    return _shown(gallery.retrieval(shown), shown.images)


def _gallery(images: Images, captions: Sequence[str], similarity: np.ndarray) -> gallery.Gallery:
    return gallery.Gallery(_pixels(images), tuple(captions), np.asarray(similarity, np.float32), "")


def _shown(body: str, pixels: UInt8[np.ndarray, "n side side 3"] | None = None) -> Shown:
    styles = "" if pixels is None else gallery.picture_styles(pixels, range(len(pixels)))
    return Shown(document.page("", body, STYLES + styles))


def _pixels(images: Images) -> UInt8[np.ndarray, "n side side 3"]:
    """The middle square of each, all of one size."""
    opened = [_opened(image) for image in images]
    side = min(PICTURE_PIXELS, max((min(image.size) for image in opened), default=1))
    return np.stack([np.asarray(ImageOps.fit(image, (side, side), Image.Resampling.LANCZOS)) for image in opened])


def _opened(image: str | Path | Image.Image | np.ndarray) -> Image.Image:
    if isinstance(image, Image.Image):
        return image.convert("RGB")
    return image_files.decode(Path(image).read_bytes() if isinstance(image, str | Path) else image)
