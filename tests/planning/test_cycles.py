"""The compiler's time: cycles of a small program by hand, the clocks of the chips, and what the plan makes of them."""

import json
import subprocess

import jax
import jax.numpy as jnp
import pytest

from clip_jax import config as configs
from clip_jax.commands import main
from clip_jax.devices.hardware import TPUS, tpu
from clip_jax.models.attention_tpu import TPUAttention
from clip_jax.planning import compiling
from clip_jax.planning.compiling import Compiled
from clip_jax.planning.cycles import clock, estimate, pallas_calls, signature

KERNEL = (
    "%kernel = f32[8]{0} custom-call(f32[8]{0} %fusion.2), "
    'custom_call_target="tpu_custom_call", backend_config={"flag_configs":[]BACKEND}'
)
PROGRAM = """HloModule jit_step, is_scheduled=true

%inside (p: f32[8]) -> f32[8] {
  %p = f32[8]{0} parameter(0)
  ROOT %convolution = f32[8]{0} negate(f32[8]{0} %p), backend_config={"estimated_cycles":"7000"}
}

%body (arg: (s32[], f32[8])) -> (s32[], f32[8]) {
  %arg = (s32[], f32[8]{0}) parameter(0)
  %i = s32[] get-tuple-element((s32[], f32[8]{0}) %arg), index=0
  %x = f32[8]{0} get-tuple-element((s32[], f32[8]{0}) %arg), index=1
  %fusion.1 = f32[8]{0} fusion(f32[8]{0} %x), kind=kLoop, calls=%inside, backend_config={"estimated_cycles":"100"}
  ROOT %next = (s32[], f32[8]{0}) tuple(s32[] %i, f32[8]{0} %fusion.1)
}

%condition (arg.1: (s32[], f32[8])) -> pred[] {
  %arg.1 = (s32[], f32[8]{0}) parameter(0)
  %i.1 = s32[] get-tuple-element((s32[], f32[8]{0}) %arg.1), index=0
  %limit = s32[] constant(12)
  ROOT %less = pred[] compare(s32[] %i.1, s32[] %limit), direction=LT
}

ENTRY %main (x.1: f32[8]) -> f32[8] {
  %x.1 = f32[8]{0} parameter(0)
  %zero = s32[] constant(0)
  %copy = f32[8]{0} copy(f32[8]{0} %x.1), backend_config={"estimated_cycles":"5","parts":{"estimated_cycles":"3"}}
  %start = (s32[], f32[8]{0}) tuple(s32[] %zero, f32[8]{0} %copy)
  %while = (s32[], f32[8]{0}) while((s32[], f32[8]{0}) %start), condition=%condition, body=%body
  %y = f32[8]{0} get-tuple-element((s32[], f32[8]{0}) %while), index=1
  %fusion.2 = f32[8]{0} fusion(f32[8]{0} %y), kind=kLoop, calls=%inside, backend_config={"estimated_cycles":"20"}
  KERNEL
}
"""


def program(backend):
    return PROGRAM.replace("KERNEL", KERNEL.replace("BACKEND", backend))


def test_loops_count_by_trips_fusions_once_and_kernels_apart():
    assert estimate(program(""))[:2] == (5 + 12 * 100 + 20, {"f32[8] -> f32[8]": 1})
    assert estimate(program(',"estimated_cycles":"1000"'))[:2] == (5 + 12 * 100 + 20 + 1000, {})


def test_a_kernel_of_a_step_is_found_by_its_shapes():
    query = jax.ShapeDtypeStruct((8, 100, 4, 64), jnp.bfloat16)
    step = jax.jit(lambda x: jax.lax.fori_loop(0, 3, lambda _, x: TPUAttention()(x, x, x), x))
    (call,) = pallas_calls(jax.make_jaxpr(step)(query))
    assert signature(call) == " ".join(["bf16[8,100,256]"] * 3) + " -> bf16[8,100,256]"


def test_clocks_are_those_that_are_published():
    # MHz: Jouppi et al. 2023, table 4 (v2 to v4); Norrie et al. 2021; 1.5 and 1.75 GHz for v5e and v5p
    published = {"v2": 700, "v3": 940, "v4": 1050, "v5e": 1500, "v5p": 1750}
    clocks = {chip.name: clock(chip) / 1e6 for chip in TPUS}
    for name, megahertz in published.items():
        assert clocks[name] == pytest.approx(megahertz, rel=0.03)
    assert all(600 < megahertz < 2500 for megahertz in clocks.values())


L14 = ["plan", "--config=configs/clip_vit_l14.py", "--tpu=v5e-256", "--price=1.2", "--samples=1000000"]


@pytest.fixture
def answer(monkeypatch):
    """A compiler that estimates 1.5 billion cycles: a second on a v5e."""
    free = tpu("v5e-256").chip.free_hbm_per_device
    monkeypatch.setattr(compiling, "is_installed", lambda: True)
    monkeypatch.setattr(compiling, "version", lambda: "0.0.42")
    compiled = Compiled(True, free // 2, free, 1.0, cycles=1_503_000_000, text_buckets={16: 2**30, 32: 2**31})
    monkeypatch.setattr(compiling, "compile_step", lambda *_: compiled)


def test_speed_hours_and_price_follow_from_the_compilers_time_with_the_bound_beside_it(answer, capsys):
    assert main([*L14, "--json"]) == 0
    plan = json.loads(capsys.readouterr().out)
    assert plan["compiler"]["cycles"] == 1_503_000_000
    assert plan["step_seconds"] == plan["compiler"]["step_seconds"] == pytest.approx(1, rel=1e-3)
    assert plan["pairs_per_second"] == pytest.approx(32_768, rel=1e-3)
    assert plan["pairs_per_second_without_overlap"] < plan["pairs_per_second"] < plan["at_most"]["pairs_per_second"]
    assert plan["mfu"] == pytest.approx(plan["flops_per_step"] / (256 * 197e12 * plan["step_seconds"]))
    assert plan["chip_hours"] == pytest.approx(256 * plan["steps"] * plan["step_seconds"] / 3600)
    assert plan["cost"] == pytest.approx(1.2 * plan["chip_hours"])


def test_the_plan_says_that_it_is_the_compilers_estimate(answer, capsys):
    assert main(L14) == 0
    printed = " ".join(capsys.readouterr().out.split())
    assert "about 32,7" in printed and "the TPU compiler's estimate of its own program; not measured" in printed
    assert "no step is faster than" in printed
    assert "text buckets 16 tokens 1.00 GiB, 32 tokens 2.00 GiB; compiled as well" in printed
    assert main([*L14, "--mfu=0.1"]) == 0
    assert "not measured" not in capsys.readouterr().out


@pytest.mark.parametrize(("kernels", "total"), [({}, 100), ({"a": 2, "b": 1}, 100 + 2 * 30 + 7), ({"c": 1}, None)])
def test_kernels_are_estimated_alone_and_count_by_their_executions(monkeypatch, kernels, total):
    step = {"fits": True, "hbm_bytes": 1, "free_hbm_bytes": 2, "transfers": [], "seconds": 1.0, "cycles": 100}

    def run(request, variables):
        assert request["only_kernels"] == (compiling.PROFILE in variables.get("LIBTPU_INIT_ARGS", ""))
        found = {"a": 30, "b": 7} if request["only_kernels"] else step | {"kernels": kernels}
        return subprocess.CompletedProcess([], 0, json.dumps(found), "")

    monkeypatch.setattr(compiling, "_run_compiler", run)
    compiled = compiling.compile_step(configs.load("configs/clip_vit_b32.py", {}), tpu("v5e-8"))
    assert compiled.cycles == total
