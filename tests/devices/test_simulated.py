"""Simulated devices get threads enough that no collective waits for a device that has none."""

import subprocess
import sys

import jax
import pytest

from clip_jax.devices import simulated


@pytest.mark.parametrize(
    ("count", "given", "threads"), [(1, None, None), (2, None, None), (500, None, "2000"), (8, "9", "9")]
)
def test_threads_grow_with_the_devices_unless_the_user_gives_a_number(monkeypatch, count, given, threads):
    monkeypatch.setattr(jax.config, "update", lambda name, value: None)
    environ = {} if given is None else {"PJRT_NPROC": given}
    simulated.use_cpus(count, environ)
    assert environ.get("PJRT_NPROC") == threads


def test_it_counts_the_devices_of_a_new_process(monkeypatch):
    monkeypatch.setenv("JAX_PLATFORMS", "cpu")
    code = "import jax; from clip_jax.devices import simulated; simulated.use_cpus(3); print(jax.device_count())"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout == "3\n"
