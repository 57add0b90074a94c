"""The contents of a source, for a terminal and as a page with a contact sheet."""

import base64
import io
from html import escape

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


def rows(found: Statistics) -> list[tuple[str, str]]:
    """Names and values."""
    bad = ", ".join(f"{count} {reason}" for reason, count in found.faults.most_common()) or "none"
    facts = [
        ("examples", f"{found.examples:,}, of which {found.inspected:,} were read"),
        ("unusable", bad),
        ("captions", f"{found.captions:,}; {found.same_captions:,} repeat another example's"),
        ("images", f"{found.same_images:,} repeat another example's file"),
    ]
    if found.labels:
        facts.append(("labels", f"{found.labels:,} different ones"))
    shown = " / ".join(f"{100 * q:g}%" for q in QUANTILES)
    measured = [(name, " / ".join(formats.number(v) for v in values)) for name, values in found.quantiles.items()]
    return [*facts, ("quantiles", shown), *measured]


def page(name: str, found: Statistics) -> str:
    """A complete HTML document."""
    facts = "".join(
        f"<tr><th scope='row'>{escape(key)}</th><td>{escape(value)}</td></tr>" for key, value in rows(found)
    )
    table = f'<div class="scroll"><table class="results"><tbody>{facts}</tbody></table></div>'
    pictures = "".join(
        f'<figure class="panel"><img src="{_jpeg(pixels)}" alt=""><figcaption>{escape(sample.captions[0][:200])}<br>'
        f"<small>{escape(sample.key)}</small></figcaption></figure>"
        for pixels, sample in found.shown
    )
    sheet = document.section(
        "Examples", f'<div class="sheet">{pictures}</div>', "Evenly spaced, with a caption of each."
    )
    body = f"<h1>{escape(name)}</h1>{document.section('Contents', table)}{sheet}"
    return document.page(name, body, SHEET)


def _jpeg(pixels) -> str:
    file = io.BytesIO()
    Image.fromarray(pixels).save(file, "JPEG", quality=85)
    return f"data:image/jpeg;base64,{base64.b64encode(file.getvalue()).decode()}"
