"""Learning rates, decay and updates are those of the papers, by hand."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from clip_jax.training.optimizer import adafactor, adamw, decay_mask
from clip_jax.training.schedule import schedule

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
    assert decayed("kernels") == MATRICES - {"text.token_embedding"}
    assert decayed("matrices_and_positions") == MATRICES | {"image.position_embedding", "text.position_embedding"}


def test_a_parameter_that_no_rule_knows_is_refused_by_name():
    with pytest.raises(ValueError, match=r"image/decoder/weights: .* does not say whether 'weights' decays"):
        decay_mask("kernels")({"image": {"decoder": {"weights": jnp.ones((2, 2))}}})


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


def test_rsqrt_falls_with_the_root_of_time_and_the_cooldown_ends_at_zero():
    rate = schedule("rsqrt", 1e-3, warmup=10, steps=1010, timescale=100, cooldown=200)
    assert float(rate(9)) == float(rate(10)) == pytest.approx(1e-3)
    assert float(rate(110)) == pytest.approx(1e-3 / np.sqrt(2))
    assert float(rate(310)) == pytest.approx(5e-4)
    assert float(rate(910)) == pytest.approx(1e-3 / np.sqrt(10) / 2)
    assert float(rate(1010)) == 0
    assert float(schedule("constant", 3e-4, 0, 10, cooldown=4)(8)) == pytest.approx(1.5e-4)


def reference_adafactor(gradients, factored, *, rate, beta1, beta2):
    """The sum of updates of one tensor, straight from the papers: Shazeer and Stern 2018, algorithm 4, without update
    clipping and relative step size; Zhai et al. 2022 for the cap of the decay and the first moment."""
    row = column = whole = momentum = total = 0.0
    for t, gradient in enumerate(gradients, start=1):
        decay, square = min(beta2, 1 - t**-0.8), gradient**2 + 1e-30
        if factored:
            row = decay * row + (1 - decay) * square.mean(axis=1, keepdims=True)
            column = decay * column + (1 - decay) * square.mean(axis=0, keepdims=True)
            second = row * column / row.mean()
        else:
            second = whole = decay * whole + (1 - decay) * square
        momentum = beta1 * momentum + (1 - beta1) * gradient / np.sqrt(second)
        total = total - rate * momentum
    return total


def test_adafactor_is_that_of_the_papers_and_factors_each_layer_by_itself():
    """Large matrices are factored, vectors are not, nor is a stack of 40 vectors, nor the kernel of the patches."""
    rng = np.random.default_rng(0)
    shapes = {"kernel": (48, 40), "bias": (64,), "patch_embedding": (48, 40)}
    stacked = {"kernel": (2, 48, 40), "bias": (40, 64)}
    params = {name: jnp.zeros(shape) for name, shape in shapes.items()}
    params["blocks"] = {name: jnp.zeros(shape) for name, shape in stacked.items()}
    steps = [jax.tree.map(lambda p: rng.normal(size=p.shape).astype(np.float32), params) for _ in range(5)]
    options = {"beta1": 0.9, "beta2": 0.4}
    optimizer = adafactor(
        lambda _: 0.1, weight_decay=0.0, decay="kernels", clip_norm=0.0, first_moment_dtype="float32", **options
    )
    state, found = optimizer.init(params), jax.tree.map(jnp.zeros_like, params)
    for gradients in steps:
        updates, state = optimizer.update(gradients, state, params)
        found = jax.tree.map(jnp.add, found, updates)

    def check(ours, gradients, factored):
        expected = reference_adafactor(gradients, factored, rate=0.1, **options)
        np.testing.assert_allclose(ours, expected, rtol=1e-4, atol=1e-6)

    for name in shapes:
        check(found[name], [g[name] for g in steps], factored=name == "kernel")
    for layer in (0, 1):
        check(found["blocks"]["kernel"][layer], [g["blocks"]["kernel"][layer] for g in steps], factored=True)
    check(found["blocks"]["bias"], [g["blocks"]["bias"] for g in steps], factored=False)


def test_first_moments_are_kept_in_bfloat16_where_asked():
    params = {"blocks": {"up": jnp.ones((2, 64, 64))}, "projection": jnp.ones((64, 64))}
    common = {"weight_decay": 0.1, "decay": "kernels", "clip_norm": 0.0, "first_moment_dtype": "bfloat16"}
    for optimizer in (
        adamw(lambda _: 0.1, beta1=0.9, beta2=0.95, eps=1e-8, **common),
        adafactor(lambda _: 0.1, beta1=0.9, beta2=0.95, **common),
    ):
        leaves = jax.tree.leaves(optimizer.init(params))
        halves = sum(leaf.size for leaf in leaves if leaf.dtype == jnp.bfloat16)
        assert halves == sum(leaf.size for leaf in jax.tree.leaves(params))


def test_a_small_decay_of_big_visions_is_ours_divided_by_its_peak_rate():
    """big_vision: update * rate + decay * p, all times the schedule; so 1e-4 there is 0.1 here at a rate of 1e-3."""
    params = {"projection": jnp.full((2, 2), 3.0)}
    gradients = {"projection": jnp.full((2, 2), 1e-3)}
    common = {"decay": "kernels", "clip_norm": 0.0, "beta1": 0.0, "beta2": 0.95}
    updates = [
        optimizer.update(gradients, optimizer.init(params), params)[0]["projection"][0, 0]
        for optimizer in (adafactor(lambda _: 1e-3, weight_decay=w, **common) for w in (0.0, 0.1))
    ]
    assert float(updates[1] - updates[0]) == pytest.approx(-1e-4 * 3.0, rel=1e-3)


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
