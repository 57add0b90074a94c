"""Learning rates, decay and updates are those of the papers, by hand."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from clip_jax import presets
from clip_jax.devices.sharding import make_mesh
from clip_jax.errors import UserError
from clip_jax.models.clip import CLIP
from clip_jax.planning.program import matmul_flops
from clip_jax.training import muon as muon_matrices
from clip_jax.training.optimizer import (
    EMBEDDINGS,
    POSITIONS,
    VECTORS,
    adafactor,
    adamw,
    decay_mask,
    lamb,
    muon,
    stable_adamw,
)
from clip_jax.training.rates import check_factors, scale_by_factors
from clip_jax.training.schedule import schedule
from tests.training.steps import learner_of, train

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


OPTIONS = {"weight_decay": 0.1, "decay": "matrices", "beta1": 0.9, "beta2": 0.95, "eps": 1e-6, "clip_norm": 0.0}


def random_like(tree, seed):
    rng = np.random.default_rng(seed)
    return jax.tree.map(lambda x: jnp.asarray(rng.normal(size=x.shape), jnp.float32), tree)


def updates_of(optimizer, params, gradients):
    """The update after several steps with the same parameters."""
    state = optimizer.init(params)
    for gradient in gradients:
        updates, state = jax.jit(optimizer.update)(gradient, state, params)
    return updates


def test_warmup_stable_decay_is_constant_with_a_cooldown_of_either_form():
    options = {"warmup": 10, "steps": 100, "cooldown": 20}
    for step, linear, root in ((0, 0.1, 0.1), (50, 1, 1), (80, 1, 1), (85, 0.75, 0.5), (99, 0.05, 1 - 0.95**0.5)):
        assert float(schedule("wsd", 2.0, **options)(step)) == pytest.approx(2 * linear, rel=1e-5)
        assert float(schedule("wsd", 2.0, form="1-sqrt", **options)(step)) == pytest.approx(2 * root, rel=1e-5)


def test_lamb_is_optaxs_for_each_layer_of_a_stack():
    params, gradients = random_like(PARAMS, 0), [random_like(PARAMS, seed) for seed in (1, 2)]
    found = updates_of(lamb(lambda _: 0.1, **OPTIONS), params, gradients)
    reference = optax.lamb(0.1, b1=0.9, b2=0.95, eps=1e-6, weight_decay=0.1)

    def of(*path):
        def leaf(tree):
            for key in path:
                tree = tree[key]
            return tree

        return leaf

    blocks = ("image", "transformer", "blocks")
    for leaf in (of(*blocks, "attention", "qkv"), of(*blocks, "mlp", "up")):
        for layer in range(2):
            expected = updates_of(reference, leaf(params)[layer], [leaf(g)[layer] for g in gradients])
            np.testing.assert_allclose(leaf(found)[layer], expected, rtol=1e-5, atol=1e-7)
    leaf = of("text", "token_embedding")
    np.testing.assert_allclose(leaf(found), updates_of(reference, leaf(params), list(map(leaf, gradients))), rtol=1e-5)
    leaf, adam = of("image", "norm_pre", "scale"), optax.adam(0.1, b1=0.9, b2=0.95, eps=1e-6)
    np.testing.assert_allclose(leaf(found), updates_of(adam, leaf(params), list(map(leaf, gradients))), rtol=1e-5)


def test_stable_adamw_divides_the_rate_of_each_layer_by_the_rms_of_its_gradient():
    """Wortsman et al. 2023, algorithm 2, in NumPy: the second layer's gradient grows a hundredfold."""
    params = {"blocks": {"up": random_like(jnp.ones((2, 4, 8)), 0)}}
    gradients = [random_like(params, seed) for seed in (1, 2, 3)]
    gradients[2]["blocks"]["up"] *= jnp.asarray([1.0, 100.0]).reshape(2, 1, 1)
    found = updates_of(stable_adamw(lambda _: 0.1, **OPTIONS), params, gradients)["blocks"]["up"]
    for layer in range(2):
        p, m, v = np.asarray(params["blocks"]["up"][layer], np.float64), 0.0, 0.0
        for step, gradient in enumerate(gradients, 1):
            g = np.asarray(gradient["blocks"]["up"][layer], np.float64)
            m, v = 0.9 * m + 0.1 * g, 0.95 * v + 0.05 * g * g
            m_hat, v_hat = m / (1 - 0.9**step), v / (1 - 0.95**step)
            rms = np.sqrt(np.mean(g * g / np.maximum(v_hat, 1e-12)))
        expected = -0.1 / max(1, rms) * (m_hat / (np.sqrt(v_hat) + 1e-6) + 0.1 * p)
        assert (rms > 1.5) == (layer == 1)
        np.testing.assert_allclose(found[layer], expected, rtol=1e-4)


