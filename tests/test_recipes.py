"""Every shipped recipe is valid, and its full-size model traces through a whole training step."""

import dataclasses
import types
from pathlib import Path

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import clip_jax
from clip_jax import config as configs
from clip_jax import presets
from clip_jax.devices.sharding import make_mesh, to_devices
from clip_jax.models.clip import CLIP
from clip_jax.objectives import contrastive
from clip_jax.training import loop, teacher
from clip_jax.training.setup import make_learner
from tests.data.shards import jpeg
from tests.training import runs

RECIPES = sorted(Path("configs").glob("*.py"))


def test_the_recipes_are_there():
    assert {r.stem for r in RECIPES} >= {
        "demo",
        "emoji",
        "emoji_multilingual",
        "icons",
        "coco_captions",
        "clip_vit_b32",
        "clip_vit_b16",
        "clip_vit_l14",
    }


@pytest.mark.parametrize("recipe", RECIPES, ids=lambda r: r.stem)
def test_a_recipe_has_its_launch_line_on_top(recipe):
    assert "python main.py --config=" in recipe.read_text().split('"""')[1]


TRACED = {"demo", "clip_vit_b32", "clip_rn50", "siglip2_b16", "grounded_scenes"}
"""For every other recipe, ``planning/test_plans.py`` builds the learner and estimates its memory."""


@pytest.mark.parametrize(
    "recipe",
    [pytest.param(r, id=r.stem, marks=() if r.stem in TRACED else pytest.mark.exhaustive) for r in RECIPES],
)
def test_a_recipe_traces_with_its_full_size_model(recipe):
    config = configs.load(str(recipe))
    learner = make_learner(config, make_mesh(), steps=100_000, examples=400_000_000)
    state = learner.abstract_state()
    new_state, metrics = jax.eval_shape(
        learner.step(), state, learner.batch_spec(config.batch_size), learner.abstract_constants()
    )
    assert jax.tree.map(jnp.shape, new_state) == jax.tree.map(jnp.shape, state)
    assert metrics["loss"].shape == ()


@pytest.mark.parametrize(("recipe", "rate"), [("clip_vit_b32", 5e-4), ("clip_vit_b16", 5e-4), ("clip_vit_l14", 4e-4)])
def test_the_papers_recipes_have_the_papers_numbers(recipe, rate):
    config = configs.load(f"configs/{recipe}.py:tfds:coco_captions/train")
    assert config.data.train == "tfds:coco_captions/train"
    assert (config.batch_size, config.epochs, config.optimizer.warmup_steps) == (32_768, 32, 2000)
    assert (config.optimizer.learning_rate, config.optimizer.weight_decay) == (rate, 0.2)
    assert (config.optimizer.beta1, config.optimizer.beta2, config.optimizer.eps) == (0.9, 0.98, 1e-6)
    assert config.model.name.endswith("-quickgelu")


SMALL_TOWER = {"width": "32", "layers": "2", "heads": "2", "mlp_width": "64"}
SMALL_RUN = {
    **{f"model.{tower}.{size}": value for tower in ("image", "text") for size, value in SMALL_TOWER.items()},
    **{"model.embed_dim": "32", "model.text.vocab_size": "100", "mesh.fsdp": "2"},
    **{"batch_size": "16", "examples": "3200", "optimizer.warmup_steps": "1"},
}


