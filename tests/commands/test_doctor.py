"""clip-jax doctor: what it measures here, and what it compares on a TPU."""

import jax
import jax.numpy as jnp
import pytest

from clip_jax.commands import main
from clip_jax.devices.hardware import tpu
from clip_jax.models.attention_tpu import TPUAttention
from clip_jax.planning import doctor
from clip_jax.planning.compiling import Compiled
from tests.training import runs


@pytest.mark.slow
def test_on_a_cpu_it_measures_the_step_and_says_what_it_cannot_see(tmp_path, capsys):
    assert main(["doctor", f"--config={runs.write_recipe(tmp_path)}"]) == 0
    printed = " ".join(capsys.readouterr().out.split())
    assert "not seen on a cpu: estimates, the TPU kernel" in printed
    assert "training step, " in printed and "no estimate: this is no TPU that the plan knows" in printed


def test_each_kernel_and_rate_is_measured_beside_its_estimate(monkeypatch):
    monkeypatch.setattr(doctor, "timed", lambda run: jax.block_until_ready(run()) is None or 0.5)
    query = jax.ShapeDtypeStruct((2, 20, 2, 64), jnp.float32)
    program = jax.make_jaxpr(TPUAttention(interpret=True))(query, query, query)
    shapes = "f32[2,20,128] f32[2,20,128] f32[2,20,128] -> f32[2,20,128]"
    machines = tpu("v5e-1")
    compiled = Compiled(True, 1, 1, 1.0, cycles=10, kernels={shapes: 1_503_000_000})
    (kernel,) = doctor.kernels(program, compiled, machines, "the TPU compiler")
    assert kernel.name == f"kernel {shapes}" and kernel.measured == 0.5
    assert kernel.estimated == pytest.approx(1, rel=1e-3)
    product, copy = doctor.rates(machines)
    assert product.estimated == pytest.approx(2 * 512**3 / 197e12) and copy.estimated > 0
