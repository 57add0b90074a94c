"""The TPU compiler's answers: what it says is read rightly, and a real small step is compiled for a slice elsewhere."""

import json
import os
import subprocess
import sys
from types import SimpleNamespace

import pytest

from clip_jax import config as configs
from clip_jax.commands import main
from clip_jax.devices.hardware import GIB, tpu
from clip_jax.devices.sharding import make_mesh
from clip_jax.planning import compiling, report
from clip_jax.planning.compiler import evaluation_bytes, parse_out_of_memory
from clip_jax.training.setup import make_learner

SMALL = [
    "plan",
    "--config=configs/clip_vit_b32.py",
    "--config.model.image.layers=2",
    "--config.model.text.layers=2",
    "--config.steps=10",
    "--config.optimizer.warmup_steps=0",
    "--json",
]
TOLD = [
    "RESOURCE_EXHAUSTED: XLA:TPU compile permanent error. Ran out of memory in memory space hbm. Used 24.86G of 15.75G "
    "hbm. Exceeded hbm capacity by 9.11G.",
    "RESOURCE_EXHAUSTED: Ran out of memory on HBM, the total memory required for HLO temporaries (24.86G) exceeds "
    "available HBM (15.75G).",
]


@pytest.mark.parametrize("message", TOLD)
def test_what_a_step_wanted_is_read_from_the_compilers_refusal(message):
    assert parse_out_of_memory(message) == (int(24.86 * GIB), int(15.75 * GIB))


def test_another_error_of_the_compiler_is_not_taken_for_lack_of_memory():
    with pytest.raises(RuntimeError, match="INTERNAL"):
        parse_out_of_memory("INTERNAL: Mosaic failed")


def test_slices_have_the_compilers_names():
    assert compiling.topology(tpu("v5e-256", 2)) == {"topology_name": "v5e:16x16", "num_slices": 2}
    assert compiling.topology(tpu("v6e-8"))["chips_per_host_bounds"] == [2, 4, 1]
    assert compiling.topology(tpu("v4-8"))["chip_config_name"] == "megacore"
    assert compiling.topology(tpu("tpu7x-8"))["topology_name"] == "tpu7x:2x2x1"


@pytest.mark.slow
def test_without_the_compiler_the_estimate_says_how_to_get_it(monkeypatch, capsys):
    monkeypatch.setattr(compiling, "is_installed", lambda: False)
    assert main([*SMALL[:-1], "--tpu=v5e-8"]) == 0
    printed = capsys.readouterr().out
    assert "an estimate" in printed and "pip install 'clip-jax-tpu[plan]'" in printed


def test_the_encoders_of_an_evaluation_are_compiled_for_its_own_batch(monkeypatch):
    """Not for the training batch, which has more rows under selection and no images with stored embeddings."""
    sizes = {"layers": "1", "width": "64", "heads": "2", "mlp_width": "64"}
    small = {f"model.{tower}.{name}": size for tower in ("image", "text") for name, size in sizes.items()}
    config = configs.load("configs/clip_vit_b32.py", small | {"eval.held_out.source": "x"})
    learner = make_learner(config, make_mesh(8, 1, 1), steps=10, examples=10)
    monkeypatch.setattr(type(learner), "batch_spec", lambda self, size: pytest.fail("the training batch is not used"))
    peaks = []
    for size in (64, 128):
        config.eval.held_out.batch_size = size
        peaks.append(evaluation_bytes(config, learner))
    activations = 8 * 50 * 64 * 2  # of the further eight images of a device, in bfloat16
    assert peaks[0] < peaks[1] - activations
    config.eval.held_out.source = ""
    assert evaluation_bytes(config, learner) is None


def test_an_evaluation_that_does_not_fit_says_what_to_lower():
    compiled = SimpleNamespace(evaluation_hbm_bytes=20 * GIB, free_hbm_bytes=int(15.75 * GIB))
    line = report._evaluation(SimpleNamespace(chosen_compiled=compiled), per_chip=1)
    assert line.startswith("does not fit: 20.0") and "lower the batch_size of config.eval.*" in line


needs_the_compiler = pytest.mark.skipif(
    not compiling.is_installed(), reason="libtpu is not installed: make test-plan fetches it and runs this test"
)


@pytest.mark.slow
@needs_the_compiler
def test_a_real_step_is_compiled_for_a_slice_that_is_not_here(capsys):
    evaluation = ["--config.eval.held_out.source=tar:nowhere", "--config.eval.held_out.batch_size=64"]
    assert main([*SMALL, *evaluation, "--tpu=v5e-8", "--config.batch_size=256"]) == 0
    answer = json.loads(capsys.readouterr().out)
    assert answer["compiled"] and answer["fits"] and answer["evaluation"]["fits"]
    state = 12 * answer["parameters"]["total"]
    assert state < answer["evaluation"]["hbm_bytes_per_chip"] < answer["hbm_bytes_per_chip"]
    assert state < answer["hbm_bytes_per_chip"] < 1.25 * answer["memory_estimate"]["total"]
    moved = {t["what"]: t["ici_bytes"] for t in answer["transfers"]}
    assert moved["all-reduce"] > 7 / 8 * 2 * 2 * answer["parameters"]["total"]  # its gradients, in bfloat16


