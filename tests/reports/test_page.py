import re
from html.parser import HTMLParser

import numpy as np
import pytest

from clip_jax.reports import page, summary
from clip_jax.reports.gallery import Gallery
from clip_jax.reports.history import Curve
from tests.reports.runs import ROWS, RUN, shapes_gallery, write_run

VOID = {"meta", "br", "img", "input", "link", "hr"}


class Page(HTMLParser):
    """What a browser would see: headings, text, unclosed tags, and the addresses it would fetch."""

    def __init__(self, html: str) -> None:
        super().__init__()
        self.open, self.headings, self.addresses, self.text, self.tags = [], [], [], "", set()
        self.addresses += re.findall(r"url\(([^)]{0,40})", html) + re.findall(r"@import.*", html)
        self.feed(html)
        self.close()

    def handle_starttag(self, tag, attrs):
        self.tags.add(tag)
        self.open += [] if tag in VOID else [tag]
        self.addresses += [value for name, value in attrs if name in ("src", "href", "xlink:href", "srcset", "action")]

    def handle_startendtag(self, tag, attrs):
        self.handle_starttag(tag, attrs)
        if tag not in VOID:
            self.open.pop()

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        if self.open and self.open[-1] in ("h1", "h2", "summary"):
            self.headings.append(data)
        if self.open and self.open[-1] != "style":
            self.text += f"{data}\n"


def read(path) -> Page:
    return Page(path.read_text(encoding="utf-8"))


@pytest.fixture(scope="module")
def demo(tmp_path_factory) -> Page:
    folder = write_run(tmp_path_factory.mktemp("runs") / "demo", ROWS)
    return read(page.write(folder, shapes_gallery()))


def test_the_page_has_its_sections_in_order(demo):
    assert demo.open == [], "every tag is closed"
    assert demo.headings[:7] == [
        "demo",
        "Learning",
        "Optimization and throughput",
        "Evaluation",
        "Similarity of held-out pairs: shapes",
        "Images retrieved by caption: shapes",
        "Config",
    ]
    assert "Environment" in demo.headings and "Other metrics" not in demo.headings


def test_the_page_needs_no_network_and_no_scripts(demo):
    assert demo.addresses
    assert all(address.startswith(("data:image/", "#")) for address in demo.addresses)
    assert not demo.tags & {"script", "link", "iframe", "object", "embed"}


def test_the_headline_is_the_last_logged_value_of_each_result(demo):
    text = demo.text
    last = {name: value for row in ROWS for name, value in row.items()}
    for metric in ("train/loss", "eval/shapes/loss"):
        assert f"\n{last[metric]:.3f}\n" in text
    for metric in ("eval/shapes/zero_shot_top1", "eval/shapes/i2t_R@1", "eval/shapes/t2i_R@1"):
        assert f"\n{100 * last[metric]:.1f}%\n" in text
    assert f"R@5 {100 * last['eval/shapes/i2t_R@5']:.1f}%" in text
    assert "ViT-Ti/8 · 8.69M parameters (image 5.48M, text 3.21M)" in text
    assert "\n2,400 steps · batches of 256 pairs · 615k pairs seen" in text


def test_a_held_out_loss_that_has_risen_is_shown_with_its_minimum(tmp_path):
    rows = [{"step": step, "eval/x/loss": loss} for step, loss in ((0, 5.0), (100, 1.25), (200, 1.5))]
    assert "x, lowest 1.25 at step 100" in read(page.write(write_run(tmp_path / "run", rows))).text
    assert "lowest" not in read(page.write(write_run(tmp_path / "run", rows[:2]))).text


def test_the_training_time_is_pairs_divided_by_pairs_per_second(tmp_path):
    rows = [
        {"step": 0, "train/pairs": 100, "train/pairs_per_second": 10},  # 10 s
        {"step": 1, "train/pairs": 300, "train/pairs_per_second": 100},  # 2 s
        {"step": 2, "train/pairs": 500, "train/pairs_per_second": 4},  # 50 s
    ]
    assert "0:01:02" in read(page.write(write_run(tmp_path / "run", rows))).text


