"""Two towers and a temperature: CLIP as pure functions over one parameter tree.

    params = {"image": ..., "text": ..., "decoder": ..., "logit_scale": float32[], "objectives": {name: ...}}

``logit_scale`` is the logarithm of the factor that multiplies cosines (Radford et al. 2021, section 2.5). Models for
the sigmoid loss also have a ``logit_bias`` (Zhai et al. 2023), and those that write captions a ``decoder`` (Yu et al.
2022). ``objectives`` holds the parameters of training
objectives that have any (``clip_jax/objectives``); the model itself never reads them.
"""

import math
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int, Key

from clip_jax.errors import UserError
from clip_jax.models.attention import xla
from clip_jax.models.compute import DEFAULT, Compute
from clip_jax.models.decoder import CaptionDecoder
from clip_jax.models.norm import LayerNorm
from clip_jax.models.resize import resize_grid
from clip_jax.models.resnet import ModifiedResNet, ResNetTower
from clip_jax.models.text import TextTower, TextTransformer
from clip_jax.models.vit import ImageTower, ViT

Params = dict[str, Any]
Batch = dict[str, Array]


@dataclass(frozen=True)
class Architecture:
    """Everything that decides the parameter tree and what it computes."""

    image: ImageTower | ResNetTower
    text: TextTower
    embed_dim: int
    init_logit_scale: float = math.log(1 / 0.07)
    init_logit_bias: float | None = None
    """None: the model has no bias."""
    decoder: CaptionDecoder | None = None
    """None: the model writes no captions."""

    @property
    def memory_shape(self) -> tuple[int, int]:
        """(tokens, width) of what a decoder sees of an image; see ``CLIP.memory``."""
        image = self.image
        if isinstance(image, ResNetTower):
            return (image.image_size // 32) ** 2, 32 * image.width
        return (image.queries - 1, self.embed_dim) if image.pooling == "queries" else (image.grid**2, image.width)

    @property
    def transformers(self) -> tuple[ImageTower | TextTower, ...]:
        """The towers that are stacks of transformer blocks."""
        return tuple(tower for tower in (self.image, self.text) if tower.block is not None)


class Outputs(NamedTuple):
    """The outputs of both towers for a batch; under ``jit``, unused fields are not computed."""

    image: Float[Array, "batch embed"]
    """Embeddings of unit length."""
    text: Float[Array, "batch embed"]
    patches: Float[Array, "batch patches width"] | None
    """The image tower's tokens after its last block, the class token first; a ResNet's last feature map; with attention
    pooling by queries, the pooled tokens."""
    tokens: Float[Array, "batch length width"]
    """The text tower's tokens after its last block."""
    batch_stats: Params
    """The new running statistics of batch norm; ``{}`` without."""


@dataclass(frozen=True)
class CLIP:
    """An architecture and how it is computed; every method is pure."""

    architecture: Architecture
    compute: Compute = DEFAULT

    @property
    def image_tower(self) -> ViT | ModifiedResNet:
        return self.architecture.image.module(self.architecture.embed_dim, self.compute)

    @property
    def text_tower(self) -> TextTransformer:
        return self.architecture.text.module(self.architecture.embed_dim, self.compute)

    def init(self, rng: Key[Array, ""]) -> Params:
        """The parameter tree, each leaf boxed with its logical axes (``flax.linen.LogicallyPartitioned``)."""
        image_rng, text_rng = jax.random.split(rng)
        size, length = self.architecture.image.image_size, self.architecture.text.context_length
        # One example, on no mesh, without the fused kernel, which is not everywhere.
        anywhere = replace(self, compute=self.compute._replace(attend=xla, mesh=None))
        image = anywhere.image_tower.init(image_rng, jnp.zeros((1, size, size, 3), jnp.float32))["params"]
        text = anywhere.text_tower.init(text_rng, jnp.zeros((1, length), jnp.int32))["params"]
        params = {"image": self.architecture.image.adjust_init(image), "text": text}
        if self.architecture.decoder is not None:
            params["decoder"] = anywhere._init_decoder(jax.random.fold_in(rng, 2))
        scalars = {"logit_scale": self.architecture.init_logit_scale, "logit_bias": self.architecture.init_logit_bias}
        for name, value in scalars.items():
            if value is not None:
                params[name] = nn.LogicallyPartitioned(jnp.asarray(value, jnp.float32), ())
        return params

    def _init_decoder(self, rng: Key[Array, ""]) -> Params:
        text, decoder = self.architecture.text, self.architecture.decoder
        tokens, ids = jnp.zeros((1, text.context_length, text.width)), jnp.zeros((1, text.context_length), jnp.int32)
        memory = jnp.zeros((1, *self.architecture.memory_shape))
        parallel = jnp.zeros(1, bool) if decoder.parallel else None
        return decoder.module(self.compute).init(rng, tokens, memory, ids, parallel)["params"]

    def init_batch_stats(self) -> Params:
        """The initial running statistics: ``{"image": ...}`` with batch norm, ``{}`` without."""
        tower = self.architecture.image
        if not tower.has_batch_norm:
            return {}
        module = tower.module(self.architecture.embed_dim, self.compute._replace(mesh=None))
        variables = module.init(jax.random.key(0), jnp.zeros((1, tower.image_size, tower.image_size, 3)))
        return {"image": variables["batch_stats"]}

    def encode_image(
        self, params: Params, image: Float[Array, "batch height width 3"], batch_stats: Params | None = None
    ) -> Float[Array, "batch embed"]:
        """Normalized pixels to embeddings, not of unit length; ``batch_stats`` are needed with batch norm only."""
        return self.image_tower.apply(_variables(params, batch_stats), image)[0]

    def pool_image(self, params: Params, image: Float[Array, "batch height width 3"]) -> Float[Array, "batch width"]:
        """What the image tower pools, before its projection; without one, the same as ``encode_image``.

        The features of the CLIP paper's linear probes (Radford et al. 2021, appendix A.3: I_f of figure 3). Raises
        UserError for a ResNet.
        """
        tower = self.architecture.image
        if not isinstance(tower, ImageTower):
            raise UserError("a ResNet has no features before the projection: its attention pool ends with it")
        module = replace(tower, projection=False).module(self.architecture.embed_dim, self.compute)
        return module.apply({"params": params["image"]}, image)[0]

    def patches(
        self, params: Params, image: Float[Array, "batch height width 3"], batch_stats: Params | None = None
    ) -> Float[Array, "batch *tokens width"]:
        """``Outputs.patches`` alone."""
        return self.image_tower.apply(_variables(params, batch_stats), image)[1]

    def encode_text(self, params: Params, text: Int[Array, "batch length"]) -> Float[Array, "batch embed"]:
        """Token ids to embeddings, not of unit length."""
        return self.text_tower.apply({"params": params["text"]}, text)[0]

    def image_tokens(
        self, params: Params, image: Float[Array, "batch height width 3"], layer: int = -1, *, normalize: bool = False
    ) -> Float[Array, "batch tokens width"]:
        """All tokens of a ViT after the given number of blocks (-1: all, -2: all but one), the class token first.

        Later blocks are not computed. ``normalize`` applies the norm that precedes the pooling.
        """
        return self._tokens(self.image_tower, params["image"], image, layer, "norm_post" if normalize else None)

    def text_tokens(
        self, params: Params, text: Int[Array, "batch length"], layer: int = -1, *, normalize: bool = False
    ) -> Float[Array, "batch length width"]:
        """All tokens of a text after the given number of blocks; like ``image_tokens``."""
        return self._tokens(self.text_tower, params["text"], text, layer, "norm_final" if normalize else None)

    def image_features(
        self,
        params: Params,
        image: Float[Array, "batch side side 3"],
        masked: Bool[Array, "batch patches"] | None = None,
        mask_embedding: Float[Array, "width"] | None = None,
    ) -> tuple[Float[Array, "batch embed"], Float[Array, "batch patches width"]]:
        """A ViT's embedding, not of unit length, and its patches after the norm that precedes the pooling, if any.

        Images of another size than the architecture's have resized position embeddings. ``masked`` patches are
        replaced by ``mask_embedding``.
        """
        tower, params = self.architecture.image, params["image"]
        if image.shape[1] != tower.image_size:
            tower = replace(tower, image_size=image.shape[1])
            positions = resize_grid(params["position_embedding"], tower.tokens)
            params = params | {"position_embedding": positions}
        module = tower.module(self.architecture.embed_dim, self.compute).clone(unpooled=True)
        embedding, tokens = module.apply({"params": params}, image, masked=masked, mask_embedding=mask_embedding)
        patches = tokens[:, int(tower.class_token) :]
        if "norm_post" not in params:  # after pooling by queries there is none
            return embedding, patches
        return embedding, LayerNorm(self.compute, tower.norm_epsilon).apply({"params": params["norm_post"]}, patches)

    def memory(
        self, image_params: Params, patches: Float[Array, "batch *tokens width"]
    ) -> Float[Array, "batch tokens width"]:
        """What the decoder sees of an image, from ``Outputs.patches``: the patches after the tower's last norm, without
        the class token (OpenCLIP, and big_vision's CapPa); the pooled tokens; a ResNet's feature map."""
        tower = self.architecture.image
        if not isinstance(tower, ImageTower):
            return patches.reshape(len(patches), -1, patches.shape[-1])
        if tower.pooling == "queries":
            return patches
        if tower.pooling == "class" or tower.norm_before_pooling:
            norm = LayerNorm(self.compute, tower.norm_epsilon)
            patches = norm.apply({"params": nn.meta.unbox(image_params["norm_post"])}, patches)
        return patches[:, int(tower.class_token) :]

    def decode(
        self,
        params: Params,
        tokens: Float[Array, "batch length width"],
        patches: Float[Array, "batch *tokens width"],
        text: Int[Array, "batch length"],
        parallel: Bool[Array, "batch"] | None = None,
    ) -> tuple[Float[Array, "batch predicted width"], Float[Array, "width vocab"], Float[Array, "vocab"] | None]:
        """The decoder's hidden states and its head, which predict the last tokens of ``text``.

        ``tokens`` and ``patches`` are those of ``Outputs``; in ``parallel`` rows the text is masked.
        """
        memory = self.memory(params["image"], patches)
        module = self.architecture.decoder.module(self.compute)
        return module.apply({"params": params["decoder"]}, tokens, memory, text, parallel)

    def _tokens(self, module: nn.Module, params: Params, inputs: Array, layer: int, norm: str | None) -> Array:
        depth = module.tower.layers
        layers = layer if layer >= 0 else depth + 1 + layer
        if not 1 <= layers <= depth:
            raise UserError(f"layer={layer}: the tower has {depth}; give 1 to {depth}, or -1 to -{depth} from the end")
        blocks = jax.tree.map(lambda leaf: leaf[:layers], params["transformer"]["blocks"])
        shorter = module.clone(tower=replace(module.tower, layers=layers))
        if isinstance(module, ViT):
            shorter = shorter.clone(unpooled=True)
        _, tokens = shorter.apply({"params": params | {"transformer": {"blocks": blocks}}}, inputs)
        if norm is None:
            return tokens
        if norm not in params:
            raise UserError("normalize=True: this tower has no norm of its tokens, only one after its pooling")
        return LayerNorm(self.compute, module.tower.norm_epsilon).apply({"params": params[norm]}, tokens)

    def forward(
        self,
        params: Params,
        batch_stats: Params,
        batch: Batch,
        *,
        train: bool,
        keys: Key[Array, "batch"] | None = None,
        patch_dropout: float = 0.0,
    ) -> Outputs:
        """Both towers over ``batch["image"]`` (normalized pixels) and ``batch["text"]`` (token ids).

        ``patch_dropout`` is the share of an image's patches that training drops (FLIP, Li et al. 2023); it needs
        ``keys``, one per pair. With ``batch["image_embedding"]`` in place of ``batch["image"]``, the image tower does
        not run and there are no patches.
        """
        text, tokens = self.text_tower.apply({"params": params["text"]}, batch["text"])
        if "image_embedding" in batch:
            return Outputs(unit(batch["image_embedding"]), unit(text), None, tokens, batch_stats)
        variables = _variables(params, batch_stats)
        if train and self.architecture.image.has_batch_norm:
            (embedding, patches), new = self.image_tower.apply(
                variables, batch["image"], train=True, mutable=["batch_stats"]
            )
            batch_stats = {"image": new["batch_stats"]}
        elif train and patch_dropout > 0:
            embedding, patches = self.image_tower.apply(
                variables, batch["image"], train=True, keys=keys, patch_dropout=patch_dropout
            )
        else:
            embedding, patches = self.image_tower.apply(variables, batch["image"])
        return Outputs(unit(embedding), unit(text), patches, tokens, batch_stats)


def _variables(params: Params, batch_stats: Params | None) -> Params:
    """The variables of the image tower, as Flax calls them."""
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
