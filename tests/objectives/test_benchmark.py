"""benchmarks/objectives.py: its runs are valid, and it reads what evaluations measure, at equal cost as well."""

import json
import sys

import numpy as np
import pytest

from clip_jax import config as configs
from tests.test_docs import ROOT


@pytest.fixture
def benchmark(monkeypatch):
    """The module, which imports the files beside it."""
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    monkeypatch.delitem(sys.modules, "objectives", raising=False)
    import objectives

    return objectives


def test_every_run_of_the_comparison_is_a_valid_config_with_one_difference(benchmark):
    recipe = f"{benchmark.RECIPE}:scenes"
    found = {name: configs.load(f"{recipe},{name},runs,data") for name in benchmark.OBJECTIVES}
    plain = found["softmax"].to_json_best_effort()
    assert all(config.to_json_best_effort() != plain for name, config in found.items() if name != "softmax")
    assert len({config.steps for config in found.values()}) == 1
    for of in benchmark.SETS:
        assert "held_out" in configs.load(f"{benchmark.RECIPE}:{of},stage B,runs,data").eval


def test_held_out_numbers_are_those_of_sorted_candidates_and_of_the_loss_by_definition(benchmark):
    rng = np.random.default_rng(0)
    images, texts = (rng.normal(size=(40, 16)).astype(np.float32) for _ in range(2))
    texts += 0.6 * images
    images, texts = (x / np.linalg.norm(x, axis=1, keepdims=True) for x in (images, texts))
    found = benchmark.held_out(images, texts)
    cosines = images @ texts.T
    for name, k in (("R@1", 1), ("R@10", 10)):
        hits = [i in np.argsort(-row)[:k] for c in (cosines, cosines.T) for i, row in enumerate(c)]
        assert found[name][0] == pytest.approx(np.mean(hits), abs=1e-4)
        assert found[name][1] == pytest.approx((np.mean(hits) * (1 - np.mean(hits)) / 40) ** 0.5, rel=0.5)
    ranks = [[list(np.argsort(-row)).index(i) + 1 for i, row in enumerate(c)] for c in (cosines, cosines.T)]
    assert found["median_rank"][0] == np.mean(np.median(ranks, axis=1))

    def softmax(scale: float) -> float:
        """``losses.reference.softmax`` in NumPy."""
        sums = [np.log(np.exp(scale * c).sum(axis=1)) for c in (cosines, cosines.T)]
        return np.mean(sum(sums) / 2 - scale * np.diag(cosines))

    assert found["loss"][0] == pytest.approx(min(map(softmax, np.geomspace(2, 40, 100))), rel=0.01)


def test_the_table_reads_a_run_at_equal_cost_and_lists_what_is_missing(benchmark):
    run = {"set": "scenes", "steps": 300, "held_out": 512, "loss": [4.0, 0.1], "R@1": [0.2, 0.01], "R@10": [0.6, 0.02]}
    run |= {"median_rank": [7.0, 0.5], "probe": 0.7, "curve": [[150, 0.1, 0.4, 9.0], [300, 0.2, 0.6, 7.0]], "seed": 0}
    lines = [
        run | {"objective": "softmax"},
        run | {"objective": "captioning"},
        {
            "set": "scenes",
            "objective": "times",
            "seed": 0,
            "seconds": {"softmax": [0.1, 0.2], "captioning": [0.15, 0.3]},
        },
    ]
    text = benchmark.table(json.loads(json.dumps(lines)), ["icons/softmax/0", "icons/softmax/1"])
    cells = next(line for line in text.splitlines() if line.startswith("| captioning")).split(" | ")
    assert cells[-3:-1] == ["1.50", "0.133"]  # a third of the way from step 150 to step 300
    assert text.endswith("Not reached (2 rows, with their seeds): icons: softmax 0 1.")