@pytest.mark.slow
@pytest.mark.parametrize(
    ("recipe", "side"), [("siglip_b16", 32), pytest.param("siglip_so400m14", 28, marks=pytest.mark.exhaustive)]
)
def test_a_siglip_recipe_has_the_papers_numbers_and_trains(recipe, side):
    """Zhai et al. 2023: t = ln 10, b = -10, Adafactor as big_vision has it; trained at a small size."""
    full = configs.load(f"configs/{recipe}.py")
    optimizer = full.optimizer
    given = {"weight": 1, "loss": "sigmoid", "max_logit_scale": 0}
    assert full.objectives.contrastive.to_dict() == contrastive.SPEC.defaults | given
    assert full.batch_size == 32_768
    assert (optimizer.name, optimizer.first_moment_dtype, optimizer.decay) == ("adafactor", "bfloat16", "kernels")
    assert (optimizer.learning_rate, optimizer.beta1, optimizer.beta2, optimizer.clip_norm) == (1e-3, 0.9, 0.95, 1.0)
    assert optimizer.weight_decay * optimizer.learning_rate == pytest.approx(1e-4)  # big_vision's

    config = configs.load(f"configs/{recipe}.py", SMALL_RUN | {"model.image.image_size": str(side)})
    mesh = make_mesh(-1, config.mesh.fsdp)
    learner = make_learner(config, mesh, steps=200, examples=16)
    step, state = learner.step(), learner.create_state()
    rng, length = np.random.default_rng(0), learner.model.architecture.text.context_length
    batch = {
        "image": rng.integers(0, 256, (16, side, side, 3), np.uint8),
        "text": rng.integers(0, 100, (16, length)).astype(np.int32),
    }
    seen = []
    for _ in range(10):
        state, metrics = step(state, to_devices(batch, mesh, 16), {})
        seen.append({name: float(value) for name, value in metrics.items()})
    assert (seen[0]["logit_scale"], seen[0]["logit_bias"]) == pytest.approx((10, -10))
    assert seen[0]["loss"] == pytest.approx(10, abs=3)  # as the recipe's docstring says
    assert seen[-1]["loss"] < 0.8 * seen[0]["loss"]


@pytest.mark.parametrize(
    ("recipe", "pairs", "later", "per_256", "later_per_256", "warmup"),
    [("clipa_l16", 2.56e9, 131.072e6, 8e-6, 8e-7, 51.2e6), ("flip_l16", 12.8e9, 128e6, 4e-6, 4e-8, 51.2e6)],
)
def test_a_recipe_in_two_stages_has_the_papers_numbers(recipe, pairs, later, per_256, later_per_256, warmup):
    config = configs.load(f"configs/{recipe}.py")
    (second,), batch, optimizer = config.phases, config.batch_size, config.optimizer
    stages = (second["start"], config.steps - second["start"], optimizer.warmup_steps)
    assert [steps * batch for steps in stages] == pytest.approx((pairs, later, warmup), rel=1e-3)
    assert optimizer.learning_rate * 256 / batch == pytest.approx(per_256)
    assert second["optimizer.learning_rate"] * 256 / batch == pytest.approx(later_per_256)
    assert (optimizer.weight_decay, optimizer.beta1, optimizer.beta2) == (0.2, 0.9, 0.95)


@pytest.mark.parametrize(("recipe", "layers", "weight", "decoder"), [("b16", 12, 0.25, 6), ("so400m14", 27, 1.0, 13)])
def test_siglip_2_has_the_papers_numbers(recipe, layers, weight, decoder):
    """Tschannen et al. 2025, sections 2.1 to 2.3: 40B pairs, and two further losses from 80 % of the run."""
    config = configs.load(f"configs/siglip2_{recipe}.py")
    second, optimizer = configs.phases(config)[1], config.optimizer
    assert config.steps * config.batch_size == pytest.approx(40e9, rel=1e-6)
    assert second.start / config.steps == pytest.approx(0.8, rel=1e-6)
    assert (optimizer.learning_rate, optimizer.warmup_steps, optimizer.clip_norm) == (1e-3, 20_000, 1.0)
    preset = configs.resolve_preset(config)
    assert (preset.architecture.image.layers, preset.tokenizer) == (layers, "siglip2")
    assert preset.architecture.image.grid**2 == 256 and preset.architecture.text.context_length == 64
    first, later = config.objectives, second.config.objectives
    assert (first.captioning.weight, first.captioning.layers, first.captioning.parallel) == (1.0, decoder, 0.5)
    assert (first.self_distillation.weight, later.self_distillation.weight) == (0.0, weight)
    ours = later.self_distillation
    assert (ours.local, ours.masked, ours.mask_share, ours.local_crops) == (1.0, 0.25, 0.5, 8)


