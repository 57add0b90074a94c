"""Two towers and a temperature: what CLIP is, as pure functions over one parameter tree.

    params = {"image": ..., "text": ..., "logit_scale": float32[]}

``logit_scale`` is the logarithm of the factor that multiplies cosines (Radford et al. 2021, section 2.5). Models for
the sigmoid loss also have a ``logit_bias`` (Zhai et al. 2023).
"""

import math
from dataclasses import dataclass, replace
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int, Key

from clip_jax.errors import UserError
from clip_jax.models.attention import Attend, xla
from clip_jax.models.resnet import ModifiedResNet, ResNetTower
from clip_jax.models.text import TextTower, TextTransformer
from clip_jax.models.transformer import LayerNorm, Remat
from clip_jax.models.vit import ImageTower, ViT, eva_start

Params = dict[str, Any]


@dataclass(frozen=True)
class Architecture:
    """Everything that decides the parameter tree and what it computes."""

    image: ImageTower | ResNetTower
    text: TextTower
    embed_dim: int
    init_logit_scale: float = math.log(1 / 0.07)
    init_logit_bias: float | None = None
    """None: the model has no bias."""


@dataclass(frozen=True)
class CLIP:
    """An architecture with the settings of its computation; every method is pure.

    ``dtype`` is the type of the matrix products; parameters, norms, softmax and embeddings are float32.
    ``patch_dropout`` is the share of an image's patches that training leaves out (FLIP, Li et al. 2023).
    ``attend`` is one of ``models.attention.ATTENTION``.
    """

    architecture: Architecture
    dtype: jnp.dtype = jnp.float32
    scan: bool = True
    remat: Remat = "none"
    patch_dropout: float = 0.0
    attend: Attend = xla

    @property
    def image_tower(self) -> ViT | ModifiedResNet:
        tower, embed_dim = self.architecture.image, self.architecture.embed_dim
        if isinstance(tower, ResNetTower):
            return ModifiedResNet(tower, embed_dim, self.dtype, self.scan, self.remat)
        return ViT(tower, embed_dim, self.dtype, self.scan, self.remat, self.attend, self.patch_dropout)

    @property
    def text_tower(self) -> TextTransformer:
        tower, embed_dim = self.architecture.text, self.architecture.embed_dim
        return TextTransformer(tower, embed_dim, self.dtype, self.scan, self.remat, self.attend)

    def init(self, rng: Key[Array, ""]) -> Params:
        """The parameter tree, each leaf boxed with its logical axes (``flax.linen.LogicallyPartitioned``)."""
        image_rng, text_rng = jax.random.split(rng)
        size, length = self.architecture.image.image_size, self.architecture.text.context_length
        anywhere = replace(self, attend=xla)  # also where the fused kernel is not
        image = anywhere.image_tower.init(image_rng, jnp.zeros((1, size, size, 3), jnp.float32))["params"]
        if isinstance(self.architecture.image, ImageTower) and not self.architecture.image.key_bias:
            image = eva_start(image)
        text = anywhere.text_tower.init(text_rng, jnp.zeros((1, length), jnp.int32))
        params = {"image": image, "text": text["params"]}
        starts = {"logit_scale": self.architecture.init_logit_scale, "logit_bias": self.architecture.init_logit_bias}
        for name, start in starts.items():
            if start is not None:
                params[name] = nn.LogicallyPartitioned(jnp.asarray(start, jnp.float32), ())
        return params

    def init_batch_stats(self) -> Params:
        """The running statistics of a fresh model: ``{"image": ...}`` with batch norm, ``{}`` without."""
        if not isinstance(self.architecture.image, ResNetTower):
            return {}
        size = self.architecture.image.image_size
        return {"image": self.image_tower.init(jax.random.key(0), jnp.zeros((1, size, size, 3)))["batch_stats"]}

    def encode_image(
        self, params: Params, image: Float[Array, "batch height width 3"], batch_stats: Params | None = None
    ) -> Float[Array, "batch embed"]:
        """Normalised pixels to embeddings, not of unit length; ``batch_stats`` are needed with batch norm only."""
        return self.image_tower.apply(_variables(params, batch_stats), image)

    def encode_text(self, params: Params, text: Int[Array, "batch length"]) -> Float[Array, "batch embed"]:
        """Token ids to embeddings, not of unit length."""
        return self.text_tower.apply({"params": params["text"]}, text)

    def image_tokens(
        self, params: Params, image: Float[Array, "batch height width 3"], layer: int = -1, *, normalize: bool = False
    ) -> Float[Array, "batch tokens width"]:
        """All tokens of a ViT behind so many of its blocks (-1: all, -2: all but one), the class token first.

        Later blocks are not computed. ``normalize`` applies the norm that stands in front of the pooling.
        """
        return self._tokens(self.image_tower, params["image"], image, layer, "norm_post" if normalize else None)

    def text_tokens(
        self, params: Params, text: Int[Array, "batch length"], layer: int = -1, *, normalize: bool = False
    ) -> Float[Array, "batch length width"]:
        """All tokens of a text behind so many blocks; as ``image_tokens``."""
        return self._tokens(self.text_tower, params["text"], text, layer, "norm_final" if normalize else None)

    def _tokens(self, module: nn.Module, params: Params, given: Array, layer: int, norm: str | None) -> Array:
        depth = module.tower.layers
        kept = layer if layer >= 0 else depth + 1 + layer
        if not 1 <= kept <= depth:
            raise UserError(f"layer={layer}: the tower has {depth}; give 1 to {depth}, or -1 to -{depth} from the end")
        blocks = jax.tree.map(lambda leaf: leaf[:kept], params["transformer"]["blocks"])
        shorter = module.clone(tower=replace(module.tower, layers=kept), tokens_only=True)
        tokens = shorter.apply({"params": params | {"transformer": {"blocks": blocks}}}, given)
        if norm is None:
            return tokens
        return LayerNorm(self.dtype, module.tower.norm_epsilon).apply({"params": params[norm]}, tokens)

    def forward(
        self,
        params: Params,
        batch_stats: Params,
        image: Float[Array, "batch height width 3"],
        text: Int[Array, "batch length"],
        *,
        train: bool,
        keys: Key[Array, "batch"] | None = None,
    ) -> tuple[Float[Array, "batch embed"], Float[Array, "batch embed"], Params]:
        """Both embeddings, of unit length, and the new batch statistics (``{}``: a ViT has none).

        ``keys``, one a pair, are needed for training with patch dropout only.
        """
        variables = _variables(params, batch_stats)
        if train and "batch_stats" in variables:
            embedding, new = self.image_tower.apply(variables, image, train=True, mutable=["batch_stats"])
            batch_stats = {"image": new["batch_stats"]}
        elif train and self.patch_dropout > 0:
            embedding = self.image_tower.apply(variables, image, train=True, keys=keys)
        else:
            embedding = self.image_tower.apply(variables, image)
        return unit(embedding), unit(self.encode_text(params, text)), batch_stats


def _variables(params: Params, batch_stats: Params | None) -> Params:
    """What Flax calls the variables of the image tower."""
    variables = {"params": params["image"]}
    return variables | {"batch_stats": batch_stats["image"]} if batch_stats else variables


def unit(x: Float[Array, "... dim"]) -> Float[Array, "... dim"]:
    """x / |x|, in float32."""
    x = x.astype(jnp.float32)
    return x * jax.lax.rsqrt(jnp.sum(x * x, axis=-1, keepdims=True))


def parameter_counts(params: Params) -> dict[str, int]:
    """Parameters by tower and in total, from arrays or shapes."""
    count = {tower: sum(leaf.size for leaf in jax.tree.leaves(params[tower])) for tower in ("image", "text")}
    return count | {"total": sum(leaf.size for leaf in jax.tree.leaves(params))}
