"""Every shipped recipe is valid, and its full-size model traces through a whole training step."""

from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from clip_jax import config as configs
from clip_jax.sharding import make_mesh, to_devices
from clip_jax.training import setup
from clip_jax.training.state import abstract_state, create_state

RECIPES = sorted(Path("configs").glob("*.py"))


def test_the_recipes_are_there():
    assert {r.stem for r in RECIPES} >= {
        "demo",
        "emoji",
        "coco_captions",
        "clip_vit_b32",
        "clip_vit_b16",
        "clip_vit_l14",
    }


@pytest.mark.parametrize("recipe", RECIPES, ids=lambda r: r.stem)
def test_a_recipe_has_its_launch_line_on_top(recipe):
    assert "python main.py --config=" in recipe.read_text().split('"""')[1]


@pytest.mark.parametrize("recipe", RECIPES, ids=lambda r: r.stem)
def test_a_recipe_traces_with_its_full_size_model(recipe):
    config = configs.load(str(recipe))
    preset = configs.resolve_preset(config)
    mesh, model = make_mesh(), setup.make_model(config, preset)
    rate = setup.make_schedule(config, 100_000, samples=400_000_000)
    optimizer = setup.make_optimizer(config, rate)
    step = setup.make_step(config, preset, model, optimizer, rate, mesh)
    image, text = preset.architecture.image, preset.architecture.text
    batch = {
        "image": jax.ShapeDtypeStruct((config.batch_size, image.image_size, image.image_size, 3), jnp.uint8),
        "text": jax.ShapeDtypeStruct((config.batch_size, text.context_length), jnp.int32),
    }
    state = abstract_state(model, optimizer, mesh, average=config.ema_decay > 0)
    new_state, metrics = jax.eval_shape(step, state, batch)
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


@pytest.mark.parametrize(
    ("recipe", "side"), [("siglip_b16", 32), pytest.param("siglip_so400m14", 28, marks=pytest.mark.slow)]
)
def test_a_siglip_recipe_has_the_papers_numbers_and_trains(recipe, side):
    """Zhai et al. 2023: t = ln 10, b = -10, Adafactor as big_vision has it; trained at a small size."""
    full = configs.load(f"configs/{recipe}.py")
    optimizer = full.optimizer
    assert (full.loss.name, full.loss.max_logit_scale, full.batch_size) == ("sigmoid", 0, 32_768)
    assert (optimizer.name, optimizer.first_moment_dtype, optimizer.decay) == ("adafactor", "bfloat16", "kernels")
    assert (optimizer.learning_rate, optimizer.beta1, optimizer.beta2, optimizer.clip_norm) == (1e-3, 0.9, 0.95, 1.0)
    assert optimizer.weight_decay * optimizer.learning_rate == pytest.approx(1e-4)  # big_vision's

    config = configs.load(f"configs/{recipe}.py", SMALL_RUN | {"model.image.image_size": str(side)})
    preset, mesh = configs.resolve_preset(config), make_mesh(-1, config.mesh.fsdp)
    model, rate = setup.make_model(config, preset), setup.make_schedule(config, 200, samples=16)
    optimizer = setup.make_optimizer(config, rate)
    step = setup.make_step(config, preset, model, optimizer, rate, mesh)
    state = create_state(model, optimizer, mesh, seed=0)
    rng, length = np.random.default_rng(0), preset.architecture.text.context_length
    batch = {
        "image": rng.integers(0, 256, (16, side, side, 3), np.uint8),
        "text": rng.integers(0, 100, (16, length)).astype(np.int32),
    }
    seen = []
    for _ in range(10):
        state, metrics = step(state, to_devices(batch, mesh, 16))
        seen.append({name: float(value) for name, value in metrics.items()})
    assert (seen[0]["logit_scale"], seen[0]["logit_bias"]) == pytest.approx((10, -10))
    assert seen[0]["loss"] == pytest.approx(10, abs=3)  # as the recipe's docstring says
    assert seen[-1]["loss"] < 0.8 * seen[0]["loss"]
