"""Every sample is embedded exactly once, whatever the batch size and mesh; unusable ones are left out and counted."""

import jax
import numpy as np
import pytest

from clip_jax import presets
from clip_jax.data.sources.tar import open_tar
from clip_jax.devices.sharding import make_mesh
from clip_jax.errors import UserError
from clip_jax.evaluation.embed import Variables, embed_source, make_embedder
from clip_jax.evaluation.protocols import Evaluation, check_one_batch
from tests.data.shards import jpeg, sample, write_shard
from tests.models.test_clip import SMALL, computed, params_of


class Letters:
    """A tokenizer for tests: the codes of the first letters."""

    context_length, vocab_size, fingerprint = 12, 100, "letters"

    def __call__(self, texts):
        return np.array([[ord(c) % 100 for c in text[:12].ljust(12)] for text in texts], np.int32)


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    samples = [sample(i) for i in range(21)]
    samples[4]["jpg"] = jpeg(4)[:150]
    samples[9]["txt"] = b""
    return open_tar(str(write_shard(tmp_path_factory.mktemp("shards") / "0.tar", samples)))


def embed(source, devices, batch_size):
    mesh = make_mesh(devices, devices=jax.devices()[:devices])
    clip = computed(SMALL, mesh=mesh)
    embedder = make_embedder(clip, presets.HALF, Letters(), mesh, batch_size, workers=2)
    return embed_source(embedder, Variables(params_of(computed(SMALL)), {}), source)


@pytest.fixture(scope="module")
def at_once(source):
    """All samples in one batch on one device."""
    return embed(source, 1, 21)


@pytest.fixture(scope="module")
def on_eight(source):
    """In batches of eight on as many devices."""
    return embed(source, 8, 8)


@pytest.mark.parametrize(("devices", "batch_size"), [(8, 8), (8, 5), (2, 16), (1, 100)])
def test_every_usable_sample_once_for_any_batch_and_mesh(source, at_once, on_eight, devices, batch_size):
    found = on_eight if (devices, batch_size) == (8, 8) else embed(source, devices, batch_size)
    assert found.indices.tolist() == [i for i in range(21) if i not in (4, 9)]
    assert found.captions == tuple(f"picture number {i}" for i in found.indices)
    assert found.owner.tolist() == list(range(19))
    np.testing.assert_allclose(found.images, at_once.images, atol=1e-5)
    np.testing.assert_allclose(found.texts, at_once.texts, atol=1e-5)


def test_what_is_left_out_is_counted_by_reason(on_eight):
    skipped = on_eight.skipped
    assert skipped.total() == 2 and skipped["empty caption"] == 1
    assert any("undecodable image" in reason for reason in skipped)


def test_a_label_that_is_no_class_is_refused_in_the_first_batch(source):
    class Labeled:
        name, fingerprint, class_names = "tfds:pets/test", "", ("cat", "dog")

        def __len__(self):
            return 3

        def __getitem__(self, index):
            return source[index]._replace(label=(0, 1, -1)[index])

    mesh = make_mesh(1, devices=jax.devices()[:1])
    embedder = make_embedder(computed(SMALL, mesh=mesh), presets.HALF, Letters(), mesh, 4, workers=1)
    evaluation = Evaluation("pets", "zero_shot", Labeled(), ("{}",), None, embedder, None)
    with pytest.raises(
        UserError, match=r"config.eval.pets: tfds:pets/test: 1 of 3 labels are not in 0\.\.1 \(example 2 "
    ):
        check_one_batch(evaluation, Variables(params_of(computed(SMALL)), {}))


def test_all_captions_of_an_image_are_embedded_and_owned(source):
    several = open_tar(str(source.shards[0]), caption="tags")
    found = embed(several, 8, 8)
    assert len(found.texts) == 2 * len(found.images) == 40
    assert found.owner.tolist() == [i for i in range(20) for _ in range(2)]