def test_an_unfinished_run_shows_the_steps_done_and_planned(tmp_path):
    text = read(page.write(write_run(tmp_path / "run", [{"step": 1190, "x": 1}, {"step": 1200, "x": 1}]))).text
    assert "1,200 of 2,400 steps" in text


def test_the_chance_level_is_drawn_for_the_softmax_loss_only(tmp_path):
    rows = [{"step": 0, "train/loss": 5.6}, {"step": 10, "train/loss": 5.0}]
    assert "chance: ln 256 = 5.55" in read(page.write(write_run(tmp_path / "run", rows))).text
    sigmoid = RUN | {"config": RUN["config"] | {"loss": {"name": "sigmoid"}}}
    assert "chance" not in read(page.write(write_run(tmp_path / "run", rows, sigmoid))).text


def test_the_losses_of_a_batch_and_of_the_held_out_set_have_scales_and_chances_of_their_own(tmp_path):
    """The loss of guessing among N texts is ln N: 5.55 in a batch of 256, 9.21 among 10,000 held-out pairs."""
    rows = [{"step": s, "train/loss": 5.0, "eval/x/loss": 8.5, "eval/x/images": 10_000} for s in (0, 10)]
    text = read(page.write(write_run(tmp_path / "run", rows))).text
    training = text[
        text.index("training loss, in batches of 256") : text.index("held-out loss, among all 10,000 pairs")
    ]
    assert "chance: ln 256 = 5.55" in training and "train 5" in training and "held out" not in training
    assert "chance: ln 10,000 = 9.21" in text and "held out 8.5" in text
    changed = [*rows, {"step": 20, "eval/x/loss": 8.0, "eval/x/images": 500}]  # the source was exchanged
    assert text.count("chance") == 2
    assert read(page.write(write_run(tmp_path / "changed", changed))).text.count("chance") == 1


def test_matches_among_a_part_of_the_set_are_said_to_be_so(tmp_path, gallery):
    rows = [{"step": 0, "train/loss": 5.6}]
    whole = read(page.write(write_run(tmp_path / "whole", rows), gallery)).text
    assert "images their caption." in whole and "alone" not in whole
    part = read(page.write(write_run(tmp_path / "part", rows), gallery._replace(of=5000))).text
    assert "among these 16 alone: the recalls above are among all 5,000 images of the evaluation." in part


def test_bad_samples_and_the_commit_are_shown(tmp_path):
    folder = write_run(tmp_path / "run", [{"step": 0, "train/loss": 5.6}], RUN | {"commit": "0123456789ab-dirty"})
    clean = read(page.write(folder)).text
    assert "commit 0123456789ab-dirty" in clean and "Bad samples" not in clean
    (folder / "bad_samples.txt").write_text("".join(f"<{i}>.jpg: empty image file\n" for i in range(25)))
    (folder / "bad_samples.1.txt").write_text("other.jpg: empty image file\n")
    shown = read(page.write(folder))
    assert "Bad samples: 26 listed" in shown.text and "<3>.jpg: empty image file" in shown.text
    assert "and 6 more" in shown.text and shown.open == []


def test_the_shares_of_the_objectives_in_a_step_are_shown_if_there_are_several(tmp_path):
    rows = [{"step": 0, "train/loss": 5.6}]
    alone = RUN | {"flops_shares": {"towers": 0.999, "contrastive": 0.001}}
    assert "FLOPs of a step" not in read(page.write(write_run(tmp_path / "alone", rows, alone))).text
    both = RUN | {"flops_shares": {"contrastive": 0.01, "towers": 0.63, "captioning": 0.36}}
    shown = read(page.write(write_run(tmp_path / "both", rows, both))).text
    assert "FLOPs of a step: towers 63%, captioning 36%, contrastive 1%" in shown


SOFTMAX, SIGMOID = {"loss": "softmax", "weight": 1.0}, {"loss": "sigmoid", "weight": 1.0}


