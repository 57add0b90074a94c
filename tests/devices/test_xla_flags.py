"""The preset flags of each platform: user flags win, one line describes them, and the compilers accept them all."""

import os
import subprocess
import sys

import pytest

from clip_jax.devices import xla_flags

LATENCY = "xla_gpu_enable_latency_hiding_scheduler"


@pytest.fixture
def installed(monkeypatch):
    """Pretends that only the given packages are installed."""

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


def test_a_platform_excluded_by_jax_platforms_gets_no_flags(installed):
    installed("libtpu", "jax_cuda13_plugin")
    assert applied(JAX_PLATFORMS="cpu").keys() == {"JAX_PLATFORMS"}
    assert applied(JAX_PLATFORMS="cuda,cpu").keys() == {"JAX_PLATFORMS", "XLA_FLAGS"}


def test_flags_of_the_user_remain_and_win(installed):
    installed("jax_cuda12_plugin")
    given = f"--{LATENCY}=false --xla_gpu_autotune_level=0"
    flags = applied(XLA_FLAGS=given)["XLA_FLAGS"]
    assert flags.startswith(given) and flags.count(LATENCY) == 1
    assert "--xla_gpu_enable_pipelined_all_gather=true" in flags
    assert xla_flags.parse(flags)[LATENCY] == "false"
    assert applied(XLA_FLAGS=flags)["XLA_FLAGS"] == flags  # a second start adds nothing


def test_one_line_describes_the_flags_in_effect(installed):
    installed("libtpu")
    line = xla_flags.describe("tpu", applied(LIBTPU_INIT_ARGS="--xla_tpu_scoped_vmem_limit_kib=65536"))
    assert line.startswith("overlap all-reduces between slices with computation: xla_tpu_enable_data_parallel_all_")
    assert line.endswith("xla_tpu_data_parallel_opt_different_sized_ops; 1 from your LIBTPU_INIT_ARGS")
    assert xla_flags.describe("tpu", {}) == "none"
    assert xla_flags.describe("cpu", {}) == "no preset for cpu"


@pytest.mark.parametrize(("extra", "starts"), [("", True), ("--xla_gpu_no_such_flag=true", False)])
def test_the_installed_jax_accepts_every_gpu_flag_and_aborts_at_an_unknown_one(extra, starts):
    flags = f"{xla_flags.merge('gpu', '')} {extra}"
    done = subprocess.run(
        [sys.executable, "-c", "import jax; jax.devices()"],
        env=os.environ | {"XLA_FLAGS": flags, "JAX_PLATFORMS": "cpu"},
        capture_output=True,
        text=True,
    )
    assert (done.returncode == 0) == starts, done.stderr
