import re
from xml.etree import ElementTree

import numpy as np
import pytest

from clip_jax.reports import plots
from clip_jax.reports.history import Curve
from clip_jax.reports.plots import Line, figure


def texts(svg: str) -> list[str]:
    return [element.text or "" for element in ElementTree.fromstring(svg).iter("{http://www.w3.org/2000/svg}text")]


def curve(n: int, low: float = 0.1, high: float = 1.0) -> Curve:
    return Curve(np.arange(n) * 10.0, np.linspace(high, low, n))


def test_a_figure_of_a_million_points_is_no_larger_than_one_of_a_thousand():
    rng = np.random.default_rng(0)
    sizes = [
        len(figure([Line(Curve(np.arange(float(n)), rng.random(n)), "blue")], description="loss"))
        for n in (1000, 1_000_000)
    ]
    assert sizes[1] < 1.2 * sizes[0] < 100_000


def test_a_line_is_labeled_with_its_name_and_last_value():
    svg = figure([Line(curve(50, low=0.25), "blue", "train")], description="loss")
    assert "train 0.25" in texts(svg)
    svg = figure([Line(curve(50, low=0.25), "orange", "zero-shot")], description="accuracy", percent=True)
    assert "zero-shot 25.0%" in texts(svg)


def test_the_step_axis_also_shows_pairs_if_they_are_known():
    steps = np.arange(0, 2001, 10.0)
    pairs = Curve(steps, 256 * steps)
    shown = texts(figure([Line(Curve(steps, steps), "blue")], description="loss", pairs=pairs))
    assert shown.index("1,000") >= 0 and "256k" in shown
    assert "256k" not in texts(figure([Line(Curve(steps, steps), "blue")], description="loss"))


def test_every_color_is_a_css_variable():
    lines = [Line(curve(50), color, color) for color in plots.PALETTE if color not in ("ink", "muted", "hairline")]
    svg = figure(lines, description="loss", reference=(0.5, "chance"), pairs=curve(50, low=500, high=0))
    paints = re.findall(r"(?:fill|stroke): ([^;\"]+)", svg)
    assert {paint for paint in paints if not paint.startswith("var(")} <= {"none"}
    assert {f"var(--{line.color})" for line in lines} <= set(paints)
    assert all("fill: var(--" in text for text in re.findall(r"<text[^>]*>", svg)), "black text on a dark page"


def test_values_over_several_decades_have_a_logarithmic_axis():
    steps = np.arange(100.0)
    assert {"1", "10", "100"} <= set(
        texts(figure([Line(Curve(steps, np.geomspace(0.5, 500, 100)), "blue")], description="x"))
    )


@pytest.mark.parametrize("values", [[1.0], [np.nan, np.nan], [0.0, 0.0], [-1.0, 5.0], [1.0, np.inf]])
def test_every_curve_can_be_drawn(values):
    steps = np.arange(float(len(values)))
    for options in ({}, {"percent": True}, {"from_zero": True}, {"pairs": Curve(steps, steps)}):
        ElementTree.fromstring(figure([Line(Curve(steps, np.array(values)), "blue", "x")], description='"<', **options))


def test_a_label_is_shown_verbatim():
    label = r"a & <b> $\alpha$"
    assert f"{label} 0.1" in texts(figure([Line(curve(50), "blue", label)], description="x"))


def test_labels_keep_their_order_and_do_not_overlap():
    rng = np.random.default_rng(0)
    for _ in range(200):
        heights = rng.uniform(0, 200, rng.integers(1, 10))
        spread = plots._spread(heights, 15, 0, 200)
        assert (np.diff(np.sort(spread)) >= 15 - 1e-9).all()
        assert (np.argsort(spread) == np.argsort(heights)).all()
        assert spread.min() >= 0 and spread.max() <= 200


def test_labels_that_do_not_overlap_are_not_moved():
    assert plots._spread(np.array([150.0, 20.0, 80.0]), 15, 0, 200).tolist() == [150, 20, 80]