@pytest.mark.parametrize(
    ("sections", "expected"),
    [
        ({"loss": {"name": "softmax"}}, (np.log(256), "ln 256")),
        ({"objectives": {"contrastive": SOFTMAX}}, (np.log(256), "ln 256")),
        ({"objectives": {"contrastive": {"loss": "softmax"}}}, (np.log(256), "ln 256")),
        ({"objectives": {"contrastive": SOFTMAX, "captioning": {"weight": 0.0}}}, (np.log(256), "ln 256")),
        ({"objectives": {"contrastive": SOFTMAX | {"weight": 0.5}}}, (np.log(256) / 2, "0.5 ln 256")),
        ({"loss": {"name": "sigmoid"}}, None),
        ({"objectives": {"contrastive": SIGMOID}}, None),
        # The sum of several objectives has no such level.
        ({"objectives": {"contrastive": SOFTMAX, "captioning": {"weight": 2.0}}}, None),
        ({"objectives": {"captioning": {"weight": 2.0}}}, None),
        ({}, None),
        ({"loss": None, "objectives": 3}, None),
        ({"objectives": {"contrastive": "softmax"}}, None),
        ({"loss": {"name": "softmax"}, "batch_size": None}, None),
    ],
)
def test_the_loss_of_a_random_model_is_read_from_old_and_new_configs(sections, expected):
    found = summary.chance_loss({"batch_size": 256} | sections)
    assert found == (expected and (pytest.approx(expected[0]), expected[1]))


def test_evaluations_are_found_by_the_names_of_their_metrics():
    names = [
        "train/loss",
        "eval/time_seconds",
        "eval/coco/i2t_R@1",
        "eval/imagenet/v2/zero_shot_top1",
        "eval/coco/loss",
    ]
    found = summary.by_evaluation(dict.fromkeys(names, Curve(np.zeros(1), np.ones(1))), first="imagenet/v2")
    assert {name: list(metrics) for name, metrics in found.items()} == {
        "imagenet/v2": ["zero_shot_top1"],
        "coco": ["i2t_R@1", "loss"],
    }
    assert list(found) == ["imagenet/v2", "coco"]


def test_every_evaluation_has_a_row_and_that_of_the_gallery_comes_first(tmp_path, gallery):
    rows = [{"step": s, "eval/coco/t2i_R@1": 0.3, "eval/a/b/loss": 2.0, "eval/shapes/t2i_R@1": 0.8} for s in (0, 100)]
    text = read(page.write(write_run(tmp_path / "run", rows), gallery)).text
    assert "\ntext → image R@1\n80.0%\nshapes\n" in text
    assert text.index("\nshapes\n80.0%") < text.index("\ncoco\n30.0%") < text.index("\na/b\n2.00")


def test_zero_shot_and_retrieval_of_different_evaluations_share_the_figure_of_accuracies(tmp_path):
    rows = [{"step": s, "eval/pairs/i2t_R@1": 0.25, "eval/classes/zero_shot_top1": 0.5} for s in (0, 100)]
    text = read(page.write(write_run(tmp_path / "run", rows))).text
    figure = text[text.index("\naccuracy\n") : text.index("\nEvaluation\n")]
    assert "zero-shot 50.0%" in figure and "i2t R@1 25.0%" in figure
    assert text.count("zero-shot 50.0%") == 1 and "image → text, pairs" not in text, "nothing is drawn twice"


def test_counts_of_an_evaluation_appear_only_in_the_table(tmp_path):
    rows = [{"step": s, "eval/x/loss": 1.5, "eval/x/images": 50_000, "eval/x/skipped": 3} for s in (0, 100)]
    written = read(page.write(write_run(tmp_path / "run", rows)))
    assert "\nloss\nimages\nskipped\nx\n1.50\n50,000\n3\n" in written.text
    assert "Other metrics" not in written.headings


def test_an_unknown_metric_gets_a_plain_curve(tmp_path):
    rows = [{"step": s, "train/skipped_samples": s, "eval/x/linear_probe": 0.5} for s in range(3)]
    written = read(page.write(write_run(tmp_path / "run", rows)))
    assert "Other metrics" in written.headings
    assert "\ntrain/skipped_samples\n" in written.text and "\neval/x/linear_probe\n" in written.text


