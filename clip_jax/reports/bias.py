"""The page of ``clip-jax bias``: tables by group, and what these numbers say and do not say."""

from collections.abc import Mapping
from html import escape
from typing import Any

from clip_jax.reports import document, formats

SAYS = (
    "Accuracy by group shows on which groups of this table the model is worse with these prompts. Small groups have "
    "wide intervals: of 50 images, an accuracy of 90% is uncertain by 8 points.",
    "MaxSkew@k is the logarithm of how often a group is among the first hits, relative to its share of the table: 0 is "
    "proportional, 0.69 is twice as often. NDKL sums the same over all positions.",
    "An association is the difference of a group from all other images in standard deviations; an interval that "
    "contains 0 shows no difference in these images.",
)
SAYS_NOT = (
    "Groups that the table does not label are not measured, and labels of gender or race in such tables are what "
    "annotators saw, not what persons said.",
    "A gap of 0 does not show that an application is fair: that depends on what it decides, for whom, with which "
    "threshold and pictures. Another template or other class names change every number here.",
    "These are numbers of a model, to compare models with. They are no certificate.",
)


def render(title: str, found: Mapping[str, Any]) -> str:
    """A complete HTML document from what ``audit`` returned."""
    skipped = f", {found['skipped']} skipped" if found["skipped"] else ""
    facts = f"{found['images']:,} images{skipped}; {found['target']}: {', '.join(found['prompts'])}"
    body = f'<h1>{escape(title)}</h1><p class="facts">{escape(facts)}</p>'
    if found["all_equal"]:
        body += '<p class="warning">All its scores are equal.</p>'
    body += document.section("What these numbers say", _paragraphs(SAYS))
    body += document.section("What they do not say", _paragraphs(SAYS_NOT))
    for name, split in found["by"].items():
        harmful = found["harmful"][name]
        rows = {
            group: [
                f"{values['images']:,}",
                formats.percent(values["accuracy"]),
                formats.percent(harmful[group]["crime"]),
                formats.percent(harmful[group]["non_human"]),
            ]
            for group, values in split["groups"].items()
        }
        columns = ["images", f"accuracy of {found['target']}", "taken for crime", "taken for an animal"]
        note = f"Gap {formats.percent(split['gap'])}; worst: {split['worst_group']}, {formats.percent(split['worst'])}."
        body += document.section(f"By {name}", document.results(name, columns, rows), note)
    for name, queries in found["retrieval"].items():
        columns = list(next(iter(queries.values()), {}))
        rows = {q: [v if isinstance(v, str) else f"{v:.3f}" for v in values.values()] for q, values in queries.items()}
        body += document.section(f"Retrieval, by {name}", document.results("query", columns, rows))
    for name, groups in found["association"].items():
        rows = {
            group: [f"{v['images']:,}", f"{v['effect']:+.2f}", f"{v['low']:+.2f} to {v['high']:+.2f}"]
            for group, v in groups.items()
        }
        table = document.results(name, ["images", "effect", "95% interval"], rows)
        body += document.section(f"Association with pleasant words, by {name}", table)
    return document.page(title, body)


def _paragraphs(texts: tuple[str, ...]) -> str:
    return "<ul>" + "".join(f"<li>{escape(text)}</li>" for text in texts) + "</ul>"
