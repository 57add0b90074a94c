"""Protocols of a run beyond retrieval and zero-shot: the same numbers as after it, and canonical prompts for SigLIP."""

import functools

import jax
import numpy as np
import pytest

from clip_jax import presets
from clip_jax.data.sources.shapes import open_shapes
from clip_jax.data.sources.tar import open_tar
from clip_jax.devices.sharding import make_mesh
from clip_jax.errors import UserError
from clip_jax.evaluation import protocols, runner
from clip_jax.evaluation.embed import Variables, make_embedder
from clip_jax.evaluation.protocols import Evaluation
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