def test_values_that_are_not_finite_cause_a_warning(tmp_path):
    rows = [{"step": s, "train/loss": 1.0 if s < 70 else float("nan")} for s in range(0, 100, 10)]
    text = read(page.write(write_run(tmp_path / "run", rows))).text
    assert "train/loss is not finite at 3 of 10 logged steps, first at step 70." in text


@pytest.mark.parametrize("metrics", [None, "", "\n", '{"step": 0, "trai'])
@pytest.mark.parametrize("run", [None, "", "[]", '{"config": ', '{"config": null, "model": {"parameters": 3}}'])
def test_a_folder_without_metrics_or_settings_still_has_a_page(tmp_path, metrics, run):
    for name, content in (("metrics.jsonl", metrics), ("run.json", run)):
        if content is not None:
            (tmp_path / name).write_text(content)
    written = read(page.write(tmp_path, None))
    assert written.headings[0] == tmp_path.name
    assert "No metrics have been logged yet." in written.text


def test_an_incomplete_last_line_does_not_change_the_page(tmp_path):
    run_folder = write_run(tmp_path / "run", [{"step": 0, "train/loss": 5.6}, {"step": 10, "train/loss": 5.0}])
    complete = page.write(run_folder).read_bytes()
    with (run_folder / "metrics.jsonl").open("a") as metrics:
        metrics.write('{"step": 2410, "train/loss": 0.')
    assert page.write(run_folder).read_bytes() == complete


def test_everything_from_the_folder_is_escaped(tmp_path, gallery):
    hostile = "<script>alert(1)</script>\"'&"
    run = {
        "config": {hostile: hostile, "a": {hostile: {hostile: [hostile]}}},
        "devices": hostile,
        "model": {"name": hostile},
    }
    rows = [
        {"step": s, hostile: float("nan"), f"eval/{hostile}x/loss": 1.0, f"eval/{hostile}x/i2t_R@1": 0.5}
        for s in range(2)
    ]
    named = Gallery(gallery.images, (hostile, *gallery.captions[1:]), gallery.similarity, hostile)
    written = read(page.write(write_run(tmp_path / "a<script>b", rows, run), named))
    assert "script" not in written.tags and written.open == []
    assert written.text.count(hostile) >= 8, "it is still visible"


def test_the_page_of_a_long_run_with_photos_is_smaller_than_two_megabytes(tmp_path):
    rng = np.random.default_rng(0)
    rows = [{"step": s} | {f"train/{name}": rng.random() for name in ("loss", "accuracy", "grad_norm", "param_norm")}
            for s in range(20_000)]  # fmt: skip
    n = 64  # Noise is the worst case of JPEG.
    images = rng.integers(0, 256, (n, 224, 224, 3), np.uint8)
    similarity = rng.standard_normal((n, n)).astype(np.float32)
    path = page.write(write_run(tmp_path / "run", rows), Gallery(images, ("caption",) * n, similarity, "noise"))
    assert path.stat().st_size < 2e6


def test_the_page_is_replaced_and_no_temporary_file_remains(tmp_path):
    run_folder = write_run(tmp_path / "run", [{"step": 0, "train/loss": 5.6}])
    (run_folder / "report.html").write_text("old")
    assert page.write(run_folder) == run_folder / "report.html"
    assert sorted(p.name for p in run_folder.iterdir()) == ["metrics.jsonl", "report.html", "run.json"]
    assert (run_folder / "report.html").read_text().endswith("</html>\n")


def test_config_values_are_shown_as_in_json(demo):
    text = demo.text
    for key, value in (
        ("learning_rate", "0.0005"),
        ("micro_batch", "null"),
        ("crop", "[0.9, 1.0]"),
        ("remat", "false"),
    ):
        assert f"\n{key}\n{value}\n" in text
    for package, version in RUN["versions"].items():
        assert f"\n{package}\n{version}\n" in text
