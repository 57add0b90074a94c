"""The flags of each platform: the user's win, one line tells of them, and the installed compilers know them all."""

import os
import subprocess
import sys

import pytest

from clip_jax import xla_flags

LATENCY = "xla_gpu_enable_latency_hiding_scheduler"


@pytest.fixture
def installed(monkeypatch):
    """Says which packages there are, whatever is installed here."""

    def only(*packages):
        monkeypatch.setattr(xla_flags.importlib.util, "find_spec", lambda name: name if name in packages else None)

    return only


def applied(**environ):
    xla_flags.apply(environ)
    return environ


def test_only_platforms_that_are_installed_get_flags(installed):
    installed()
    assert applied() == {}
    installed("libtpu")
    assert applied().keys() == {"LIBTPU_INIT_ARGS"}
    installed("jax_cuda13_plugin")
    assert f"--{LATENCY}=true" in applied()["XLA_FLAGS"]


def test_a_platform_that_is_ruled_out_gets_none(installed):
    installed("libtpu", "jax_cuda13_plugin")
    assert applied(JAX_PLATFORMS="cpu").keys() == {"JAX_PLATFORMS"}
    assert applied(JAX_PLATFORMS="cuda,cpu").keys() == {"JAX_PLATFORMS", "XLA_FLAGS"}


def test_what_the_user_set_stays_and_wins(installed):
    installed("jax_cuda12_plugin")
    given = f"--{LATENCY}=false --xla_gpu_autotune_level=0"
    flags = applied(XLA_FLAGS=given)["XLA_FLAGS"]
    assert flags.startswith(given) and flags.count(LATENCY) == 1
    assert "--xla_gpu_enable_pipelined_all_gather=true" in flags
    assert xla_flags.parsed(flags)[LATENCY] == "false"
    assert applied(XLA_FLAGS=flags)["XLA_FLAGS"] == flags  # a second start adds nothing


def test_one_line_tells_what_is_in_force_and_why(installed):
    installed("libtpu")
    told = xla_flags.told("tpu", applied(LIBTPU_INIT_ARGS="--xla_tpu_scoped_vmem_limit_kib=65536"))
    assert told.startswith("xla_tpu_enable_data_parallel_all_reduce_opt, ")
    assert told.endswith("all-reduces between slices beside computation; 1 of your own in LIBTPU_INIT_ARGS")
    assert xla_flags.told("tpu", {}) == "none"
    assert xla_flags.told("cpu", {}) == "none of ours on cpu"


@pytest.mark.parametrize(("extra", "starts"), [("", True), ("--xla_gpu_no_such_flag=true", False)])
def test_the_installed_jax_starts_with_every_gpu_flag_and_stops_at_an_unknown_one(extra, starts):
    flags = f"{xla_flags.joined('gpu', '')} {extra}"
    done = subprocess.run(
        [sys.executable, "-c", "import jax; jax.devices()"],
        env=os.environ | {"XLA_FLAGS": flags, "JAX_PLATFORMS": "cpu"},
        capture_output=True,
        text=True,
    )
    assert (done.returncode == 0) == starts, done.stderr
