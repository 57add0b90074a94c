"""The HTML building blocks of a page and its only style sheet. All text is escaped here."""

import json
from collections.abc import Mapping, Sequence
from html import escape
from typing import Any

from clip_jax.reports.plots import PALETTE
from clip_jax.reports.summary import Result

CSS = """
*{box-sizing:border-box}
html{color-scheme:light dark;-webkit-text-size-adjust:100%}
body{margin:0;background:var(--paper);color:var(--ink);font:15px/1.5 system-ui,-apple-system,"Segoe UI",Roboto,
"Helvetica Neue",Arial,sans-serif}
main{max-width:1184px;margin:0 auto;padding:36px 24px 64px}
h1{font-size:28px;line-height:1.2;letter-spacing:-.01em;margin:0 0 4px;overflow-wrap:anywhere}
h2{font-size:18px;margin:0 0 4px;overflow-wrap:anywhere}
h3{font-size:13px;font-weight:600;margin:0 0 4px;color:var(--ink)}
p{margin:0}
small,.note,.facts{color:var(--muted)}
.note{font-size:13px;margin-bottom:12px}
.model{font-size:16px}
.facts{font-size:14px}
section{margin-top:40px}
.warning{margin-top:20px;padding:10px 14px;border-left:3px solid var(--orange);background:var(--card)}
.cards{display:grid;grid-template-columns:repeat(auto-fit,minmax(148px,1fr));gap:12px;margin-top:28px}
.card,.panel,.retrieved{background:var(--card);border:1px solid var(--hairline);border-radius:8px;margin:0}
.card{padding:12px 14px}
.card b{display:block;font-size:26px;font-weight:600;line-height:1.25;font-variant-numeric:tabular-nums}
.card span{font-size:13px}
.card small{display:block;font-size:12px;line-height:1.35;overflow-wrap:anywhere}
.panels{display:grid;gap:12px;margin:8px 0 12px}
.panels.large{grid-template-columns:repeat(auto-fill,minmax(min(340px,100%),1fr))}
.panels.small{grid-template-columns:repeat(auto-fill,minmax(min(260px,100%),1fr))}
.panels h3{overflow-wrap:anywhere}
.panel{padding:12px 10px 8px}
.panel h3{padding-left:6px}
svg{display:block;width:100%;height:auto}
svg *{stroke-linejoin:round;stroke-linecap:butt}
svg text{font-family:inherit;font-variant-numeric:tabular-nums}
.scroll{overflow-x:auto}
table{border-collapse:collapse;font-variant-numeric:tabular-nums}
.results{margin-bottom:12px;font-size:14px}
.results th{font-weight:400;color:var(--muted);text-align:right;padding:4px 0 4px 22px;white-space:nowrap}
.results thead th{white-space:normal;vertical-align:bottom}
@media(max-width:600px){.results th{white-space:normal;overflow-wrap:anywhere;min-width:6em}}
.results th:first-child{text-align:left;padding-left:0;color:var(--ink);font-weight:600}
.results td{text-align:right;padding:4px 0 4px 22px}
.results tr+tr>*,.results tbody tr>*{border-top:1px solid var(--hairline)}
.picture{display:block;width:100%;background-size:cover;background-position:center;border-radius:3px;
print-color-adjust:exact;-webkit-print-color-adjust:exact}
.matrix{width:100%;table-layout:fixed;border-collapse:separate;border-spacing:2px;
min-width:calc(230px + var(--n)*42px);max-width:calc(230px + var(--n)*90px)}
.matrix td,.matrix thead th{padding:0;text-align:center;font-size:12px;font-weight:400}
.matrix thead td{width:230px}
.matrix tbody th{font-weight:400;font-size:13px;line-height:1.25;text-align:right;padding:2px 8px 2px 0;
overflow-wrap:anywhere}
.matrix tbody td{height:38px;border-radius:3px;background:rgb(var(--heat)/var(--v));
print-color-adjust:exact;-webkit-print-color-adjust:exact}
.matrix .dark{color:#fff}
.matrix .right{outline:2px solid var(--orange);outline-offset:-1px;font-weight:600}
.captions{display:grid;grid-template-columns:repeat(auto-fill,minmax(min(440px,100%),1fr));gap:12px;margin-bottom:20px}
.retrieved{padding:10px 12px 8px}
.caption{display:-webkit-box;-webkit-box-orient:vertical;-webkit-line-clamp:3;overflow:hidden;overflow-wrap:anywhere}
.retrieved figcaption{display:flex;gap:12px;justify-content:space-between;align-items:baseline;margin-bottom:8px;
line-height:1.35}
.retrieved small{white-space:nowrap}
.retrieved .good{color:var(--teal)}
.strip{display:flex;gap:8px;align-items:flex-start}
.found{width:72px;flex:0 1 72px;min-width:0;text-align:center;font-size:12px;color:var(--muted);
font-variant-numeric:tabular-nums}
.found .picture{margin-bottom:4px}
.found.right{color:var(--ink);font-weight:600}
.found.right .picture{outline:3px solid var(--orange);outline-offset:1px}
.gap{align-self:center;color:var(--muted)}
.tree{columns:3 300px;column-gap:32px;font-size:13px;margin-top:8px}
.tree>*{break-inside:avoid;margin:0 0 12px}
.tree details>*{margin:2px 0 4px}
.tree details details{padding-left:12px}
.tree dl>div{display:flex;gap:12px;justify-content:space-between;border-bottom:1px solid var(--hairline);padding:2px 0}
.tree dt{color:var(--muted);flex:none;max-width:70%;overflow-wrap:anywhere}
.tree dd{margin:0;text-align:right;overflow-wrap:anywhere;min-width:0}
summary{cursor:pointer;font-weight:600}
section>details>summary{font-size:18px;margin-bottom:4px}
"""
# name: (light, dark), in addition to the colors of the figures; "heat" is the full color of the similarity matrix.
SURFACES = {"paper": ("#f7f8f9", "#14181c"), "card": ("#ffffff", "#1b2026"), "heat": ("37 99 201", "37 99 201")}