@pytest.mark.parametrize("name", ["ViT-B/32", "RN50", "ViT-B/16-SigLIP", "EVA02-B-16"])
def test_no_kernel_of_any_family_falls_to_adam(name):
    architecture = presets.preset(name).architecture
    params = jax.eval_shape(CLIP(architecture).init, jax.random.key(0))
    leaves = jax.tree_util.tree_flatten_with_path(muon_matrices.labels(params))[0]
    names = {label: set() for label in ("muon", "adam")}
    for path, label in leaves:
        names[label].add([key.key for key in path if isinstance(key, jax.tree_util.DictKey)][-1])
    first_and_last = {"patch_embedding", "projection"}
    assert {n for n in names["adam"] if not n.endswith("_bias")} <= {*EMBEDDINGS, *POSITIONS, *VECTORS} | first_and_last
    assert len(names["muon"]) >= 4 and not names["muon"] & names["adam"]


def test_muons_updates_are_orthogonal_in_each_layer_and_for_queries_keys_and_values_apart():
    params, gradient = random_like(PARAMS, 0), random_like(PARAMS, 1)
    found = updates_of(muon(lambda _: 1.0, **OPTIONS | {"weight_decay": 0.0}), params, [gradient])
    blocks = found["image"]["transformer"]["blocks"]
    qkv = np.asarray(blocks["attention"]["qkv"])  # [layers, width, 3, heads, head_dim]
    for layer in range(2):
        matrices = [qkv[layer, :, i].reshape(4, 4) for i in range(3)] + [np.asarray(blocks["mlp"]["up"][layer])]
        for matrix in matrices:  # optax's five iterations bring singular values to about 0.7 to 1.2
            values = np.linalg.svd(matrix, compute_uv=False) / (0.2 * max(matrix.shape) ** 0.5)
            assert values.min() > 0.3 and values.max() < 1.3
    adam = updates_of(adamw(lambda _: 1.0, **OPTIONS | {"weight_decay": 0.0}), params, [gradient])
    np.testing.assert_allclose(found["text"]["token_embedding"], adam["text"]["token_embedding"], rtol=1e-5)


def test_the_plan_counts_muons_products():
    mesh = make_mesh(1, devices=jax.devices()[:1])
    made = [learner_of(mesh, optimizer=kind(lambda _: 1.0, **OPTIONS)) for kind in (muon, adamw)]
    flops = [matmul_flops(jax.make_jaxpr(one.step())(one.abstract_state(), one.batch_spec(16), {})) for one in made]
    assert muon_matrices.update_flops(made[0].abstract_state().params) == pytest.approx(flops[0] - flops[1], rel=0.02)


KINDS = [pytest.param(kind, marks=pytest.mark.exhaustive) for kind in (muon, lamb, stable_adamw)]


@pytest.mark.parametrize("kind", KINDS)
def test_an_optimizer_trains_on_any_mesh_as_on_one_device(kind):
    def losses(mesh):
        seen, _ = train(mesh, optimizer=kind(lambda _: 1e-2, **OPTIONS))
        return [metrics["loss"] for metrics in seen]

    expected = losses(make_mesh(1, devices=jax.devices()[:1]))
    assert losses(make_mesh(2, 2, 2)) == pytest.approx(expected, rel=1e-4)
    assert expected[-1] != pytest.approx(expected[0], rel=1e-3)


def test_factors_of_the_rate_multiply_and_fall_with_depth():
    factors = ({"image/*": 0.5}, {"*/blocks/*": 0.1})
    ones = jax.tree.map(jnp.ones_like, PARAMS)
    found, _ = scale_by_factors(factors, 0.9, {"image": 2}).update(ones, optax.EmptyState(), ones)
    blocks = found["image"]["transformer"]["blocks"]["mlp"]["up"]
    assert blocks[0, 0, 0] == pytest.approx(0.5 * 0.1 * 0.81) and blocks[1, 0, 0] == pytest.approx(0.5 * 0.1 * 0.9)
    assert found["image"]["patch_embedding"][0, 0] == pytest.approx(0.5 * 0.9**3)
    assert found["image"]["projection"][0, 0] == pytest.approx(0.5)
    assert found["text"]["token_embedding"][0, 0] == found["logit_scale"] == 1
    with pytest.raises(UserError, match="matches no parameter"):
        check_factors(PARAMS, ({"imag/*": 0.5},))
