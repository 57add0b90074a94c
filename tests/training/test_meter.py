"""Speed and MFU of a log line, against figures computed by hand."""

from types import SimpleNamespace

import pytest

from clip_jax import config as configs
from clip_jax.devices import hardware
from clip_jax.models import flops
from clip_jax.training import loop, meter

PRESET = configs.resolve_preset(configs.defaults())  # ViT-B/32


@pytest.fixture
def clock(monkeypatch):
    """A clock that the test moves."""
    now = SimpleNamespace(seconds=100.0)
    monkeypatch.setattr(meter.time, "perf_counter", lambda: now.seconds)
    return now


def run_on(device_kind, devices, batch_size):
    peak = hardware.peak_flops(device_kind)
    return {
        "batch_size": batch_size,
        "seen": lambda step: step * batch_size,
        "flops": lambda step: step * batch_size * flops.training(PRESET.architecture),
        "peak_flops": None if peak is None else peak * devices,
    }


def test_mfu_is_the_models_flops_in_a_second_over_those_of_all_chips(clock):
    """Ten steps of 4,096 pairs in 8 s on 16 v5e chips of 197 TFLOP/s, of which 2 s went into an evaluation and 1.5 s
    into waiting for data."""
    measured = meter.Meter(**run_on("TPU v5 lite", 16, 4096), first_step=0)
    assert "train/mfu" not in measured.read(1, {"loss": 1.0})  # its time is the compiler's
    clock.seconds += 4.5
    with measured.waiting():
        clock.seconds += 1.5
    with measured.paused():
        clock.seconds += 2
    line = measured.read(11, {"loss": 1.0})
    assert line["train/pairs_per_second"] == pytest.approx(40_960 / 6)
    assert line["train/mfu"] == pytest.approx(40_960 / 6 * flops.training(PRESET.architecture) / (16 * 197e12))
    assert line["train/data_wait_share"] == pytest.approx(0.25)
    assert line["train/flops"] == 11 * 4096 * flops.training(PRESET.architecture)


def test_a_chip_that_is_not_in_the_table_has_a_speed_and_no_mfu(clock):
    measured = meter.Meter(**run_on("TPU v99", 1, 64), first_step=0)
    measured.read(1, {})
    clock.seconds += 1
    line = measured.read(2, {})
    assert line["train/pairs_per_second"] == pytest.approx(64) and "train/mfu" not in line


def test_every_chip_of_the_table_is_known_by_what_jax_calls_it():
    for chip in (*hardware.TPUS, *hardware.GPUS):
        assert chip.device_kinds
        for kind in chip.device_kinds:
            assert hardware.peak_flops(kind) == chip.flops / chip.devices_per_chip


def test_pairs_that_a_selection_leaves_out_are_counted_beside_those_that_are_trained(clock):
    """Ten steps of 64 pairs, the last five of which are chosen from 256 each, in 4 s after the compiler's step."""
    options = run_on("TPU v99", 1, 64) | {"seen": lambda step: 64 * min(step, 5) + 256 * max(step - 5, 0)}
    measured = meter.Meter(**options, first_step=0)
    assert "train/pairs_seen" not in measured.read(5, {"loss": 1.0})
    clock.seconds += 4
    line = measured.read(10, {"loss": 1.0})
    assert (line["train/pairs"], line["train/pairs_seen"]) == (640, 320 + 1280)
    assert (line["train/pairs_per_second"], line["train/pairs_seen_per_second"]) == (80, 320)


def test_batches_are_taken_ahead_in_their_order_and_each_once():
    taken = []
    items = loop.ahead(map(lambda n: taken.append(n) or n, range(5)), 2)
    assert next(items) == 0 and taken == [0, 1, 2]
    assert next(items) == 1 and taken == [0, 1, 2, 3]
    assert list(items) == [2, 3, 4] and taken == [0, 1, 2, 3, 4]
    assert list(loop.ahead(iter([7]), 2)) == [7] and list(loop.ahead(iter([]), 1)) == []
