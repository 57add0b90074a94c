"""Learning rates, decay and updates are those of the papers, by hand."""

import jax.numpy as jnp
import numpy as np
import pytest

from clip_jax.training.optimizer import adamw, decay_mask, schedule

PARAMS = {
    "image": {
        "patch_embedding": jnp.ones((12, 4)),
        "class_embedding": jnp.ones(4),
        "position_embedding": jnp.ones((5, 4)),
        "projection": jnp.ones((4, 3)),
        "norm_pre": {"scale": jnp.ones(4), "bias": jnp.ones(4)},
        "transformer": {
            "blocks": {
                "attention": {"qkv": jnp.ones((2, 4, 3, 2, 2)), "qkv_bias": jnp.ones((2, 3, 2, 2))},
                "mlp": {"up": jnp.ones((2, 4, 8)), "up_bias": jnp.ones((2, 8))},
                "norm_1": {"scale": jnp.ones((2, 4)), "bias": jnp.ones((2, 4))},
            }
        },
    },
    "text": {"token_embedding": jnp.ones((9, 4)), "position_embedding": jnp.ones((6, 4))},
    "logit_scale": jnp.ones(()),
}


def decayed(rule):
    mask = decay_mask(rule)(PARAMS)
    found = set()

    def walk(tree, prefix):
        for name, value in tree.items():
            if isinstance(value, dict):
                walk(value, f"{prefix}{name}.")
            elif value:
                found.add(f"{prefix}{name}")

    walk(mask, "")
    return found


MATRICES = {
    "image.patch_embedding",
    "image.projection",
    "image.transformer.blocks.attention.qkv",
    "image.transformer.blocks.mlp.up",
    "text.token_embedding",
}


def test_what_decays_has_two_dimensions_without_the_stacking_axis():
    assert decayed("matrices") == MATRICES
    assert decayed("matrices_and_positions") == MATRICES | {"image.position_embedding", "text.position_embedding"}


def test_warmup_is_linear_and_starts_above_zero_cosine_ends_at_zero():
    rate = schedule("cosine", 1e-3, warmup=10, steps=110)
    assert float(rate(0)) == pytest.approx(1e-4)
    assert float(rate(9)) == pytest.approx(1e-3)
    assert float(rate(10)) == pytest.approx(1e-3)
    assert float(rate(60)) == pytest.approx(5e-4)
    assert float(rate(109)) == pytest.approx(1e-3 * 0.5 * (1 + np.cos(np.pi * 0.99)), rel=1e-3)
    assert float(rate(110)) == pytest.approx(0, abs=1e-9)


def test_constant_stays_and_no_warmup_starts_at_once():
    assert float(schedule("constant", 3e-4, 0, 10)(0)) == pytest.approx(3e-4)
    assert float(schedule("constant", 3e-4, 2, 10)(9)) == pytest.approx(3e-4)


def test_one_step_of_adamw_by_hand():
    """m / (1 - b1) = g and v / (1 - b2) = g^2 after one step, so the update is -lr * (sign(g) + decay * p)."""
    optimizer = adamw(lambda _: 0.1, weight_decay=0.2, decay="matrices", beta1=0.9, beta2=0.98, eps=0.0, clip_norm=0.0)
    params = {"up": jnp.full((2, 2), 3.0), "up_bias": jnp.full(2, 3.0)}
    gradients = {"up": jnp.full((2, 2), -4.0), "up_bias": jnp.full(2, 5.0)}
    updates, _ = optimizer.update(gradients, optimizer.init(params), params)
    np.testing.assert_allclose(updates["up"], -0.1 * (-1 + 0.2 * 3.0), rtol=1e-5)
    np.testing.assert_allclose(updates["up_bias"], -0.1, rtol=1e-5)


def test_clipping_bounds_the_global_norm_of_the_gradient():
    optimizer = adamw(lambda _: 1.0, weight_decay=0.0, decay="matrices", beta1=0.0, beta2=0.0, eps=1e9, clip_norm=1.0)
    params = {"up": jnp.zeros((2, 2)), "up_bias": jnp.zeros(2)}
    gradients = {"up": jnp.full((2, 2), 3.0), "up_bias": jnp.full(2, 4.0)}
    updates, _ = optimizer.update(gradients, optimizer.init(params), params)
    # With an epsilon this large the update is the clipped gradient, scaled.
    norm = np.sqrt(sum(np.sum(np.square(u)) for u in updates.values()))
    assert norm * 1e9 == pytest.approx(1.0, rel=1e-3)