@pytest.mark.slow
@needs_the_compiler
def test_a_step_that_does_not_fit_says_what_it_wanted_and_what_would_fit(capsys):
    given = ["--tpu=v5e-8", "--config.batch_size=32768", "--config.model.remat=none", "--compilations=2"]
    assert main([*SMALL, *given]) == 0
    answer = json.loads(capsys.readouterr().out)
    assert not answer["fits"] and answer["hbm_bytes_per_chip"] > answer["free_hbm_bytes_per_chip"]
    assert answer["found"]["hbm_bytes_per_chip"] < answer["free_hbm_bytes_per_chip"]
    assert answer["found"]["changes"]


KERNELS = """
import jax, jax.numpy as jnp
from jax.experimental import topologies
from jax.sharding import SingleDeviceSharding
from clip_jax.devices.hardware import tpu
from clip_jax.models.attention_tpu import VMEM, TPUAttention
from clip_jax.planning import compiling

# (tokens, heads, features, type, causal, with a mask)
CASES = [
    (77, 2, 64, jnp.bfloat16, True, False),
    (197, 2, 64, jnp.bfloat16, False, False),
    (257, 2, 64, jnp.bfloat16, False, False),
    (256, 16, 72, jnp.bfloat16, False, False),
]
FURTHER = [
    (16, 2, 64, jnp.bfloat16, True, True),
    (577, 2, 64, jnp.float32, False, False),
    (1100, 2, 128, jnp.bfloat16, False, False),
]
for name in ("v4-8", "v5e-1", "v5p-8", "v6e-1", "tpu7x-8"):
    device = topologies.get_topology_desc(platform="tpu", **compiling.topology(tpu(name))).devices[0]
    kernel = TPUAttention(vmem=max(VMEM, tpu(name).chip.vmem // 2))
    for tokens, heads, dim, dtype, causal, masked in CASES + FURTHER * (name in ("v4-8", "v5e-1")):
        x = jax.ShapeDtypeStruct((2, tokens, heads, dim), dtype, sharding=SingleDeviceSharding(device))
        mask = jax.ShapeDtypeStruct((2, tokens, tokens), bool, sharding=SingleDeviceSharding(device))

        def both(query, key, value, gradient, mask):
            attend = lambda *arrays: kernel(*arrays, causal=causal, mask=mask if masked else None)
            mixed, backward = jax.vjp(attend, query, key, value)
            return mixed, backward(gradient)

        jax.jit(both).lower(x, x, x, x, mask).compile()
        print(name, tokens, flush=True)
"""


@pytest.mark.slow
@needs_the_compiler
def test_the_attention_kernel_compiles_for_every_generation_of_chips():
    environment = os.environ | compiling.environment(tpu("v5e-1"))
    done = subprocess.run([sys.executable, "-c", KERNELS], env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr[-2000:]
    assert len(done.stdout.splitlines()) == 5 * 4 + 2 * 3


SHORTENED = """
import jax, jax.numpy as jnp
from jax.experimental import topologies
from clip_jax.devices.hardware import tpu
from clip_jax.models.attention_tpu import TPUAttention
from clip_jax.planning import compiling
from clip_jax.planning.cycles import _cycles_of, pallas_calls

device = topologies.get_topology_desc(platform="tpu", **compiling.topology(tpu("v5e-1"))).devices[0]
x, mask = jax.ShapeDtypeStruct((96, 50, 12, 64), jnp.bfloat16), jax.ShapeDtypeStruct((1, 50, 50), bool)

def both(query, key, value, gradient, mask):
    attend = lambda *arrays: TPUAttention()(*arrays, causal=False, mask=mask)
    mixed, backward = jax.vjp(attend, query, key, value)
    return mixed, backward(gradient)

for call in pallas_calls(jax.make_jaxpr(both)(x, x, x, x, mask)):
    print(call.params["grid_mapping"].grid[0], _cycles_of(call, device), _cycles_of(call, device, compiled=32))
"""


@pytest.mark.slow
@needs_the_compiler
def test_the_cycles_of_a_long_grid_are_those_that_two_short_ones_give(tmp_path):
    environment = os.environ | compiling.environment(tpu("v5e-1"))
    environment["LIBTPU_INIT_ARGS"] = f"{compiling.PROFILE}={tmp_path}"
    done = subprocess.run([sys.executable, "-c", SHORTENED], env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr[-2000:]
    found = [list(map(int, line.split())) for line in done.stdout.splitlines()]
    assert [programs for programs, _, _ in found] == [96, 96]
    for _, whole, extended in found:
        assert extended == pytest.approx(whole, rel=1e-3)


@pytest.mark.slow
@needs_the_compiler
def test_a_small_step_takes_fewer_cycles_with_the_kernel_than_with_xlas_attention():
    small = {"batch_size": "16", "steps": "10", "optimizer.warmup_steps": "0", "model.text.vocab_size": "1024"}
    for tower in ("image", "text"):
        sizes = {"layers": 1, "width": 256, "heads": 4, "mlp_width": 1024}
        small |= {f"model.{tower}.{name}": str(size) for name, size in sizes.items()}

    def compiled(attention):
        config = configs.load("configs/clip_vit_b16.py", small | {"model.attention": attention})
        return compiling.compile_step(config, tpu("v5e-1"))

    kernel, xla = compiled("auto"), compiled("xla")
    assert kernel.kernels and not xla.kernels
    assert kernel.cycles < xla.cycles
    assert kernel.hbm_bytes <= xla.hbm_bytes
    assert sum(share.cycles for share in kernel.profile) == kernel.cycles
