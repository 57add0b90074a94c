"""``clip-jax plan``: numbers that follow from each other, JSON with what is promised, and one line for each mistake."""

import json
import re
from pathlib import Path

import pytest

from clip_jax import config as configs
from clip_jax.commands import main
from clip_jax.devices.hardware import tpu
from clip_jax.planning.memory import unsharded_bytes
from clip_jax.planning.plan import Request, make_plan, to_json
from clip_jax.planning.search import estimate

L14 = ["plan", "--config=configs/clip_vit_l14.py", "--tpu=v5e-256", "--estimate"]


def plan_of(recipe="configs/clip_vit_l14.py", slice_name="v5e-256", slices=1, overrides=None, **asked):
    config = configs.load(recipe, overrides or {})
    return make_plan(Request(config, tpu(slice_name, slices), compile=False, **asked))


def answered(capsys, *arguments):
    assert main([*L14, *arguments, "--json"]) == 0
    return json.loads(capsys.readouterr().out)


def test_comparing_needs_the_compilers_time(capsys):
    assert main([*L14, "--compare=3"]) == 2
    assert capsys.readouterr().err.startswith("clip-jax plan: --compare compares the TPU compiler's times")


def test_json_has_what_a_program_needs(capsys):
    answer = answered(capsys, "--samples=400000000", "--price=1.2")
    assert answer["fits"] is True and answer["compiled"] is False
    assert 0 < answer["hbm_bytes_per_chip"] < answer["free_hbm_bytes_per_chip"] == 15.75 * 2**30
    assert answer["settings"] == {
        "batch_size": 32768,
        "micro_batch": 32768,
        "model.remat": "full",
        "model.attention": "tpu",
        "mesh.data": 256,
        "mesh.fsdp": 1,
        "mesh.tensor": 1,
    }
    # OpenCLIP's model profile: 175.33 GFLOP forward, 427.6M parameters
    assert answer["flops_per_pair"] == pytest.approx(3 * 175.33e9, rel=0.01)
    assert answer["parameters"]["total"] == pytest.approx(427.6e6, rel=0.001)
    assert answer["steps"] == 32 * 400_000_000 // 32_768


def test_speed_mfu_hours_and_cost_follow_from_the_time_of_a_step(capsys):
    answer = answered(capsys, "--samples=400000000", "--price=1.2")
    assert answer["bound"] == "compute"
    assert answer["step_seconds"] == max(answer["seconds"].values())
    assert answer["pairs_per_second"] == pytest.approx(32_768 / answer["step_seconds"])
    peak = 256 * 197e12
    assert answer["mfu"] == pytest.approx(answer["flops_per_pair"] * answer["pairs_per_second"] / peak)
    assert 0.75 < answer["mfu"] < 1  # full remat: four forward passes for the three that count
    assert answer["chip_hours"] == pytest.approx(256 * answer["steps"] * answer["step_seconds"] / 3600)
    assert answer["cost"] == pytest.approx(1.2 * answer["chip_hours"])


def test_a_measured_mfu_takes_the_place_of_the_bound():
    measured = to_json(plan_of(mfu=0.4, samples=1_000_000))
    assert measured["mfu"] == pytest.approx(0.4)
    assert measured["pairs_per_second"] == pytest.approx(0.4 * 256 * 197e12 / measured["flops_per_pair"])
    assert plan_of(mfu=0.99, samples=1_000_000).mfu < 0.85  # nothing is faster than the bound


def test_without_the_number_of_samples_epochs_have_no_length(capsys):
    assert main([*L14, "--config.epochs=2", "--config.data.samples=-1"]) == 0
    assert "give --samples=N" in capsys.readouterr().out
    assert answered(capsys)["steps"] == 32 * 400_000_000 // 32_768  # the recipe says it
    assert answered(capsys, "--samples=1000000")["steps"] == 32 * 1_000_000 // 32_768
    assert to_json(plan_of(overrides={"steps": "100"}))["steps"] == 100


def test_each_phase_has_a_plan_of_its_own(capsys):
    larger = "--config.phases=({'start': 1000, 'model.image.image_size': 336},)"
    answer = answered(capsys, larger, "--config.steps=3000")
    (later,) = answer["later_phases"]
    assert (answer["steps"], later["steps"]) == (1000, 2000)
    assert later["flops_per_pair"] > 2 * answer["flops_per_pair"]
    assert main([*L14, larger, "--config.steps=3000"]) == 0
    assert "steps 1,001 to the last" in capsys.readouterr().out


