"""The page of ``clip-jax serve``: a form, a line about what happened, and the hits. Works without JavaScript."""

from collections.abc import Mapping, Sequence
from html import escape
from typing import Any, NamedTuple
from urllib.parse import urlencode

from clip_jax.reports import document

STYLES = """
.search{display:grid;grid-template-columns:repeat(auto-fit,minmax(min(330px,100%),1fr));gap:12px;margin-top:20px}
.search form{display:flex;flex-wrap:wrap;gap:8px;align-items:center;padding:12px 14px}
.search label{flex:1 0 100%;font-size:13px;color:var(--muted)}
.search input,.search select,.search button{font:inherit;color:inherit;background:var(--paper);padding:6px 10px;
border:1px solid var(--hairline);border-radius:6px;min-width:0}
.search input{flex:1 1 160px}
.search button{background:var(--blue);color:#fff;border-color:var(--blue);cursor:pointer}
.hits{display:grid;grid-template-columns:repeat(auto-fill,minmax(min(170px,47%),1fr));gap:12px;list-style:none;
padding:0;margin:8px 0 0}
.hits figure{margin:0;height:100%;padding:8px;display:flex;flex-direction:column}
.hits img{display:block;width:100%;height:150px;object-fit:contain;margin-bottom:6px}
.hits figcaption{font-size:13px;line-height:1.35;overflow-wrap:anywhere}
.hits small{display:block;font-size:12px}
.hits a{color:inherit}
"""
AMONG = {"image": "in pictures", "text": "in captions"}


class Results(NamedTuple):
    """What is shown below the form; ``hits`` are rows of the index's metadata with ``similarity``."""

    heading: str
    hits: Sequence[Mapping[str, Any]]


def page(
    name: str,
    size: int,
    *,
    text: str = "",
    among: str = "image",
    problem: str = "",
    results: Results | None = None,
    pictures: bool = True,
    max_characters: int,
) -> str:
    """A complete HTML document. ``size``: the number of embeddings; ``problem``: one line in place of hits."""
    body = f'<h1>{escape(name)}</h1><p class="facts">{size:,} pictures</p>{_forms(text, among, max_characters)}'
    if problem:
        body += f'<p class="warning" role="alert">{escape(problem)}</p>'
    if results is not None:
        body += document.section(results.heading, _hits(results.hits, pictures))
    return document.page(f"{text}: {name}" if text else name, body, STYLES)


def _forms(text: str, among: str, max_characters: int) -> str:
    options = "".join(
        f'<option value="{value}"{" selected" if value == among else ""}>{label}</option>'
        for value, label in AMONG.items()
    )
    select = f'<select name="among" aria-label="What is searched">{options}</select>'
    return (
        '<div class="search"><form class="panel" action="/" method="get" role="search">'
        '<label for="q">Search by words</label>'
        f'<input id="q" name="q" type="search" value="{escape(text)}" maxlength="{max_characters}" required '
        f'autofocus autocomplete="off">{select}<button>Search</button></form>'
        '<form class="panel" action="/" method="post" enctype="multipart/form-data">'
        '<label for="picture">Search by a picture</label>'
        f'<input id="picture" name="picture" type="file" accept="image/*" required>{select}'
        "<button>Search</button></form></div>"
    )


def _hits(hits: Sequence[Mapping[str, Any]], pictures: bool) -> str:
    return f'<ol class="hits">{"".join(_hit(hit, pictures) for hit in hits)}</ol>'


def _hit(hit: Mapping[str, Any], pictures: bool) -> str:
    caption, path = str(hit.get("caption") or ""), str(hit.get("image_path") or "")
    number, picture, similar = hit.get("index"), "", ""
    if number is not None:
        link = escape("/?" + urlencode({"like": number}))
        similar = f' · <a href="{link}">similar</a>'
        if pictures:
            thumbnail = f'<img src="/thumbnail/{number}" alt="{escape(caption or path)}" loading="lazy">'
            picture = f'<a href="{link}" title="Search for similar pictures">{thumbnail}</a>'
    return (
        f'<li><figure class="panel">{picture}<figcaption><span class="caption" dir="auto">{escape(caption)}</span>'
        f'<small title="{escape(path)}">{hit["similarity"]:.3f}{similar}</small></figcaption></figure></li>'
    )
