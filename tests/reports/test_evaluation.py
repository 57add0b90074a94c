"""The page of an evaluation: self-contained, escaped, each picture once, and a constant model is named."""

import re

import numpy as np

from clip_jax.reports.evaluation import render


def record(model, **details):
    return {
        "dataset": "pets",
        "model": model,
        "metrics": {"top1": 0.25, "top5": None, "acc1": 0.25, "i2t_median_rank": 12.0},
        "main_metric": "top1",
        "source": "folder:<pets>",
        "examples": 8,
        "skipped": 1,
        "prompts": "abc",
        "curves": {"reliability": [[0.1, 0.2], [0.5, 0.6]]},
        "details": details,
    }


def pictures(dataset, index):
    return np.full((8, 8, 3), index, np.uint8)


def test_the_page_has_tables_figures_pictures_and_warnings():
    worst = {"class": "<cat>", "top1": 0.0, "images": 4, "taken_for": "dog", "examples": [3, 5]}
    gallery = {"caption": "a & b", "rank": 7, "image": 9, "nearest": [3, 4]}
    first = record(
        "runs/a",
        worst_classes=[worst],
        gallery=[gallery],
        confusion={"classes": ["x", "y"], "counts": [[3, 1], [0, 4]]},
    )
    page = render("two <models>", [first, record("runs/b", all_equal=True)], pictures)
    assert "two &lt;models&gt;" in page and "&lt;cat&gt;" in page and "a &amp; b" in page and "<pets>" not in page
    assert page.count("All its scores are equal") == 1 and "its image ranks 7" in page
    assert page.count("<svg") == 2 and "1 skipped" in page and "prompts abc" in page
    assert "acc1" not in page and ">none<" in page and ">12<" in page.replace("12.0", "12")
    assert len(re.findall(r"\.i\d+\{background-image", page)) == 4  # 3, 5, 4 and 9: one of them is shown twice
    assert not re.search(r"(src|href)=.http|url\(http|<script", page)
