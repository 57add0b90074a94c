"""Protocols of a run beyond retrieval and zero-shot: the same numbers as after it, and canonical prompts for SigLIP."""

import contextlib
import dataclasses
import functools
from types import SimpleNamespace

import jax
import numpy as np
import pytest

from clip_jax import presets
from clip_jax.data.sources.shapes import open_shapes
from clip_jax.data.sources.tar import open_tar
from clip_jax.devices.sharding import make_mesh
from clip_jax.errors import UserError
from clip_jax.evaluation import probe, protocols, runner, subject, typographic
from clip_jax.evaluation.embed import Variables, embed_source, make_embedder
from clip_jax.evaluation.masks import MaskedScenes
from clip_jax.evaluation.prompts import Prompts
from clip_jax.evaluation.protocols import Evaluation
from clip_jax.evaluation.subject import Task
from clip_jax.models.resnet import ResNetTower
from clip_jax.training import loop
from tests.data.shards import sample, write_shard
from tests.evaluation.test_embed import Letters
from tests.models.test_clip import SMALL, computed, params_of


class Recording(Letters):
    def __init__(self):
        self.seen = set()

    def __call__(self, texts):
        self.seen.update(texts)
        return super().__call__(texts)


def evaluation(protocol, source, tokenizer=""):
    mesh = make_mesh(2, devices=jax.devices()[:2])
    embedder = make_embedder(computed(SMALL, mesh=mesh), presets.HALF, Recording(), mesh, 16, workers=2)
    return Evaluation("e", protocol, source, ("A photo of a {}.",), None, embedder, None, tokenizer)


@functools.cache
def weights() -> Variables:
    return Variables(params_of(computed(SMALL)), {})


def test_composition_and_corruptions_in_a_run_are_those_after_it(monkeypatch):
    monkeypatch.setattr(runner, "SEVERITIES", (2,))
    monkeypatch.setattr(runner, "CORRUPTIONS", ("noise", "blur"))
    pictures, labelled = (open_shapes(split, image_size=32, examples=24) for split in ("heldout", "zero_shot"))
    found, _ = protocols.evaluate(evaluation("composition", pictures), weights())
    assert {"eval/e/binding", "eval/e/relation", "eval/e/mean", "eval/e/images"} <= found.keys()
    found, embedded = protocols.evaluate(evaluation("corruptions", labelled), weights())
    assert set(found) == {f"eval/e/{m}" for m in ("mean", "clean", "noise", "blur", "images", "skipped")}
    zero_shot, _ = protocols.evaluate(evaluation("zero_shot", labelled), weights())
    assert found["eval/e/clean"] == pytest.approx(zero_shot["eval/e/zero_shot_top1"]) and len(embedded.images) == 24


def test_evaluations_of_one_step_encode_the_same_prompts_once(monkeypatch):
    """Zero-shot, corruptions and words of a step share their text classifier; the next step has another."""
    encoded, encode = [], subject.embed_texts
    monkeypatch.setattr(subject, "embed_texts", lambda *given: encoded.append(len(given[2])) or encode(*given))
    monkeypatch.setattr(runner, "SEVERITIES", (2,))
    monkeypatch.setattr(runner, "CORRUPTIONS", ("blur",))
    monkeypatch.setattr(typographic, "SIZES", (0.2,))
    labelled = open_shapes("zero_shot", image_size=32, examples=8)
    first = evaluation("zero_shot", labelled)
    evaluations = [first._replace(name=p, protocol=p) for p in ("zero_shot", "corruptions", "typographic")]
    evaluations.append(first._replace(name="other", templates=("a {}", "one {}")))
    recorder = SimpleNamespace(
        pending=SimpleNamespace(settle=lambda: None),
        meter=SimpleNamespace(paused=contextlib.nullcontext),
        write=lambda step, values, line: written.append(values),
    )
    written, run = [], SimpleNamespace(steps=9)
    for step, seed in ((1, 0), (2, 1)):
        state = SimpleNamespace(evaluation_params=params_of(computed(SMALL), seed), batch_stats={})
        loop.evaluate(run, evaluations, state, step, recorder)
    assert encoded == [24, 48, 24, 48]
    assert written[0]["eval/corruptions/clean"] == pytest.approx(written[0]["eval/zero_shot/zero_shot_top1"])


def test_a_probe_in_a_run_is_ridge_on_the_embeddings_of_its_two_sources():
    test, train = (open_shapes("zero_shot", image_size=32, examples=n) for n in (48, 24 * 9))
    one = evaluation("probe", test)._replace(train=train)
    found, embedded = protocols.evaluate(one, weights())
    shots = {f"eval/e/{k}_shot" for k in (1, 2, 4, 8, "all")}  # nine images per class
    assert set(found) == shots | {"eval/e/images", "eval/e/skipped"} and len(embedded.images) == 48
    fitted = embed_source(one.embedder, weights(), train, texts=False)
    head = probe.ridge(fitted.images, fitted.labels, 24)
    assert found["eval/e/all_shot"] == head.accuracy(embedded.images, embedded.labels) > 1 / 24
    protocols.check(one)
    with pytest.raises(UserError, match=r"config.eval.e.train=shapes:zero_shot: the images on which"):
        protocols.check(one._replace(train=test))
    with pytest.raises(UserError, match=r"config.eval.e.train=shapes:heldout: its classes are not those"):
        protocols.check(one._replace(train=open_shapes("heldout", image_size=32, examples=24)))


def test_dense_in_a_run_is_the_one_after_it():
    scenes = open_shapes("heldout", image_size=32, examples=3)
    one = evaluation("dense", scenes)
    found, _ = protocols.evaluate(one, weights())
    masked = MaskedScenes(scenes)
    after = runner.run(
        Task("d", "dense", masked, Prompts(masked.class_names, one.templates)),
        [subject.Subject("m", one.embedder, weights(), 1.0, "")],
    )
    assert found == {f"eval/e/{m}": v for m, v in after.metrics.items()} | {"eval/e/images": 3, "eval/e/skipped": 0}
    model = computed(dataclasses.replace(SMALL, image=ResNetTower(64, (1, 1, 1, 1), 8, 4)))
    with pytest.raises(UserError, match=r"config.eval.e.protocol=dense: the patches of a ResNet"):
        protocols.check(one._replace(embedder=one.embedder._replace(model=model)))


def test_a_source_that_a_protocol_cannot_use_is_said(tmp_path):
    source = open_tar(str(write_shard(tmp_path / "0.tar", [sample(0)])))
    for protocol in set(protocols.PROTOCOLS) - {"retrieval"}:
        with pytest.raises(UserError, match=r"config.eval.e.(source=tar:|protocol=)"):
            protocols.check(evaluation(protocol, source))


@pytest.mark.parametrize(
    ("tokenizer", "expected"), [("siglip2", "a photo of a red circle"), ("clip", "A photo of a red circle.")]
)
def test_the_model_decides_how_prompts_are_written(tokenizer, expected):
    labelled = open_shapes("zero_shot", image_size=32, examples=24)
    one = evaluation("zero_shot", labelled, tokenizer)
    protocols.evaluate(one, weights())
    assert expected in one.embedder.tokenizer.seen
    assert np.all([text == text.lower() for text in one.embedder.tokenizer.seen]) == (tokenizer == "siglip2")
