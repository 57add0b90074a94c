"""Every shipped recipe is valid, and its full-size model traces through a whole training step."""

from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from clip_jax import config as configs
from clip_jax.devices.sharding import make_mesh, to_devices
from clip_jax.objectives import contrastive
from clip_jax.training.setup import make_learner

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


@pytest.mark.parametrize(
    ("recipe", "side"), [("siglip_b16", 32), pytest.param("siglip_so400m14", 28, marks=pytest.mark.slow)]
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
