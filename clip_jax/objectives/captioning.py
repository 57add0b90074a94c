"""Captioning: a decoder predicts each token of the caption from those before it and from the image.

    coca:  loss = -mean over all tokens of log p(token t | tokens before t, image)  (Yu et al. 2022, CoCa, equation 3)
    cappa: the same, first the mean over each caption, then over captions           (Tschannen et al. 2023, CapPa)

On a causal text tower the decoder continues from its tokens, as CoCa's: the tower runs once for both losses. On any
other tower, whose tokens see the whole caption, it reads the caption itself (Wan et al. 2024, LocCa), and for a share
of the images, ``parallel``, predicts all tokens at once from the image alone (CapPa). The decoder is part of the model.
"""

import dataclasses
import functools

import flax.linen as nn
import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from clip_jax.data.tokenizers import Tokenizer
from clip_jax.devices.sharding import batch_shards
from clip_jax.errors import UserError
from clip_jax.losses.vocabulary import chunk_size, cross_entropy
from clip_jax.models.clip import CLIP, Architecture, Batch, Params
from clip_jax.models.decoder import CaptionDecoder
from clip_jax.models.text import TextTower
from clip_jax.objectives.cost import Cost, saved_bytes, traceable
from clip_jax.objectives.objective import MeshLike, Objective, ObjectiveSpec, Rows, Settings, Sums
from clip_jax.presets import Preprocess

NAME = "captioning"


def make(settings: Settings, model: CLIP, preprocess: Preprocess, tokenizer: Tokenizer | None) -> Objective:
    tower, decoder, share = model.architecture.text, model.architecture.decoder, settings["parallel"]

    def prepare(batch: Batch) -> Batch:
        counted = targets_of(decoder, caption_mask(batch["text"], tower)).astype(jnp.float32)
        if decoder.form == "coca":
            return {f"{NAME}/weight": counted / jnp.sum(counted)}
        return {f"{NAME}/weight": counted / jnp.sum(counted, axis=1, keepdims=True) / len(counted)}

    def local(rows: Rows) -> tuple[Float[Array, ""], Sums]:
        text, weights = rows.batch["text"], rows.batch[f"{NAME}/weight"]
        parallel = jax.vmap(lambda key: jax.random.bernoulli(key, share))(rows.keys) if decoder.parallel else None
        hidden, head, bias = model.decode(rows.params, rows.outputs.tokens, rows.outputs.patches, text, parallel)
        loss, right = cross_entropy(hidden, head, targets_of(decoder, text), weights, model.compute.mesh, bias)
        return loss, {"accuracy": right}

    def cost(*, batch_size: int, micro_batches: int, mesh: MeshLike, slices: int) -> Cost:
        pairs, tensor = batch_size // batch_shards(mesh), mesh.shape["tensor"]
        repeated = model.compute.remat != "none"
        vocabulary = 2 * decoder.length * decoder.width * decoder.vocab_size
        # The vocabulary's logits are computed again in the backward pass; pass 1 of micro-batches has no part in it.
        forward = decoder.forward_flops(*model.architecture.memory_shape)
        flops = (3 + repeated) * forward + 4 * vocabulary
        tokens = pairs // micro_batches * decoder.length
        return Cost(
            flops=pairs * flops // tensor,
            activations=_saved(traceable(model), pairs // micro_batches),
            # In float32 and in the compute type: a chunk's logits and their gradient; the head, with its gradient.
            working=2 * decoder.vocab_size * (3 * chunk_size(tokens, decoder.vocab_size) + 5 * decoder.width) // tensor,
        )

    return Objective(prepare=prepare, local=local, cost=cost)


def adapt(settings: Settings, architecture: Architecture) -> Architecture:
    """The architecture with a decoder of the text tower's sizes, with the layers that the settings give."""
    text, form = architecture.text, "coca" if architecture.text.causal else "cappa"
    if settings["parallel"] > 0 and form == "coca":
        raise UserError(
            "config.objectives.captioning.parallel: this decoder continues from the tokens of a causal tower, which "
            "cannot be masked; use a model whose text tower is not causal, such as one of SigLIP"
        )
    decoder = CaptionDecoder(
        form=form,
        length=text.context_length - (form == "coca"),
        vocab_size=text.vocab_size,
        width=text.width,
        layers=settings["layers"] or text.layers,
        heads=text.heads,
        mlp_width=text.mlp_width,
        activation=text.activation if form == "coca" else "gelu_tanh",
        parallel=settings["parallel"] > 0,
    )
    return dataclasses.replace(architecture, decoder=decoder)


def targets_of(decoder: CaptionDecoder, text: Array) -> Array:
    """The tokens that the decoder predicts, or what there is for each: CoCa's text begins with a start token."""
    return text[:, 1:] if decoder.form == "coca" else text


def caption_mask(text: Int[Array, "batch length"], tower: TextTower) -> Bool[Array, "batch length"]:
    """True for the tokens of the captions, including the end token; False for padding.

    Padding cannot be recognized by its id: CLIP's is 0, which is also the token of "!". For towers that pool a fixed
    position, captions are padded with a repeated token, whose first occurrence counts as the end token.
    """
    positions = jnp.arange(text.shape[1])
    if tower.pooling in ("argmax", "class", "eos"):
        end = jnp.argmax(text == tower.eos_id if tower.pooling == "eos" else text, axis=1)
    else:
        differs = text != text[:, -1:]
        end = jnp.max(jnp.where(differs, positions + 1, 0), axis=1)
    return positions <= end[:, None]


@functools.lru_cache(maxsize=64)
def _saved(model: CLIP, pairs: int) -> int:
    architecture, dtype = model.architecture, model.compute.dtype
    text, decoder = architecture.text, architecture.decoder
    params = nn.meta.unbox(jax.eval_shape(model.init, jax.random.key(0)))
    tokens, width = architecture.memory_shape

    def run(params: Params, rows: int) -> tuple[Array, Array]:
        ids = jnp.zeros((rows, text.context_length), jnp.int32)
        inputs, memory = (
            params[name].astype(dtype)[None] * jnp.ones((rows, 1, 1), dtype) for name in ("tokens", "memory")
        )
        parallel = jnp.zeros(rows, bool) if decoder.parallel else None
        module = decoder.module(model.compute)
        hidden, head, bias = module.apply({"params": params["decoder"]}, inputs, memory, ids, parallel)
        targets = targets_of(decoder, ids)
        return cross_entropy(hidden, head, targets, jnp.ones(targets.shape), None, bias)

    shapes = {
        "decoder": params["decoder"],
        "tokens": jax.ShapeDtypeStruct((text.context_length, text.width), jnp.float32),
        "memory": jax.ShapeDtypeStruct((tokens, width), jnp.float32),
    }
    return saved_bytes(run, shapes, pairs)


SPEC = ObjectiveSpec(
    make=make,
    kind="vocabulary loss",
    adapt=adapt,
    defaults={
        "layers": 0,  # layers of the decoder; 0: as many as the text tower (LocCa: half)
        "parallel": 0.0,  # share of the images whose caption is predicted at once (LocCa: 0.5, CapPa: 0.75)
    },
    ranges={"layers": (0, 1000), "parallel": (0, 1)},
)