def page(title: str, body: str, styles: str = "") -> str:
    """A complete HTML document."""
    colors = PALETTE | SURFACES
    light = "".join(f"--{name}:{light};" for name, (light, _) in colors.items())
    dark = "".join(f"--{name}:{dark};" for name, (_, dark) in colors.items())
    theme = f":root{{{light}}}@media screen and (prefers-color-scheme:dark){{:root{{{dark}}}}}"
    return (
        '<!doctype html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        '<meta name="viewport" content="width=device-width,initial-scale=1">\n'
        f"<title>{escape(title)}</title>\n<style>{theme}{CSS}{styles}</style>\n</head>\n"
        f"<body>\n<main>\n{body}\n</main>\n</body>\n</html>\n"
    )


def section(title: str, content: str, note: str = "") -> str:
    note = f'<p class="note">{escape(note)}</p>' if note else ""
    return f"<section>\n<h2>{escape(title)}</h2>\n{note}{content}\n</section>\n"


def cards(items: Sequence[Result]) -> str:
    body = "".join(
        f'<div class="card"><span>{escape(c.label)}</span><b>{escape(c.value)}</b><small>{escape(c.note)}</small></div>'
        for c in items
    )
    return f'<div class="cards">{body}</div>' if items else ""


def panels(figures: Sequence[tuple[str, str]], size: str) -> str:
    """A grid of titled figures; ``size`` is ``large`` or ``small``."""
    body = "".join(f'<div class="panel"><h3>{escape(title)}</h3>{svg}</div>' for title, svg in figures)
    return f'<div class="panels {size}">{body}</div>' if figures else ""


def results(corner: str, columns: Sequence[str], rows: Mapping[str, Sequence[str]]) -> str:
    """A table of numbers with named rows; ``corner`` is the heading of the names."""
    head = "".join(f'<th scope="col">{escape(column)}</th>' for column in columns)
    body = "".join(
        f'<tr><th scope="row">{escape(name)}</th>{"".join(f"<td>{escape(cell)}</td>" for cell in cells)}</tr>'
        for name, cells in rows.items()
    )
    head = f'<thead><tr><th scope="col">{escape(corner)}</th>{head}</tr></thead>'
    return f'<div class="scroll"><table class="results">{head}<tbody>{body}</tbody></table></div>'


def tree(title: str, values: Mapping[str, Any]) -> str:
    """Nested keys and values; every level can be collapsed."""
    return (
        f"<section><details open><summary>{escape(title)}</summary>"
        f'<div class="tree">{_level(values)}</div></details></section>\n'
    )


def _level(values: Mapping[str, Any]) -> str:
    plain = {key: value for key, value in values.items() if not (isinstance(value, Mapping) and value)}
    rows = "".join(f"<div><dt>{escape(str(k))}</dt><dd>{escape(_value(v))}</dd></div>" for k, v in plain.items())
    nested = "".join(
        f"<details open><summary>{escape(str(key))}</summary>{_level(value)}</details>"
        for key, value in values.items()
        if key not in plain
    )
    return (f"<dl>{rows}</dl>" if rows else "") + nested


def _value(value: Any) -> str:
    return value if isinstance(value, str) else json.dumps(value, default=str)
