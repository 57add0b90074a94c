"""LiT on embeddings that ``clip-jax embed`` wrote: the frozen image tower does not run, and the loss is the same."""

import json
import shutil

import numpy as np
import pytest
from scipy.special import logsumexp

import clip_jax
from clip_jax import commands
from clip_jax import config as configs
from clip_jax.data.sources import open_source
from clip_jax.devices.sharding import make_mesh
from clip_jax.errors import UserError
from clip_jax.evaluation import index
from clip_jax.models import flops
from clip_jax.training import loop, stored_images
from clip_jax.training.setup import make_learner
from tests.training import runs


@pytest.fixture(scope="module")
def embedded(small_run, tmp_path_factory):
    """The recipe, and the settings of a run on the small run's embeddings and from its weights."""
    out = tmp_path_factory.mktemp("embedded") / "out"
    data = f"tar:{small_run.parent / 'train'}"
    arguments = [f"--model={small_run}", f"--data={data}", f"--output={out}", "--shard-size=20", "--batch-size=16"]
    assert commands.main(["embed", *arguments]) == 0
    settings = {
        "data.image_embeddings": str(out),
        "model.init_from": str(small_run),
        "model.frozen": "('image/*',)",
        "tokenizer.vocab": str(next((small_run / "tokenizer").glob("*.model"))),
        "eval.held_out.source": "",
        "steps": "3",
    }
    return str(small_run.parent / "recipe.py"), settings


def test_it_has_no_flops_and_no_pixels_and_needs_a_frozen_tower(embedded):
    recipe, settings = embedded

    def learner(**more):
        config = configs.load(recipe, settings | more)
        return make_learner(config, make_mesh(), steps=3, examples=50)

    made = learner()
    assert {name: leaf.shape for name, leaf in made.batch_spec(16).items()} == {
        "text": (16, 32),
        "image_embedding": (16, 24),
    }
    counted = flops.forward(made.trained_architecture)
    assert counted["image"] == 0 < counted["text"]
    for more, message in (
        ({"model.frozen": "()"}, "only of a frozen image tower"),
        ({"objectives.captioning.weight": "1"}, "objectives.captioning needs the images"),
        ({"model.embed_dim": "16"}, "24 features, and the model has 16"),
        ({"data.image_embeddings": "nowhere"}, "no index.json"),
    ):
        with pytest.raises(UserError, match=message):
            learner(**more)


@pytest.mark.slow
def test_the_loss_of_the_first_step_is_that_of_the_stored_embeddings(embedded, small_run, tmp_path):
    recipe, settings = embedded
    assert loop.run(workdir=str(tmp_path / "run"), recipe=recipe, overrides=settings) == 0
    first = json.loads((tmp_path / "run" / "samples.0.jsonl").read_text().splitlines()[0])
    folder, model = settings["data.image_embeddings"], clip_jax.load(small_run)
    stored = np.concatenate(index.embeddings(tmp_path / folder, "image")).astype(np.float32)
    source = open_source(f"tar:{small_run.parent / 'train'}")
    texts = model.encode_text([source[i].captions[0] for i in first["samples"]])
    logits = model.scale * stored[first["samples"]] @ texts.T
    rows, columns = (logsumexp(logits, axis=axis) for axis in (0, 1))
    metrics = runs.metrics(tmp_path / "run")
    assert metrics[0]["train/loss"] == pytest.approx(float(np.mean((rows + columns) / 2 - np.diag(logits))), rel=1e-3)
    trained = clip_jax.load(tmp_path / "run").params
    assert np.array_equal(trained["image"]["projection"], model.params["image"]["projection"])
    assert np.abs(trained["text"]["projection"] - model.params["text"]["projection"]).max() > 1e-5

    with pytest.raises(UserError, match="embeddings of another model than config"):
        loop.run(workdir=str(tmp_path / "fresh"), recipe=recipe, overrides=settings | {"model.init_from": ""})
    other = shutil.copytree(small_run.parent / "held_out", tmp_path / "other")
    with pytest.raises(UserError, match="of other data than"):
        stored_images.check_source(folder, open_source(f"tar:{other}"))
