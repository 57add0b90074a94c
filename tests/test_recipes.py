"""Every shipped recipe is valid, and its full-size model traces through a whole training step."""

from pathlib import Path

import jax
import jax.numpy as jnp
import pytest

from clip_jax import config as configs
from clip_jax.sharding import make_mesh
from clip_jax.training import setup
from clip_jax.training.state import abstract_state

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
