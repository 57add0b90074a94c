import json

import numpy as np
import pytest

from clip_jax.reports import formats
from clip_jax.reports.history import Curve, curves, read_metrics, thin


def test_an_incomplete_last_line_is_ignored(tmp_path):
    path = tmp_path / "metrics.jsonl"
    path.write_text('{"step": 0, "train/loss": 5.5}\n{"step": 10, "train/loss": 5.1}\n{"step": 20, "train/lo')
    assert list(read_metrics(path)) == [{"step": 0, "train/loss": 5.5}, {"step": 10, "train/loss": 5.1}]


def test_a_line_cut_inside_a_character_is_ignored(tmp_path):
    path = tmp_path / "metrics.jsonl"
    path.write_bytes(b'{"step": 0, "train/loss": 5.5}\n' + '{"step": 10, "é'.encode()[:-1])
    assert list(read_metrics(path)) == [{"step": 0, "train/loss": 5.5}]


def test_a_line_appended_to_an_incomplete_one_loses_only_that_line(tmp_path):
    path = tmp_path / "metrics.jsonl"
    path.write_text('{"step": 0, "x": 1}\n{"step": 1, "x"{"step": 1, "x": 2}\n{"step": 2, "x": 3}\n')
    assert [row["step"] for row in read_metrics(path)] == [0, 2]


def test_lines_without_a_finite_step_are_ignored(tmp_path):
    path = tmp_path / "metrics.jsonl"
    path.write_text('\n[1]\n3\nnull\n{"train/loss": 1}\n{"step": "one"}\n{"step": NaN}\n{"step": 4}\n')
    assert list(read_metrics(path)) == [{"step": 4}]


def test_a_missing_file_has_no_lines(tmp_path):
    assert list(read_metrics(tmp_path / "metrics.jsonl")) == []


def test_the_later_line_of_a_step_logged_twice_wins():
    rows = [{"step": 0, "x": 1.0}, {"step": 20, "x": 2.0}, {"step": 10, "x": 3.0}, {"step": 20, "x": 4.0}]
    curve = curves(rows)["x"]
    assert curve.steps.tolist() == [0, 10, 20]
    assert curve.values.tolist() == [1.0, 3.0, 4.0]


def test_only_numbers_become_curves():
    row = json.loads('{"step": 1, "a": 1, "b": 2.5, "text": "x", "flag": true, "none": null, "diverged": NaN}')
    assert set(curves([row])) == {"a", "b", "diverged"}


def test_a_thinned_curve_has_the_mean_and_extremes_of_each_bucket():
    thinned = thin(Curve(np.arange(6.0), np.array([1, 3, 2, 90, 4, 6.0])), points=3)
    assert thinned.mean.tolist() == [2, 46, 5]
    assert thinned.low.tolist() == [1, 2, 4]
    assert thinned.high.tolist() == [3, 90, 6]
    assert thinned.steps.tolist() == [0, 2.5, 5], "the ends are not moved"


def test_thinning_does_not_change_a_curve_of_few_points():
    curve = Curve(np.array([0, 10, 20.0]), np.array([3, 2, 1.0]))
    thinned = thin(curve, points=100)
    for column in (thinned.mean, thinned.low, thinned.high):
        assert column.tolist() == curve.values.tolist()


def test_a_bucket_ignores_values_that_are_not_finite_and_is_nan_without_any_other():
    values = np.array([1, np.nan, np.inf, np.nan, 4, 6])
    thinned = thin(Curve(np.arange(6.0), values), points=3)
    np.testing.assert_equal(thinned.mean, [1, np.nan, 5])
    np.testing.assert_equal(thinned.high, [1, np.nan, 6])


@pytest.mark.parametrize(
    ("format_value", "value", "text"),
    [
        (formats.number, 2.3149, "2.31"),
        (formats.number, 5e-4, "5e-4"),
        (formats.number, 12345.6, "12,346"),
        (formats.number, 0, "0"),
        (formats.number, float("nan"), "nan"),
        (formats.fixed, 2.3, "2.30"),
        (formats.fixed, 10, "10.0"),
        (formats.fixed, 123, "123"),
        (formats.count, 840, "840"),
        (formats.count, 999_600, "1M"),
        (formats.count, 151_277_313, "151M"),
        (formats.count, 12.8e9, "12.8B"),
        (formats.percent, 0.6332, "63.3%"),
        (formats.flops, 3.2e18, "3.2 EFLOP"),
        (formats.flops, 590_561_280, "591 MFLOP"),
        (formats.duration, 161, "0:02:41"),
        (formats.duration, 3 * 86400 + 4 * 3600 + 59, "3 d 4 h"),
        (formats.duration, float("inf"), "unknown"),
    ],
)
def test_a_number_is_formatted_as(format_value, value, text):
    assert format_value(value) == text
