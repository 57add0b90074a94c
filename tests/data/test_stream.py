"""Batches: pure functions of (seed, k), the same for any split over hosts; bad samples are replaced and counted."""

import dataclasses

import numpy as np
import pytest

from clip_jax.data.order import Order, mix
from clip_jax.data.sources import open_source
from clip_jax.data.sources.mixture import open_mixture
from clip_jax.data.sources.tar import open_tar
from clip_jax.data.stream import Faults, TrainingBatches, read, stream
from clip_jax.data.views import View, pair_views
from clip_jax.errors import UserError
from tests.data.shards import jpeg, sample, write_shard, write_shards


class Lengths:
    """A tokenizer for tests: the length of each caption."""

    context_length, vocab_size, fingerprint = 1, 1000, "lengths"

    def __call__(self, texts):
        return np.array([[len(t)] for t in texts], np.int32)


def batches(source, batch_size=8, max_share=1.0, seed=0, more=None):
    order = Order(len(source), batch_size, seed)
    views = pair_views(
        image_size=24,
        context_length=1,
        tokenizer=Lengths(),
        crop_scale=(0.5, 1.0),
        crop_ratio=(3 / 4, 4 / 3),
        interpolation="bicubic",
    )
    return TrainingBatches(source, order, views | (more or {}), Faults(max_share))


def equal(a, b):
    return a.keys() == b.keys() and all(np.array_equal(a[k], b[k]) for k in a)


def test_the_hosts_rows_together_are_the_global_batch(tmp_path):
    make = batches(open_source(write_shards(tmp_path, 30), image_size=24))
    for step in range(5):
        whole = make(step, np.arange(8))
        for hosts in (2, 4):
            parts = [make(step, rows) for rows in np.split(np.arange(8), hosts)]
            assert equal(whole, {name: np.concatenate([p[name] for p in parts]) for name in whole})


def test_a_stream_that_starts_later_goes_on_with_the_same_batches(tmp_path):
    make = batches(open_source(write_shards(tmp_path, 30), image_size=24))
    whole = list(stream(make, np.arange(8), 0, 6, workers=2, prefetch=3))
    rest = list(stream(make, np.arange(8), 4, 6, workers=1, prefetch=1))
    assert len(whole) == 6 and all(equal(a, b) for a, b in zip(whole[4:], rest, strict=True))


def test_a_batch_is_uint8_int32_int64(tmp_path):
    batch = batches(open_source(write_shards(tmp_path, 9), image_size=24))(0, np.arange(8))
    assert [(batch[k].dtype.name, batch[k].shape) for k in ("image", "text", "index")] == [
        ("uint8", (8, 24, 24, 3)),
        ("int32", (8, 1)),
        ("int64", (8,)),
    ]


def test_another_view_draws_from_its_own_generator_and_changes_no_pair(tmp_path):
    source = open_source(write_shards(tmp_path, 30), image_size=24)

    def fill(sample, rng, arrays):
        arrays["noise"][:] = rng.random(3)

    noise = {"noise": View({"noise": ((3,), np.dtype(np.float32))}, fill)}
    plain, more = batches(source)(2, np.arange(8)), batches(source, more=noise)(2, np.arange(8))
    assert equal(plain, {name: array for name, array in more.items() if name != "noise"})
    halves = [batches(source, more=noise)(2, rows)["noise"] for rows in np.split(np.arange(8), 2)]
    np.testing.assert_array_equal(more["noise"], np.concatenate(halves))
    assert len(np.unique(more["noise"])) == 24


def mixture(tmp_path):
    parts = [open_source(write_shards(tmp_path / name, n), image_size=24) for name, n in (("a", 30), ("b", 7))]
    parts.append(open_source("shapes:zero_shot", image_size=32))
    make, weights = batches(parts[0]), [1.0, 4.0, 0.05]
    order = mix([len(part) for part in parts], weights, 8, seed=0)
    return dataclasses.replace(make, source=open_mixture(parts, weights), order=order)


def test_a_mixture_gives_the_same_batches_on_1_2_and_4_hosts_and_from_any_step(tmp_path):
    """Beyond the epochs of each source and of the mixture, across shards and sources."""
    make = mixture(tmp_path)
    steps = 3 * make.order.epoch // 8
    whole = list(stream(make, np.arange(8), 0, steps, workers=2, prefetch=3))
    source = np.searchsorted([30, 37], np.concatenate([batch["index"] for batch in whole]), side="right")
    assert set(source) == {0, 1, 2} and (source == 0).sum() > 60 and (source == 1).sum() > 60
    for hosts, first in ((2, 5), (4, 11)):
        parts = [
            list(stream(make, rows, first, steps, workers=1, prefetch=2)) for rows in np.split(np.arange(8), hosts)
        ]
        for step, together in enumerate(zip(*parts, strict=True), first):
            assert equal(whole[step], {name: np.concatenate([p[name] for p in together]) for name in whole[step]})


def test_a_mixture_names_its_samples_by_their_source_and_has_no_labels(tmp_path):
    source = mixture(tmp_path).source
    assert len(source) == 37 + 480 and source[31].key == "train-00000.tar/000000001.jpg"
    assert source[40].key == "shapes:zero_shot/3" and source[40].label == -1
    assert source.some(9) == [0, 1, 2, 30, 31, 32, 37, 38, 39]
    with pytest.raises(IndexError):
        source[len(source)]


def faulty(tmp_path):
    samples = [sample(i) for i in range(20)]
    samples[3]["jpg"] = jpeg(3)[:200]
    samples[7]["txt"] = b" "
    return open_tar(str(write_shard(tmp_path / "0.tar", samples)))


def test_a_bad_sample_is_replaced_deterministically_and_counted(tmp_path):
    make = batches(faulty(tmp_path), batch_size=20)
    first, again = make(0, np.arange(20)), make(0, np.arange(20))
    assert equal(first, again)
    assert not {3, 7} & set(first["index"].tolist())
    kept = make.order.batch(0) == first["index"]
    assert kept.sum() == 18  # the others are where the order has them
    assert make.faults.reasons["empty caption"] == 2  # once in each of the two batches
    assert any("000000003" in example for example in make.faults.examples)
    halves = [make(0, rows) for rows in np.split(np.arange(20), 2)]
    assert equal(first, {name: np.concatenate([h[name] for h in halves]) for name in first})


def test_too_many_bad_samples_stop_the_run_with_their_reasons(tmp_path):
    make = batches(faulty(tmp_path), batch_size=20, max_share=0.01)
    with pytest.raises(UserError, match=r"examples could not be used .*empty caption.*max_bad_share"):
        for step in range(100):
            make(step, np.arange(20))


def test_nothing_usable_ends_with_one_line(tmp_path):
    source = open_tar(str(write_shard(tmp_path / "0.tar", [{"jpg": b"no", "txt": b"words"}] * 3)))
    with pytest.raises(UserError, match="100 examples in a row could not be used"):
        batches(source, batch_size=2)(0, np.arange(2))


def test_a_transient_fault_is_retried_and_a_lasting_one_stops(tmp_path, monkeypatch):
    monkeypatch.setattr("clip_jax.data.stream.FIRST_RETRY_SECONDS", 0.001)

    class Flaky:
        name, left = "tar:somewhere", 2

        def __getitem__(self, index):
            self.left -= 1
            if self.left >= 0:
                raise OSError("connection reset")
            return index

    assert read(Flaky(), 5) == 5
    lasting = Flaky()
    lasting.left = 99
    with pytest.raises(UserError, match=r"tar:somewhere: example 5 cannot be read: connection reset"):
        read(lasting, 5)
