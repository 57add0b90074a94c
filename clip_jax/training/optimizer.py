"""optax chains: AdamW as CLIP was trained, Adafactor as SigLIP was, their relatives, and what decays in each."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax

from clip_jax.training import muon as muon_matrices
from clip_jax.training.schedule import Schedule

KERNELS = (
    *("qkv", "out", "up", "down", "gate", "query", "key", "value", "key_value", "kernel"),
    *("patch_embedding", "projection", "prototypes"),
)
EMBEDDINGS = ("token_embedding", "spatial_embedding")
POSITIONS = ("position_embedding", "queries")
VECTORS = (
    "scale",
    "bias",
    "class_embedding",
    "probe",
    "mask_embedding",
    "scale_1",
    "scale_2",
    "logit_scale",
    "logit_bias",
)
"""Parameters that never decay, with all whose names end in ``_bias``."""

DECAYED = {
    "kernels": KERNELS,  # big_vision
    "matrices": KERNELS + EMBEDDINGS,  # OpenCLIP 4
    "matrices_and_positions": KERNELS + EMBEDDINGS + POSITIONS,  # OpenCLIP 3
}
"""Rule -> names of the parameters that decay. Matrices have two dimensions without the stacking axis of the blocks."""


def adamw(
    rate: Schedule,
    *,
    weight_decay: float,
    decay: str,
    beta1: float,
    beta2: float,
    eps: float,
    clip_norm: float,
    first_moment_dtype: str = "float32",
) -> optax.GradientTransformation:
    """Decoupled AdamW (Loshchilov and Hutter 2019); ``clip_norm`` above 0 clips the gradient by its global norm."""
    scale = optax.scale_by_adam(b1=beta1, b2=beta2, eps=eps, mu_dtype=jnp.dtype(first_moment_dtype))
    return _chain(scale, rate, weight_decay, decay, clip_norm)


def stable_adamw(
    rate: Schedule,
    *,
    weight_decay: float,
    decay: str,
    beta1: float,
    beta2: float,
    eps: float,
    clip_norm: float,
    first_moment_dtype: str = "float32",
) -> optax.GradientTransformation:
    """AdamW whose rate falls for a tensor with gradients above their average (Wortsman et al. 2023, algorithm 2).

    The rate of a tensor is divided by max(1, RMS), where RMS^2 is the mean of g^2 / max(v, eps^2) and v the second
    moment: no loss spikes where v lags behind. Each layer of a stack is a tensor.
    """
    adam = optax.scale_by_adam(b1=beta1, b2=beta2, eps=eps, mu_dtype=jnp.dtype(first_moment_dtype))
    inner = optax.chain(adam, optax.add_decayed_weights(weight_decay, mask=decay_mask(decay)))

    def update(gradients, state, params):
        updates, state = inner.update(gradients, state, params)
        second_moments = optax.tree.bias_correction(state[0].nu, beta2, state[0].count)

        def clipped(path, x, g, v):
            rms = jnp.sqrt(_layer_mean(path, g * g / jnp.maximum(v, eps**2)))
            return x / jnp.maximum(1, rms)

        return jax.tree_util.tree_map_with_path(clipped, updates, gradients, second_moments), state

    clip = [optax.clip_by_global_norm(clip_norm)] if clip_norm > 0 else []
    return optax.chain(*clip, optax.GradientTransformation(inner.init, update), optax.scale_by_learning_rate(rate))


def lamb(
    rate: Schedule,
    *,
    weight_decay: float,
    decay: str,
    beta1: float,
    beta2: float,
    eps: float,
    clip_norm: float,
    first_moment_dtype: str = "float32",
) -> optax.GradientTransformation:
    """LAMB (You et al. 2020): AdamW whose update of each tensor is as large as the tensor, times the rate.

    As optax's, but each layer of a stack is a tensor of its own, and what never decays keeps Adam's update, as in the
    authors' code.
    """
    adam = optax.scale_by_adam(b1=beta1, b2=beta2, eps=eps, mu_dtype=jnp.dtype(first_moment_dtype))

    def trust(updates, params):
        def scaled(path, x, p):
            if _names(path)[-1] not in DECAYED["matrices_and_positions"]:
                return x
            size, step = (jnp.sqrt(_layer_mean(path, value * value)) for value in (p, x))
            return x * jnp.where((size == 0) | (step == 0), 1, size / step)

        return jax.tree_util.tree_map_with_path(scaled, updates, params)

    decayed = optax.add_decayed_weights(weight_decay, mask=decay_mask(decay))
    clip = [optax.clip_by_global_norm(clip_norm)] if clip_norm > 0 else []
    return optax.chain(*clip, adam, decayed, optax.stateless(trust), optax.scale_by_learning_rate(rate))


def muon(
    rate: Schedule,
    *,
    weight_decay: float,
    decay: str,
    beta1: float,
    beta2: float,
    eps: float,
    clip_norm: float,
    first_moment_dtype: str = "float32",
) -> optax.GradientTransformation:
    """Muon for the matrices of the blocks, AdamW for the rest; see ``training/muon.py``. ``beta1`` is the momentum."""
    dtype = jnp.dtype(first_moment_dtype)
    adam = optax.scale_by_adam(b1=beta1, b2=beta2, eps=eps, mu_dtype=dtype)
    scale = muon_matrices.scale_by(adam, beta=beta1, eps=eps, first_moment_dtype=dtype)
    return _chain(scale, rate, weight_decay, decay, clip_norm)


def adafactor(
    rate: Schedule,
    *,
    weight_decay: float,
    decay: str,
    beta1: float,
    beta2: float,
    clip_norm: float,
    first_moment_dtype: str = "bfloat16",
) -> optax.GradientTransformation:
    """Adafactor of Zhai et al. 2022 (section 3.4) and big_vision: factored second moments, no update clipping.

    Second moments decay by min(beta2, 1 - t^-0.8) at step t, from 1, and are factored over the two largest axes of a
    layer's tensor where both have at least 32 entries; the first moment is an average of rate ``beta1`` without bias
    correction. ``weight_decay`` is multiplied by the rate, as in AdamW: big_vision's 1e-4 at a rate of 1e-3 is 0.1.
    """

    def second_moment_decay(step, exponent):
        return jnp.minimum(beta2, 1.0 - (jnp.asarray(step, jnp.float32) + 1.0) ** -exponent)

    factored = optax.scale_by_factored_rms(min_dim_size_to_factor=32, decay_rate_fn=second_moment_decay)
    # big_vision stores it as a convolution's kernel [patch, patch, 3, width], which has only one large axis.
    unfactored = optax.scale_by_factored_rms(factored=False, decay_rate_fn=second_moment_decay)
    scale = optax.chain(
        # A stack of blocks is one tensor per layer: the axis of the layers is never averaged over.
        optax.partition({"stacked": _each_layer(factored), "single": factored, "patches": unfactored}, _labels),
        optax.ema(beta1, debias=False, accumulator_dtype=jnp.dtype(first_moment_dtype)),
    )
    return _chain(scale, rate, weight_decay, decay, clip_norm)


def _chain(
    scale: optax.GradientTransformation, rate: Schedule, weight_decay: float, decay: str, clip_norm: float
) -> optax.GradientTransformation:
    clip = [optax.clip_by_global_norm(clip_norm)] if clip_norm > 0 else []
    decayed = optax.add_decayed_weights(weight_decay, mask=decay_mask(decay))
    return optax.chain(*clip, scale, decayed, optax.scale_by_learning_rate(rate))


def decay_mask(rule: str) -> Callable[[Any], Any]:
    """Which parameters decay, by ``DECAYED``'s rules.

    Raises ValueError for a name that no rule knows: a new layer must say whether its parameters decay.
    """

    def decays(path, _) -> bool:
        name = _names(path)[-1]
        if name not in DECAYED["matrices_and_positions"] + VECTORS and not name.endswith("_bias"):
            raise ValueError(f"{'/'.join(_names(path))}: training/optimizer.py does not say whether {name!r} decays")
        return name in DECAYED[rule]

    def mask(params):
        return jax.tree_util.tree_map_with_path(decays, params)

    return mask


def _names(path) -> list[str]:
    """The names in the dictionaries; a box around an array adds an attribute after them."""
    return [key.key for key in path if isinstance(key, jax.tree_util.DictKey)]


def _is_stacked(path) -> bool:
    """Whether the first axis of a tensor counts layers: of transformers, of ResNets."""
    return any(name == "blocks" or name.endswith("_rest") for name in _names(path))


def _layer_mean(path, x: jax.Array) -> jax.Array:
    """The mean over a tensor; of a stack, over each layer."""
    return jnp.mean(x, axis=tuple(range(1 if _is_stacked(path) else 0, x.ndim)), keepdims=True)


def _labels(params):
    def label(path, _):
        if _names(path)[-1] == "patch_embedding":
            return "patches"
        return "stacked" if _is_stacked(path) else "single"

    return jax.tree_util.tree_map_with_path(label, params)


def _each_layer(inner: optax.GradientTransformation) -> optax.GradientTransformation:
    """``scale_by_factored_rms`` for each layer of stacked tensors separately; stacks may differ in their depth."""
    axes = optax.FactoredState(count=None, v_row=0, v_col=0, v=0)
    init_layers = jax.vmap(inner.init, out_axes=axes)
    update_layers = jax.vmap(inner.update, in_axes=(0, axes, 0), out_axes=(0, axes))

    def init(params):
        moments = [jax.tree.map(lambda p, i=i: init_layers(p)[i], params) for i in (1, 2, 3)]
        return optax.FactoredState(jnp.zeros((), jnp.int32), *moments)

    def update(gradients, state, params):
        leaves, tree = jax.tree.flatten(gradients)
        moments = zip(*(jax.tree.leaves(moment) for moment in state[1:]), strict=True)
        done = [
            update_layers(gradient, optax.FactoredState(state.count, *moment), param)
            for gradient, moment, param in zip(leaves, moments, jax.tree.leaves(params), strict=True)
        ]
        moments = [tree.unflatten([state[i] for _, state in done]) for i in (1, 2, 3)]
        count = optax.safe_increment(state.count)
        return tree.unflatten([gradient for gradient, _ in done]), optax.FactoredState(count, *moments)

    return optax.GradientTransformation(init, update)