def test_active_curation_has_the_papers_numbers():
    """Tschannen et al. 2025, section 2.5: 4B pairs, half of those that are read."""
    config = configs.load("configs/siglip2_b16_acid.py")
    assert config.steps * config.batch_size == pytest.approx(4e9, rel=1e-5)
    assert (config.optimizer.learning_rate, config.optimizer.weight_decay) == (1e-5, 0.0)
    assert config.objectives.selection.ratio == 2 and config.objectives.captioning.weight == 0


SHRINK = 4
"""Pixels and patches are this many times smaller: the grids of patches are the recipe's own."""
SWITCH, STEPS, VOCABULARY = 2, 4, 300
SMALL_PHASE = {
    "start": lambda step: SWITCH,
    "model.image.image_size": lambda size: size // SHRINK,
    "objectives.self_distillation.local_size": lambda size: LOCAL_SIZE[size],
    "optimizer.cooldown_steps": lambda steps: STEPS - SWITCH,
    "micro_batch": lambda size: 8,
}
LOCAL_SIZE = {96: 24, 98: 21}  # whole patches, of 4 and of 3 pixels
SMALL_HEADS = {"prototypes": "50", "hidden": "32", "bottleneck": "16", "local_size": str(LOCAL_SIZE[96])}


def shrunk(recipe: str) -> dict[str, str]:
    """Narrow towers, few steps and the bundled scenes; the recipe's objectives, and its one phase or none, stay."""
    config = configs.load(recipe)
    image = configs.resolve_preset(config).architecture.image
    phases = tuple({key: SMALL_PHASE.get(key, lambda v: v)(v) for key, v in p.items()} for p in config.phases)
    return {
        **{key: value for key, value in SMALL_RUN.items() if key.startswith("model.")},
        "model.image.image_size": str(image.grid * (image.patch_size // SHRINK)),
        "model.image.patch_size": str(image.patch_size // SHRINK),
        "model.text.vocab_size": str(VOCABULARY),
        "model.dtype": "float32",
        "model.init_from": "",
        "model.init_from_allow": "()",
        "tokenizer.kind": "sentencepiece",
        "tokenizer.train_captions": "300",
        "data.train": "shapes:train",
        "data.workers": "1",
        "batch_size": "16",
        "steps": str(STEPS),
        "phases": repr(phases),
        **{f"objectives.self_distillation.{key}": value for key, value in SMALL_HEADS.items()},
        "optimizer.warmup_steps": "1",
        "log.every_steps": "1",
        "log.tensorboard": "False",
        **({"mesh.fsdp": "2"} if config.mesh.fsdp > 1 else {}),
        **({"micro_batch": "8"} if config.micro_batch > 0 else {}),
    }


def use_a_small_teacher(monkeypatch, name: str) -> None:
    """A narrow model of this name for images as small as the student's, in place of the one from the hub."""
    preset = presets.preset(name)
    towers = preset.architecture
    small = {"width": 48, "layers": 2, "heads": 2, "mlp_width": 64}
    image = dataclasses.replace(towers.image, image_size=towers.image.image_size // SHRINK, **small)
    text = dataclasses.replace(towers.text, vocab_size=VOCABULARY, **small)
    architecture = dataclasses.replace(towers, image=image, text=text, embed_dim=small["width"])
    params = jax.jit(lambda key: nn.meta.unbox(CLIP(architecture).init(key)))(jax.random.key(5))
    monkeypatch.setitem(presets.PRESETS, name, preset._replace(architecture=architecture))
    monkeypatch.setattr(teacher, "load", lambda weights: types.SimpleNamespace(params=params, batch_stats={}))


def class_folders(folder: Path) -> str:
    for name in ("red circle", "blue square"):
        (folder / name).mkdir(parents=True)
        for i in range(10):
            (folder / name / f"{i}.jpg").write_bytes(jpeg(i))
    return f"folder:{folder}"


MARKS = {
    **dict.fromkeys(("coca_b32", "siglip2_b16", "unicl_b16"), ()),
    **dict.fromkeys(
        (
            "flip_l16",
            "clipa_l16",
            "lit_l16",
            "coca_l14",
            "distill_b32_from_l14",
            "siglip2_so400m14",
            "siglip2_b16_acid",
        ),
        pytest.mark.exhaustive,
    ),
}


@pytest.mark.slow
@pytest.mark.parametrize("recipe", [pytest.param(name, marks=marks) for name, marks in MARKS.items()])
def test_a_small_copy_of_a_recipe_trains_through_its_phases(tmp_path, monkeypatch, recipe):
    path = f"configs/{recipe}.py"
    config = configs.load(path)
    for objective, whose in (("distillation", "teacher"), ("selection", "reference")):
        if config.objectives[objective].weight > 0:
            use_a_small_teacher(monkeypatch, config.objectives[objective][whose])
    overrides, workdir = shrunk(path), tmp_path / "run"
    if not isinstance(config.data.train, str):  # UniCL's: scenes, and as many images with the names of classes
        overrides["data.train"] = repr((("shapes:train", 1.0), (class_folders(tmp_path / "classes"), 1e4)))
    assert loop.run(workdir=str(workdir), recipe=path, overrides=overrides) == 0
    steps = runs.metrics(workdir)
    assert [line["step"] for line in steps] == list(range(1, STEPS + 1))
    assert all(np.isfinite(line["train/loss"]) for line in steps)
    weights = {name: settings.weight for name, settings in configs.phases(config)[-1].config.objectives.items()}
    weights.pop("selection")  # has no loss of its own
    if sum(weight > 0 for weight in weights.values()) > 1:
        parts = sum(weight * steps[-1][f"train/{name}/loss"] for name, weight in weights.items() if weight > 0)
        assert steps[-1]["train/loss"] == pytest.approx(parts, rel=1e-5)
    if config.objectives.selection.weight > 0:
        assert all(line["train/selection/selected"] > line["train/selection/all"] for line in steps)
        assert steps[-1]["train/pairs_seen"] == 2 * steps[-1]["train/pairs"] == 2 * 16 * STEPS
    phase = config.phases[0] if config.phases else {}
    if "objectives.self_distillation.weight" in phase:
        assert [line["step"] for line in steps if "train/self_distillation/local" in line] == [3, 4]
    if "optimizer.learning_rate" in phase:
        rates = [line["train/learning_rate"] / phase["optimizer.learning_rate"] for line in steps[SWITCH:]]
        assert rates == pytest.approx([1, 0.5])  # a constant whose cooldown is the whole phase
        flops = np.diff([0, *(line["train/flops"] for line in steps)])
        assert flops[SWITCH] > 1.5 * flops[SWITCH - 1]  # more tokens: larger images, or all of their patches
        trained = clip_jax.load(workdir)
        full = configs.resolve_preset(configs.phases(config)[-1].config).architecture
        assert trained.image_size == full.image.image_size // SHRINK
        assert trained.tokenize(["a red circle"]).shape == (1, full.text.context_length)


@pytest.mark.exhaustive
def test_active_curation_starts_from_the_run_that_its_recipe_names(tmp_path, monkeypatch):
    first, second = "configs/siglip2_b16.py", "configs/siglip2_b16_acid.py"
    assert loop.run(workdir=str(tmp_path / "first"), recipe=first, overrides=shrunk(first)) == 0
    use_a_small_teacher(monkeypatch, configs.load(second).objectives.selection.reference)
    given = {
        "model.init_from": str(tmp_path / "first"),
        "model.init_from_allow": repr(configs.load(second).model.init_from_allow),
    }
    assert loop.run(workdir=str(tmp_path / "second"), recipe=second, overrides=shrunk(second) | given) == 0
    assert "decoder" not in clip_jax.load(tmp_path / "second").params