@pytest.mark.slow
@pytest.mark.parametrize(
    "arguments",
    [
        ["--gpu=h100:16", "--config.mesh.fsdp=16"],  # two hosts, and one copy of the model
        ["--tpu=v5e-16", "--config.mesh.data=8", "--config.mesh.tensor=-1", "--config.model.remat=none"],
    ],
)
def test_any_mesh_that_is_valid_is_planned(capsys, arguments):
    assert main(["plan", "--config=configs/clip_vit_l14.py", "--estimate", "--json", *arguments]) == 0
    assert json.loads(capsys.readouterr().out)["hbm_bytes_per_chip"] > 0


def test_slices_double_the_chips_and_meet_over_the_network():
    one, two = (to_json(plan_of(slices=n)) for n in (1, 2))
    assert (one["chips"], two["chips"]) == (256, 512)
    assert one["seconds"]["dcn"] == 0 < two["seconds"]["dcn"]
    assert two["flops_per_chip"]["model"] == one["flops_per_chip"]["model"] // 2


@pytest.mark.slow
def test_a_width_that_the_mesh_does_not_divide_is_warned_of():
    # bigG's widths are 1664 and 1280: 256 chips cannot share them, 128 can
    plan = plan_of("configs/clip_bigg14.py", overrides={"mesh.fsdp": "256"})
    assert not plan.fits and plan.chosen.changes["mesh.fsdp"] <= 128
    assert "mesh.fsdp=128 divides them" in plan.warnings[0]
    assert plan_of("configs/clip_bigg14.py").warnings == []


FAST = {"demo", "clip_vit_l14", "clip_rn50x64", "clip_bigg14", "siglip2_b16"}


@pytest.mark.parametrize(
    "recipe",
    [
        pytest.param(recipe, id=recipe.stem, marks=() if recipe.stem in FAST else pytest.mark.exhaustive)
        for recipe in sorted(Path("configs").glob("*.py"))
    ],
)
def test_a_recipe_fits_the_slice_that_it_names(recipe):
    machines = re.search(r"Planned for ([\w-]+)", recipe.read_text().split('"""')[1])[1]
    given = estimate(configs.load(str(recipe)), tpu(machines))
    assert given.memory.total < 0.85 * given_free(machines)
    assert unsharded_bytes(given.state, given.learner.mesh) < 0.01 * given_free(machines)


def given_free(machines):
    return tpu(machines).chip.free_hbm_per_device


MISTAKES = [
    (["--tpu=v5e-255"], "the nearest is v5e-256"),
    (["--tpu=v9-8"], "no such TPU slice"),
    (["--gpu=h10:8"], "nearest: h100"),
    ([], "give either --tpu or --gpu"),
    (["--tpu=v5e-8", "--gpu=h100"], "give either --tpu or --gpu"),
    (["--gpu=h100:8", "--slices=2"], "--slices is for TPUs"),
    (["--tpu=v5e-256", "--slices=0"], "--slices=0 must be at least 1"),
    (["--tpu=v5e-256", "--mfu=40"], "--mfu=40 must be at least 0.001 and at most 1"),
    (["--tpu=v5e-256", "--samples=0"], "--samples=0 must be at least 1"),
    (["--tpu=v5e-256", "--config.batch_size=1000"], "the nearest that does is 1024"),
    (["--tpu=v5e-256", "--config.micro_batch=1000"], "micro_batch=1000 must divide"),
    (["--tpu=v5e-256", "--config.mesh.fsdp=7"], "does not divide over 256 devices"),
    (["--tpu=v5e-256", "--config.batchsize=1000"], "nearest: batch_size"),
    (["--tpu=v5e-256", "--config.model.name=ViT-L/41"], "not a model"),
]


@pytest.mark.parametrize(("arguments", "message"), MISTAKES, ids=lambda x: " ".join(x) if isinstance(x, list) else "")
def test_a_mistake_is_one_line(capsys, arguments, message):
    assert main(["plan", "--config=configs/clip_vit_l14.py", "--estimate", *arguments]) == 2
    error = capsys.readouterr().err
    assert message in error and error.count("\n") == 1


def test_a_recipe_that_is_not_there_is_one_line(capsys):
    assert main(["plan", "--config=configs/clip_vit_l41.py", "--tpu=v5e-8"]) == 2
    assert "nearest: configs/clip_vit_l14.py" in capsys.readouterr().err


def test_other_commands_refuse_overrides(capsys):
    assert main(["classify", "--model=x", "--image=y", "--labels=z", "--config.batch_size=2"]) == 2
    assert "this command takes no --config" in capsys.readouterr().err
