"""Captioning: a decoder predicts each token of the caption from those before it and from the image.

    loss = -mean over all tokens of log p(token t | tokens before t, image)         (Yu et al. 2022, CoCa, equation 3)

On a causal text tower the decoder continues from its tokens, as CoCa's: the tower runs once for both losses. On any
other tower, whose tokens see the whole caption, it has an embedding of its own (Wan et al. 2024, LocCa), and for a
share of the images, ``parallel``, predicts all tokens at once from the image alone (Tschannen et al. 2023, CapPa).
The decoder is not part of the trained model that is loaded.
"""

import functools
import math

import flax.linen as nn
import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int, Key

from clip_jax.data.tokenizers import Tokenizer
from clip_jax.devices.sharding import batch_shards, gather_features
from clip_jax.losses.vocabulary import chunk_size, cross_entropy
from clip_jax.models.attention import xla
from clip_jax.models.clip import CLIP, Batch, Params
from clip_jax.models.decoder import Decoder, DecoderShape
from clip_jax.models.text import TextTower
from clip_jax.models.transformer import normal, zeros
from clip_jax.objectives.cost import Cost, saved_bytes, traceable
from clip_jax.objectives.objective import MeshLike, Objective, ObjectiveSpec, Rows, Settings, Sums
from clip_jax.presets import Preprocess

NAME = "captioning"


