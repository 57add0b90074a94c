"""Text length buckets: shorter texts give the same embeddings, and every process takes the global batch's bucket."""

import jax
import numpy as np
import pytest

from clip_jax import config as configs
from clip_jax.devices.sharding import make_mesh
from clip_jax.errors import UserError
from clip_jax.models.clip import CLIP
from clip_jax.training import text_buckets
from clip_jax.training.setup import make_learner
from tests.models.test_clip import SMALL, params_of
from tests.training import runs
from tests.training.test_resume import run_together

TOWER, END = SMALL.text, 99


def texts(*lengths):
    """Random tokens with the end token, the highest, as the last of so many, and padding after it."""
    rng, tokens = np.random.default_rng(0), np.zeros((len(lengths), TOWER.context_length), np.int32)
    for row, length in enumerate(lengths):
        tokens[row, : length - 1] = rng.integers(1, END, length - 1)
        tokens[row, length - 1] = END
    return tokens


def test_the_bucket_is_the_shortest_that_holds_every_text():
    for longest, expected in ((2, 4), (4, 4), (5, 8), (8, 8), (9, 12), (12, 12)):
        given = texts(2, longest, 3)
        found = text_buckets.cut(given, TOWER, (4, 8, 12))
        np.testing.assert_array_equal(found, given[:, :expected])


def test_all_processes_take_the_bucket_of_the_global_batch(monkeypatch):
    given = texts(3, 2, 7, 4)
    parts = np.split(given, 2)
    longest = [text_buckets.longest_text(part, TOWER) for part in parts]
    assert longest == [3, 7]
    monkeypatch.setattr(jax, "process_count", lambda: 2)
    for part, own in zip(parts, longest, strict=True):

        def gathered(value, own=own):
            assert value == own
            return np.array(longest)

        monkeypatch.setattr(text_buckets.multihost_utils, "process_allgather", gathered)
        np.testing.assert_array_equal(text_buckets.cut(part, TOWER, (4, 8, 12)), part[:, :8])


@pytest.mark.slow
def test_embeddings_of_cut_texts_are_those_of_the_full_length():
    model, given = CLIP(SMALL), texts(2, 6, 4, 8)
    params = params_of(model)
    full, cut = (np.asarray(model.encode_text(params, given[:, :length])) for length in (TOWER.context_length, 8))
    np.testing.assert_allclose(cut, full, atol=1e-6, rtol=1e-6)
    assert np.abs(full[0] - full[1]).max() > 1e-2


def test_the_step_of_every_bucket_is_lowered_for_a_plan():
    config = configs.load("configs/demo.py", {"data.text_buckets": "(16, 32)"})
    learner = make_learner(config, make_mesh(), steps=10, examples=100)
    lowered = learner.lower(16, 16)
    assert lowered.in_avals[0][1]["text"].shape == (16, 16)
    assert learner.lower(16).in_avals[0][1]["text"].shape == (16, 32)


@pytest.mark.parametrize(
    ("recipe", "overrides", "message"),
    [
        ("siglip_b16", {"data.text_buckets": "(16, 64)"}, "ViT-B/16-SigLIP is not one: leave it out"),
        ("demo", {"data.text_buckets": "(16, 30)"}, "the last one must be the context length, 32"),
        ("demo", {"data.text_buckets": "(32, 16)"}, "from the shortest up"),
        ("demo", {"data.text_buckets": "(1.5, 32)"}, "from the shortest up"),
        (
            "demo",
            {"data.text_buckets": "(16, 32)", "objectives.contrastive.negatives": "1"},
            "not with objectives.contrastive.negatives",
        ),
    ],
)
def test_what_needs_all_tokens_is_refused_in_one_line(recipe, overrides, message):
    with pytest.raises(UserError, match=message) as error:
        config = configs.load(f"configs/{recipe}.py", overrides)
        make_learner(config, make_mesh(), steps=10, examples=100)
    assert "\n" not in str(error.value)


@pytest.mark.slow
def test_a_run_in_buckets_has_the_losses_of_one_without_on_two_processes(tmp_path):
    recipe = runs.write_recipe(tmp_path)
    buckets, found = "--config.data.text_buckets=(9,10,11,32)", {}
    for name, processes, settings in (("full", 1, ()), ("two", 2, (buckets,))):
        devices = f"--config.mesh.cpu_devices={2 // processes}"
        given = (f"--config={recipe}", f"--workdir={tmp_path / name}", "--config.steps=6", devices, *settings)
        run_together(tmp_path, processes, *given)
        found[name] = runs.metrics(tmp_path / name)
    for ours, theirs in zip(found["two"], found["full"], strict=True):
        assert ours == pytest.approx(theirs, rel=1e-4, abs=1e-5)
