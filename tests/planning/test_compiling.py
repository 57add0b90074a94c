"""The TPU compiler's answers: what it says is read rightly, and a real small step is compiled for a slice elsewhere."""

import json

import pytest

from clip_jax.commands import main
from clip_jax.devices.hardware import GIB, tpu
from clip_jax.planning import compiling
from clip_jax.planning.compiler import parse_out_of_memory

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


def test_without_the_compiler_the_estimate_says_how_to_get_it(monkeypatch, capsys):
    monkeypatch.setattr(compiling, "is_installed", lambda: False)
    assert main([*SMALL[:-1], "--tpu=v5e-8"]) == 0
    printed = capsys.readouterr().out
    assert "an estimate" in printed and "pip install 'clip-jax-tpu[plan]'" in printed


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
    given = ["--tpu=v5e-8", "--config.batch_size=32768", "--config.model.remat=none"]
    assert main([*SMALL, *given]) == 0
    answer = json.loads(capsys.readouterr().out)
    assert not answer["fits"] and answer["hbm_bytes_per_chip"] > answer["free_hbm_bytes_per_chip"]
    assert answer["found"]["hbm_bytes_per_chip"] < answer["free_hbm_bytes_per_chip"]
    assert answer["found"]["changes"]