def make(settings: Settings, model: CLIP, preprocess: Preprocess, tokenizer: Tokenizer | None) -> Objective:
    tower, share = model.architecture.text, settings["parallel"]

    def init(key: Key[Array, ""]) -> Params:
        return init_params(model, settings, key)

    def prepare(batch: Batch) -> Batch:
        seen = caption_mask(batch["text"], tower)[:, int(tower.causal) :].astype(jnp.float32)
        return {f"{NAME}/weight": seen / jnp.sum(seen)}

    def local(rows: Rows) -> tuple[Float[Array, ""], Sums]:
        text, weights, params = rows.batch["text"], rows.batch[f"{NAME}/weight"], rows.params["objectives"][NAME]
        parallel = jax.vmap(lambda key: jax.random.bernoulli(key, share))(rows.keys) if share > 0 else None
        hidden = decode(model, settings, params, rows.outputs.tokens, rows.outputs.patches, text, parallel)
        targets = text[:, int(tower.causal) :]
        mesh = model.compute.mesh
        loss, right = cross_entropy(hidden, params["projection"], targets, weights, mesh)
        return loss, {"accuracy": right}

    def cost(*, batch_size: int, micro_batches: int, mesh: MeshLike, slices: int) -> Cost:
        shape, pairs, tensor = decoder_shape(model, settings), batch_size // batch_shards(mesh), mesh.shape["tensor"]
        repeated = model.compute.remat != "none"
        vocabulary = 2 * shape.length * shape.width * tower.vocab_size
        # The vocabulary's logits are computed again in the backward pass; pass 1 of micro-batches has no part in it.
        flops = (3 + repeated) * shape.forward_flops(image_shape(model)[0]) + 4 * vocabulary
        tokens = pairs // micro_batches * shape.length
        return Cost(
            flops=pairs * flops // tensor,
            activations=_saved(traceable(model), tuple(settings.items()), pairs // micro_batches),
            # A chunk's logits, probabilities and gradient; the head's copy and its gradient.
            working=4 * tower.vocab_size * (3 * chunk_size(tokens, tower.vocab_size) + 2 * shape.width // tensor),
        )

    return Objective(init=init, prepare=prepare, local=local, cost=cost)


def decoder_shape(model: CLIP, settings: Settings) -> DecoderShape:
    """The text tower's sizes, with the layers that the settings give."""
    text = model.architecture.text
    return DecoderShape(
        length=text.context_length - int(text.causal),
        width=text.width,
        layers=settings["layers"] or text.layers,
        heads=text.heads,
        mlp_width=text.mlp_width,
        activation=text.activation,
        queries=settings["queries"],
        image_width=image_shape(model)[1],
    )


def image_shape(model: CLIP) -> tuple[int, int]:
    """(tokens, width) of what the image tower ends with."""
    return _image_shape(traceable(model))


@functools.lru_cache(maxsize=64)
def _image_shape(model: CLIP) -> tuple[int, int]:
    size = model.architecture.image.image_size
    image = jax.ShapeDtypeStruct((1, size, size, 3), jnp.float32)
    (_, tokens), _ = jax.eval_shape(model.image_tower.init_with_output, jax.random.key(0), image)
    return math.prod(tokens.shape[1:-1]), tokens.shape[-1]


def init_params(model: CLIP, settings: Settings, key: Key[Array, ""]) -> Params:
    """The decoder's parameters, boxed with their logical axes."""
    shape, tower = decoder_shape(model, settings), model.architecture.text
    module = Decoder(shape, model.compute._replace(attend=xla, mesh=None))
    inputs = jnp.zeros((1, shape.length, shape.width))
    image = jnp.zeros((1, *image_shape(model)))
    keys = jax.random.split(key, 3)
    parallel = jnp.zeros(1, bool) if settings["parallel"] > 0 else None
    params = module.init(keys[0], inputs, image, parallel)["params"]
    # CoCa's published code leaves the head uninitialized; CapPa and LocCa begin with zeros.
    head_init = normal(shape.width**-0.5) if tower.causal else zeros
    head = head_init(keys[1], (shape.width, tower.vocab_size), jnp.float32)
    params["projection"] = nn.LogicallyPartitioned(head, ("embed", "vocab"))
    if not tower.causal:
        table = normal(0.02)(keys[2], (tower.vocab_size, shape.width), jnp.float32)
        params["token_embedding"] = nn.LogicallyPartitioned(table, ("vocab", "embed"))
    return params


def decode(
    model: CLIP,
    settings: Settings,
    params: Params,
    tokens: Float[Array, "batch length width"],
    patches: Float[Array, "batch ... image_width"],
    text: Int[Array, "batch length"],
    parallel: Bool[Array, "batch"] | None,
) -> Float[Array, "batch predicted width"]:
    """The decoder's hidden states, which predict ``text`` without its first token where the text tower is causal."""
    tower, mesh = model.architecture.text, model.compute.mesh
    if tower.causal:
        inputs = tokens[:, :-1]
    else:
        looked_up = jnp.take(gather_features(params["token_embedding"], mesh), text[:, :-1], axis=0)
        inputs = jnp.pad(looked_up, ((0, 0), (1, 0), (0, 0)))  # the caption has no start token: zeros
    image = patches.reshape(len(patches), -1, patches.shape[-1])  # of a ResNet, the last feature map
    decoder = {name: tree for name, tree in params.items() if name not in ("projection", "token_embedding")}
    return Decoder(decoder_shape(model, settings), model.compute).apply({"params": decoder}, inputs, image, parallel)


def caption_mask(text: Int[Array, "batch length"], tower: TextTower) -> Bool[Array, "batch length"]:
    """The tokens of the captions, their end token included: no padding.

    Padding is not recognized by its id: CLIP's is 0, which is also the token of "!". Towers that pool a fixed position
    have captions that are filled up with one token; its first place is the end.
    """
    places = jnp.arange(text.shape[1])
    if tower.pooling in ("argmax", "eos"):
        end = jnp.argmax(text if tower.pooling == "argmax" else text == tower.eos_id, axis=1)
    else:
        differs = text != text[:, -1:]
        end = jnp.max(jnp.where(differs, places + 1, 0), axis=1)
    return places <= end[:, None]


@functools.lru_cache(maxsize=64)
def _saved(model: CLIP, settings: tuple[tuple[str, object], ...], pairs: int) -> int:
    settings, text = dict(settings), model.architecture.text
    params = nn.meta.unbox(jax.eval_shape(lambda key: init_params(model, settings, key), jax.random.key(0)))
    tokens, width = image_shape(model)

    def run(params: Params, rows: int) -> tuple[Array, Array]:
        ids = jnp.zeros((rows, text.context_length), jnp.int32)
        hidden = decode(
            model,
            settings,
            params["decoder"],
            params["tokens"].astype(model.compute.dtype)[None] * jnp.ones((rows, 1, 1), model.compute.dtype),
            params["patches"].astype(model.compute.dtype)[None] * jnp.ones((rows, 1, 1), model.compute.dtype),
            ids,
            jnp.zeros(rows, bool) if settings["parallel"] > 0 else None,
        )
        targets = ids[:, int(text.causal) :]
        return cross_entropy(hidden, params["decoder"]["projection"], targets, jnp.ones(targets.shape), None)

    shapes = {
        "decoder": params,
        "tokens": jax.ShapeDtypeStruct((text.context_length, text.width), jnp.float32),
        "patches": jax.ShapeDtypeStruct((tokens, width), jnp.float32),
    }
    return saved_bytes(run, shapes, pairs)


SPEC = ObjectiveSpec(
    make=make,
    defaults={
        "layers": 0,  # of the decoder; 0: as many as the text tower (LocCa: half)
        "queries": 255,  # that pool the image's tokens for the decoder (CoCa: 256 with the contrastive one); 0: none
        "parallel": 0.0,  # share of the images whose caption is predicted at once (LocCa: 0.5, CapPa: 0.75)
    },
    ranges={"layers": (0, 1000), "queries": (0, 100_000), "parallel": (0, 1)},
)
