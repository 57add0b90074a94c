"""Batches: pure functions of (seed, k), the same for any split over hosts; bad samples are replaced and counted."""

import dataclasses

import numpy as np
import pytest

from clip_jax.data import stream as data_stream
from clip_jax.data.faults import COLUMNS, KINDS, MAX_CHARACTERS, Faults, kind
from clip_jax.data.order import Order, mix
from clip_jax.data.sources import open_source
from clip_jax.data.sources.mixture import open_mixture
from clip_jax.data.sources.sample import Sample
from clip_jax.data.sources.tar import open_tar
from clip_jax.data.stream import TrainingBatches, read, stream
from clip_jax.data.views import View, pair_views
from clip_jax.errors import UserError
from tests.data.shards import jpeg, sample, write_shard, write_shards


class Lengths:
    """A tokenizer for tests: the length of each caption."""

    context_length, vocab_size, fingerprint = 1, 1000, "lengths"

    def __call__(self, texts):
        return np.array([[len(t)] for t in texts], np.int32)


def batches(source, batch_size=8, seed=0, more=None):
    order = Order(len(source), batch_size, seed)
    views = pair_views(
        image_size=24,
        context_length=1,
        tokenizer=Lengths(),
        crop_scale=(0.5, 1.0),
        crop_ratio=(3 / 4, 4 / 3),
        interpolation="bicubic",
    )
    return TrainingBatches(source, order, views | (more or {}), Faults())


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


def test_a_mixture_moves_from_1_to_2_to_4_hosts_across_every_boundary(tmp_path):
    """Three sources, one of three shards, whose epochs end inside of batches, at hosts' rows and at restarts."""
    parts = [open_source(write_shards(tmp_path / str(n), n, shards)) for n, shards in ((21, 3), (8, 1), (5, 2))]
    weights = (1.0, 2.0, 3.0)
    make = dataclasses.replace(
        batches(open_mixture(parts, weights)), order=mix([len(part) for part in parts], weights, batch_size=8, seed=3)
    )
    epoch = make.order.epoch
    assert epoch == 21 + 16 + 15 and epoch % 8
    undisturbed = list(stream(make, np.arange(8), 0, 21, workers=2, prefetch=2))
    found = []
    for hosts, first, last in ((1, 0, 6), (2, 6, 7), (4, 7, 16), (2, 16, 21)):  # 6.5 batches are an epoch
        streams = [stream(make, rows, first, last, workers=1, prefetch=1) for rows in np.split(np.arange(8), hosts)]
        for slices in zip(*streams, strict=True):
            found.append({name: np.concatenate([part[name] for part in slices]) for name in slices[0]})
    assert len(found) == 21 and all(equal(a, b) for a, b in zip(found, undisturbed, strict=True))
    seen = np.zeros(34, int)
    for batch in undisturbed:
        seen += np.bincount(batch["index"], minlength=34)
        for part in np.split(seen, [21, 29]):  # no sample is seen a second time before all others of its source
            assert part.max() - part.min() <= 1
    assert [part.sum() for part in np.split(seen, [21, 29])] == [21 * 168 // 52, 16 * 168 // 52 + 1, 15 * 168 // 52 + 1]


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
    assert first["faults"].sum(axis=0).tolist() == [int(n in ("empty_captions", "undecodable_images")) for n in COLUMNS]
    assert any("000000003" in example for example in make.faults.examples)
    halves = [make(0, rows) for rows in np.split(np.arange(20), 2)]
    assert equal(first, {name: np.concatenate([h[name] for h in halves]) for name in first})


def test_a_caption_of_a_megabyte_is_cut_and_counted(tmp_path):
    samples = [sample(i, "word " * 200_000 if i == 2 else None) for i in range(5)]
    make = batches(open_tar(str(write_shard(tmp_path / "0.tar", samples))), batch_size=5)
    batch = make(0, np.arange(5))
    assert sorted(batch["index"]) == list(range(5))
    assert batch["text"].max() == MAX_CHARACTERS and (batch["text"] < 30).sum() == 4
    counts = batch["faults"][batch["index"] == 2].tolist()
    assert counts == [[int(name == "cut_captions") for name in COLUMNS]] and batch["faults"].sum() == 1
    assert len(read(make.source, 2).captions[0]) == MAX_CHARACTERS


def test_every_reason_has_a_kind():
    assert kind("undecodable image (UnidentifiedImageError)") == "undecodable_images"
    assert kind("image of 70000x70000 pixels is larger than 134217728 pixels") == "oversized_images"
    assert kind("image of floats outside 0..1 and 0..255") == "undecodable_images"
    assert kind("a box is not [x0, y0, x1, y1]") == "unusable_boxes" and kind("?") == "other_bad_examples"
    assert all(kind(beginning) == name for name, beginnings in KINDS.items() for beginning in beginnings)


def test_a_bad_sample_of_a_mixture_is_replaced_by_one_of_its_source(tmp_path):
    parts = [open_source(write_shards(tmp_path / "good", 30)), faulty(tmp_path)]
    order = mix([30, 20], (1.0, 1.0), batch_size=10, seed=0)
    make = dataclasses.replace(batches(open_mixture(parts, (1.0, 1.0))), order=order)
    for step in range(10):
        used = make(step, np.arange(10))["index"]
        assert not {33, 37} & set(used.tolist()) and ((used < 30) == (order.batch(step) < 30)).all()
    assert make.faults.reasons.total() >= 4


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
            return Sample(b"", ("a caption",), str(index))

    assert read(Flaky(), 5).key == "5"
    lasting = Flaky()
    lasting.left = 99
    with pytest.raises(UserError, match=r"tar:somewhere: example 5 cannot be read: connection reset"):
        read(lasting, 5)


def test_the_generator_of_a_pair_is_philox_with_its_key_whatever_was_drawn_before():
    for key in (0, 1, 2**63 + 5, 2**64 - 1):
        found, expected = data_stream._generator_of_thread(key), np.random.Generator(np.random.Philox(key=key))
        for draw in (lambda g: g.random(3).tolist(), lambda g: [g.integers(9) for _ in range(3)]):
            assert draw(found) == draw(expected)
