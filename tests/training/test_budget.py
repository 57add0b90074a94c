"""The share of bad examples over all processes, and where it ends a run."""

import json
import re

import numpy as np
import portpicker
import pytest

from clip_jax.data.faults import COLUMNS
from clip_jax.errors import UserError
from clip_jax.training import budget, metrics
from tests.data.shards import sample, write_shard
from tests.training import runs


def counts(**kinds: int) -> np.ndarray:
    return np.array([kinds.get(name, 0) for name in COLUMNS], np.int32)


def test_the_share_is_of_the_last_10_000_examples():
    kept = budget.Budget(0.01, lambda step: 1000 * step, first_step=100)
    for step in range(101, 150):  # 10 of each 1,000, which is not more than 1 %
        kept.check(step, counts(empty_captions=6, undecodable_images=4, cut_captions=500), "")
    with pytest.raises(
        UserError, match=r"^101 of the last 10000 examples of all processes could not be used \(61 empty"
    ):
        kept.check(150, counts(empty_captions=7, undecodable_images=4), "0.tar/7.jpg: empty caption")
    forgotten = budget.Budget(0.01, lambda step: 1000 * step, first_step=0)
    forgotten.check(1, counts(empty_captions=10), "")
    for step in range(2, 12):
        forgotten.check(step, counts(), "")
    forgotten.check(12, counts(empty_captions=100), "")
    few = budget.Budget(0.01, lambda step: 100 * step, first_step=0)
    few.check(9, counts(empty_captions=90), "")  # of 900
    with pytest.raises(UserError, match=r"first: 0.tar/7.jpg.*raise config\.data\.max_bad_share$"):
        few.check(10, counts(), "0.tar/7.jpg: empty caption")


def test_counts_are_of_all_rows_since_the_last_line():
    kept = budget.Budget(0.01, lambda step: 4 * step, first_step=0)
    for _ in range(3):
        kept.add(np.stack([counts(empty_captions=1), counts(cut_captions=2)]))
    assert budget.as_metrics(kept.counts()) == {"bad_examples": 3, "empty_captions": 3, "cut_captions": 6}
    assert budget.as_metrics(kept.counts()) == {}


def test_a_list_of_bad_examples_is_continued_after_a_restart(tmp_path):
    for lines in (["a: empty caption", "b: no image"], ["b: no image", "c: no image"]):
        metrics.add_lines(tmp_path / "bad_samples.txt", lines)
    text = (tmp_path / "bad_samples.txt").read_text()
    assert text.splitlines() == ["a: empty caption", "b: no image", "c: no image"]


@pytest.mark.slow
def test_two_processes_stop_together_though_only_one_reads_bad_examples(tmp_path):
    """Every fifth example is bad. At 16 pairs per step the share is judged from step 63 on."""
    recipe = runs.write_recipe(tmp_path)
    examples = [sample(i, " " if i % 5 == 0 else None) for i in range(50)]
    write_shard(tmp_path / "bad.tar", examples)
    port = portpicker.pick_unused_port()
    common = [f"--config={recipe}", f"--workdir={tmp_path / 'run'}", f"--config.data.train=tar:{tmp_path}/bad.tar"]
    common += ["--config.steps=200", "--config.checkpoint.every_steps=20", "--config.eval.held_out.source="]
    common += ["--config.mesh.cpu_devices=1", f"--coordinator=127.0.0.1:{port}", "--num_processes=2"]
    started = [runs.start(tmp_path, *common, f"--process_id={i}") for i in range(2)]
    printed = [process.communicate(timeout=600)[0] for process in started]
    assert [process.returncode for process in started] == [2, 2], printed
    said = [re.search(r"(\d+) of the last (\d+) examples of all processes could not be used", text) for text in printed]
    assert said[0][0] == said[1][0] and int(said[0][2]) == 63 * 16, printed
    lines = [json.loads(line) for line in (tmp_path / "run/metrics.jsonl").read_text().splitlines()]
    assert sum(line.get("train/empty_captions", 0) for line in lines) == int(said[0][1])
    named = [(tmp_path / "run" / name).read_text().splitlines() for name in ("bad_samples.txt", "bad_samples.1.txt")]
    assert all(re.fullmatch(r"bad.tar/\d+\.jpg: empty caption", line) for line in named[0] + named[1])
    assert {int(line.split("/")[1][:9]) for line in named[0] + named[1]} == set(range(0, 50, 5))
