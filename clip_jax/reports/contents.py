"""The contents of a source, for a terminal and as a page with a contact sheet."""

import base64
import io
from collections import Counter
from collections.abc import Iterable, Sequence
from html import escape
from typing import NamedTuple

import numpy as np
from PIL import Image

from clip_jax.data.statistics import QUANTILES, Statistics
from clip_jax.reports import document, formats

PICTURES = 60
PIXELS = 160
SHEET = """
.sheet{display:grid;grid-template-columns:repeat(auto-fill,minmax(150px,1fr));gap:12px}
.sheet figure{margin:0;padding:8px}
.sheet img{display:block;max-width:100%;height:130px;object-fit:contain;margin:0 auto 6px}
.sheet figcaption{font-size:13px;line-height:1.3;overflow-wrap:anywhere}
"""


class Batch(NamedTuple):
    """The first pairs of a batch, as the model sees them."""

    size: int
    """Pairs in the global batch."""
    pixels: np.ndarray
    """uint8[n, height, width, 3]: crops, before they are normalized."""
    texts: tuple[str, ...]
    """Tokens decoded back to text."""
    context_length: int
    full: int
    """Texts that fill the context length, most of which were cut."""


def rows(found: Statistics) -> list[tuple[str, str]]:
    """Names and values."""
    bad = ", ".join(f"{count} {reason}" for reason, count in found.faults.most_common()) or "none"
    facts = [
        ("examples", f"{found.examples:,}, of which {found.inspected:,} were read"),
        ("unusable", bad),
        *(("not read", note) for note in found.notes),
        ("captions", f"{found.captions:,}; {found.same_captions:,} repeat another example's"),
        ("images", f"{found.same_images:,} repeat another example's file"),
    ]
    if found.longest is not None:
        share = formats.percent(found.cut / max(1, found.captions))
        facts.append(("cut captions", f"{found.cut:,} ({share}) have more than {found.longest} tokens"))
    facts += [("scripts", _shares(found.scripts)), ("formats", _shares(found.formats))]
    if found.labels:
        facts.append(("labels", f"{found.labels:,} different ones"))
    shown = " / ".join(f"{100 * q:g}%" for q in QUANTILES)
    measured = [(name, " / ".join(formats.number(v) for v in values)) for name, values in found.quantiles.items()]
    return [*facts, ("quantiles", shown), *measured]


def batch_rows(batch: Batch) -> list[tuple[str, str]]:
    """Names and values."""
    height, width = batch.pixels.shape[1:3]
    return [
        ("pairs", f"{batch.size:,}, of which {len(batch.texts)} were made"),
        ("images", f"{width}x{height} pixels"),
        ("texts", f"{batch.context_length} tokens; {batch.full} fill them all"),
    ]


def page(title: str, parts: Sequence[tuple[str, Statistics]], batch: Batch | None = None) -> str:
    """A complete HTML document: each source with its name, then the batch."""
    body = f"<h1>{escape(title)}</h1>"
    for name, found in parts:
        body += document.section("Contents" if name == title else name, _table(rows(found)))
        if found.bad:
            items = "".join(f"<li>{escape(line)}</li>" for line in found.bad)
            body += document.section("Unusable examples", f"<ul>{items}</ul>", "The first ones, with their reasons.")
        pictures = [(pixels, sample.captions[0][:200], sample.key) for pixels, sample in found.shown]
        body += document.section("Examples", _sheet(pictures), "Evenly spaced, with a caption of each.")
    if batch is not None:
        pairs = [(pixels, text or "(no text)", "") for pixels, text in zip(batch.pixels, batch.texts, strict=True)]
        note = "Crops at the size that the model takes, and tokens decoded back to text."
        body += document.section("The first batch", _table(batch_rows(batch)) + _sheet(pairs), note)
    return document.page(title, body, SHEET)


def _table(facts: Iterable[tuple[str, str]]) -> str:
    lines = "".join(f"<tr><th scope='row'>{escape(key)}</th><td>{escape(value)}</td></tr>" for key, value in facts)
    return f'<div class="scroll"><table class="results"><tbody>{lines}</tbody></table></div>'


def _sheet(pictures: Iterable[tuple[np.ndarray, str, str]]) -> str:
    """Pixels, text and name of each."""
    figures = "".join(
        f'<figure class="panel"><img src="{_jpeg(pixels)}" alt=""><figcaption>{escape(text)}<br>'
        f"<small>{escape(name)}</small></figcaption></figure>"
        for pixels, text, name in pictures
    )
    return f'<div class="sheet">{figures}</div>'


def _shares(counts: Counter) -> str:
    total = max(1, counts.total())
    return ", ".join(f"{name} {formats.percent(count / total)}" for name, count in counts.most_common()) or "none"


def _jpeg(pixels) -> str:
    file = io.BytesIO()
    Image.fromarray(pixels).save(file, "JPEG", quality=85)
    return f"data:image/jpeg;base64,{base64.b64encode(file.getvalue()).decode()}"
