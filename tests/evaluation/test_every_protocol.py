"""What holds for every protocol, on a stub of a model: a constant one is at chance and named on the page; the order of
examples and the size of batches change nothing."""

from dataclasses import dataclass

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from clip_jax import presets
from clip_jax.data.sources.boxes import Box
from clip_jax.data.sources.sample import Sample
from clip_jax.data.sources.shapes import open_shapes
from clip_jax.devices.sharding import make_mesh
from clip_jax.evaluation import adversarial, audit, cues, dense, grounding, results, runner, typographic
from clip_jax.evaluation.embed import Embedder, Encoders, Variables
from clip_jax.evaluation.groups import Grouping
from clip_jax.evaluation.label_maps import LabelMap
from clip_jax.evaluation.masks import IGNORE
from clip_jax.evaluation.prompts import Prompts
from clip_jax.evaluation.subject import Subject, Task
from clip_jax.models.clip import unit
from clip_jax.reports.evaluation import render
from tests.models.test_clip import SMALL, computed

NAMES = ("cat", "dog", "bird", "fish", "ant")
PICTURES = 20
DIM, LENGTH, PATCHES = 8, 64, 4
SHUFFLED = tuple(2 * pair + i for pair in np.random.default_rng(1).permutation(PICTURES // 2).tolist() for i in (0, 1))
"""Pairs remain together: they are Winoground's examples."""
CAPTIONS = {"winoground": 1, "sugar_crepe": 2, "aro": 2, "caption_order": 3}


@dataclass(frozen=True)
class Made:
    """Random pictures in a given order; the first class has half of them, and most pixels of every mask."""

    order: tuple[int, ...]
    captions: int = 1
    group: str = "relation: on"

    class_names = NAMES
    name = "made"
    fingerprint = property(lambda self: repr(self))
    groups = property(lambda self: (self.group,) * len(self))
    grouping = Grouping(("region",), {"region": 3})
    cues = ("owl", "dog", "moon")

    @property
    def candidates(self):
        """Three rows, with five, six and ten pictures."""
        return tuple(np.array([self.order.index(7 * i % PICTURES) for i in range(n)]) for n in (5, 6, 10))

    @property
    def associated(self):
        return tuple(np.arange(len(c)) % 2 == 1 for c in self.candidates)

    @property
    def rows(self):
        if self.group == "regions":
            return np.array([[i % 4] for i in self.order])
        return np.array([[i % (2 + c) == 0 for c in range(len(NAMES))] for i in self.order])

    def __len__(self):
        return len(self.order)

    def __getitem__(self, index):
        i = self.order[index]
        pixels = np.random.default_rng(i).integers(0, 256, (4, 4, 3), np.uint8).repeat(8, 0).repeat(8, 1)
        texts = tuple(f"picture {i} with caption {k}" for k in range(self.captions))
        return Sample(pixels, texts, f"picture {i}", 0 if i % 2 else i // 2 % len(NAMES))

    def mask(self, index):
        found = np.zeros((32, 24), np.uint8)
        found[:4], found[4:8, :8] = IGNORE, self.order[index] % len(NAMES)
        return found


def task_of(protocol, order=tuple(range(PICTURES))):
    source, prompts = Made(order, CAPTIONS.get(protocol, 1)), Prompts(NAMES, ("a {}", "one {}"))
    if protocol == "caption_order":
        source = Made(order, 3, "true trigrams within_trigrams")
    if protocol == "grouped":
        source = Made(order, 1, "regions")
    if protocol in ("composition", "cues"):
        source = open_shapes("heldout" if protocol == "composition" else "zero_shot", image_size=32, examples=24)
    train = Made(tuple(range(100, 140))) if protocol.startswith("probe") else None
    mapped = LabelMap("mapped", None, ((0, 1), (0, 1), (2,), (), (3, 4)), (0, 1, 2, 3, 4))
    labels = mapped if protocol == "labels" else None
    return Task(protocol, protocol, source, prompts, train, labels=labels)


RNG = np.random.default_rng(0)
PIXELS, WORDS = RNG.normal(size=(16 * 3, DIM)), RNG.normal(size=(LENGTH, 128, DIM))
OF_A_PATCH = RNG.normal(size=(3, DIM))


def letters(texts):
    return np.array([[ord(c) % 128 for c in text[:LENGTH].ljust(LENGTH)] for text in texts], np.int32)


def blocks(pixels):
    """The mean color of each of 4 x 4 patches, about 0."""
    small = jnp.asarray(pixels, jnp.float32).reshape(-1, PATCHES, 32 // PATCHES, PATCHES, 32 // PATCHES, 3)
    return small.mean(axis=(2, 4)) / 128 - 1


def model(*, constant, batch_size=8):
    same = jnp.full(DIM, DIM**-0.5)

    def image(weights, pixels, valid):
        found = unit(blocks(pixels).reshape(len(pixels), -1) @ PIXELS)
        return (jnp.tile(same, (len(pixels), 1)) if constant else found), valid

    def text(weights, tokens):
        found = unit(jnp.asarray(WORDS)[np.arange(LENGTH), tokens].sum(axis=1))
        return jnp.tile(same, (len(tokens), 1)) if constant else found

    mesh = make_mesh(1, devices=jax.devices()[:1])
    embedder = Embedder(
        Encoders(image, text, pooled=image), letters, presets.HALF, 32, mesh, batch_size, 2, computed(SMALL), DIM
    )
    return Subject("constant" if constant else "varied", embedder, Variables({}, {}), 20.0, "")


def patches(*, constant):
    """In place of ``dense.patch_embeddings``."""
    if constant:
        return lambda model, params, pixels: jnp.full((len(pixels), PATCHES, PATCHES, DIM), DIM**-0.5)
    return lambda model, params, pixels: unit(blocks(128 * pixels) @ OF_A_PATCH)


@pytest.fixture(autouse=True)
def short(monkeypatch):
    monkeypatch.setattr(runner, "SEVERITIES", (3,))
    monkeypatch.setattr(runner, "CORRUPTIONS", ("noise", "contrast"))
    monkeypatch.setattr(typographic, "SIZES", (0.2,))
    monkeypatch.setattr(adversarial, "EPSILONS", (8,))
    monkeypatch.setattr(cues, "CONTRASTS", (1.0,))


CHANCE = {
    "zero_shot": {"top1": 1 / 5, "mean_per_class": 1 / 5},
    "retrieval": {"mean_recall@1": 1 / PICTURES, "i2t_R@10": 1 / 2, "t2i_R@10": 1 / 2},
    "composition": {"mean": 1 / 2},
    "winoground": {"text": 1 / 4, "image": 1 / 4, "group": 1 / 6},
    "sugar_crepe": {"mean": 1 / 2},
    "aro": {"mean": 1 / 2},
    "caption_order": {"mean": 1 / 2},
    "multi_label": {"mAP": np.mean(task_of("multi_label").source.rows), "roc_auc": 1 / 2},
    "labels": {"top1": (14 * 2 + 2 * 1 + 2 * 2) / 18 / 5},
    "grouped": {"worst_region_top1": 1 / 5, "worst_region_top5": 1, "top1": 1 / 5},
    "winogavil": {"jaccard": 1 / 3, "jaccard_10_12": 1 / 3},
    "dense": {"mean_iou": 1 / 5, "pixel_accuracy": 1 / 5},
    "corruptions": {"mean": 1 / 5, "clean": 1 / 5},
    "typographic": {"mean": 1 / 5, "clean": 1 / 5, "fooled": 1 / 5},
    "adversarial": {"mean": 1 / 5, "clean": 1 / 5},
    "cues": {"mean": 1 / 8, "conflict_texture": 1 / 8, "shape_bias": 1 / 2},
    "probe": {"lp_acc1": 12 / 20},  # a fitted head knows which class is the most frequent
    "probe_pooled": {"lp_acc1": 12 / 20},
}


@pytest.mark.parametrize("protocol", runner.PROTOCOLS)
def test_a_constant_model_never_scores_above_chance_and_the_page_says_that_it_is_constant(
    protocol, tmp_path, monkeypatch
):
    pages = []
    for constant in (True, False):
        monkeypatch.setattr(dense, "patch_embeddings", patches(constant=constant))
        found = runner.run(task_of(protocol), [model(constant=constant)])
        record = results.store(tmp_path, "stub", task_of(protocol), "0", found)
        pages.append(render("a page", [record], lambda dataset, index: np.zeros((8, 8, 3), np.uint8)))
        if constant:
            scores = {name: found.metrics[name] for name in CHANCE[protocol]}
            assert found.main_metric in scores
            assert all(scores[name] <= chance + 1e-6 for name, chance in CHANCE[protocol].items()), scores
    assert ["All its scores are equal." in page for page in pages] == [True, False]


SHOWN_ELSEWHERE = {"zero_shot", "retrieval", "multi_label", "probe", "probe_pooled"}
"""``test_zero_shot``, ``test_retrieval`` and ``test_probe`` have the same of their functions."""


@pytest.mark.parametrize("protocol", sorted(set(runner.PROTOCOLS) - SHOWN_ELSEWHERE))
def test_the_order_of_examples_and_the_size_of_batches_change_nothing(protocol, monkeypatch):
    """The scenes of ``composition`` and ``cues`` follow from their index: there it is the size of batches alone."""
    monkeypatch.setattr(dense, "patch_embeddings", patches(constant=False))
    first = runner.run(task_of(protocol), [model(constant=False, batch_size=20)]).metrics
    second = runner.run(task_of(protocol, SHUFFLED), [model(constant=False, batch_size=7)]).metrics
    if protocol == "grouped":  # a scale fitted on one half and measured on the other depends on the halves
        first, second = ({n: v for n, v in found.items() if "fitted" not in n} for found in (first, second))
    assert first == pytest.approx(second, abs=1e-6)
    assert any(0 < value < 1 for value in first.values())  # something could have changed


class OnlyLetters:
    """A tokenizer and, with ``complete``, a decoder whose box follows from the text and the image."""

    end_id = 127

    def __call__(self, texts):
        return np.pad(letters(texts), ((0, 0), (0, 1)), constant_values=self.end_id)

    def decode(self, ids):
        left, top = int(ids.sum()) % 200, int(ids[0]) % 300
        return f"a box : {left} {top} {left + 150} {top + 200}"


def complete(weights, pixels, given, count):
    return given + jnp.asarray(pixels[:, 0, 0, 0], jnp.int32)[:, None] + count[:, None]


@dataclass(frozen=True)
class Boxed(Made):
    def __getitem__(self, index):
        i = self.order[index]
        regions = tuple(Box((0.1 * k, 0.2, 0.5 + 0.1 * k, 0.9), f"thing {i} {k}") for k in range(i % 3))
        return super().__getitem__(index)._replace(extras={"boxes": regions})


def test_boxes_do_not_depend_on_the_order_of_examples_and_on_batches():
    def run(order, batch_size):
        embedder = model(constant=False, batch_size=batch_size).embedder
        encoders = embedder.encoders._replace(complete=complete)
        return grounding.boxes(embedder._replace(encoders=encoders, tokenizer=OnlyLetters()), None, Boxed(order))

    first, second = run(tuple(range(PICTURES)), 20), run(SHUFFLED, 7)
    assert first == pytest.approx(second, abs=1e-6) and 0 < first["iou"] < 1 and first["readable"] == 1


def test_an_audit_does_not_depend_on_the_order_of_rows():
    """But for its intervals, which are of rows drawn at random."""

    def run(order):
        subject, source = model(constant=False), Made(order)
        columns = {"kind": tuple(NAMES[i % 2] for i in order), "place": tuple("abc"[i % 3] for i in order)}
        table = audit.Labeled("csv:made", "", (), columns)
        wanted = audit.Wanted("kind", ("place",), "a {}", {}, queries=("a doctor", "a nurse"), k=6)
        found = audit.audit(table, subject.embed(source, texts=False), subject.texts, wanted)
        return [found["accuracy"], *flat(found["by"]), *flat(found["harmful"]), *flat(found["retrieval"])] + [
            group["effect"] for group in found["association"]["place"].values()
        ]

    def flat(found):
        values = [flat(value) if isinstance(value, dict) else [value] for value in found.values()]
        return [value for part in values for value in part]

    for one, other in zip(run(tuple(range(PICTURES))), run(SHUFFLED), strict=True):
        assert one == (other if isinstance(one, str) else pytest.approx(other, abs=1e-6))
