"""Captions from a decoder, one token at a time: greedy, by top-p sampling, or by beam search.

Keys and values of earlier tokens are kept (``Compute.cache``), so that a step costs one token. Every array has a static
length: one program serves all images, and stops when all captions have ended.
"""

from dataclasses import replace
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int, Key

from clip_jax.models.attention import xla
from clip_jax.models.clip import CLIP, Params
from clip_jax.models.text import class_mask


class Decoding(NamedTuple):
    """How tokens are chosen."""

    method: Literal["greedy", "top_p", "beam"] = "beam"
    max_tokens: int = 30
    """Tokens of a caption at most, with its end token."""
    min_tokens: int = 0
    """The end token is not chosen before this number of others."""
    beams: int = 6
    length_penalty: float = 1.0
    """beam: captions are compared by their log-probability / tokens^length_penalty."""
    top_p: float = 0.9
    """top_p: the most probable tokens that have this probability together are drawn from (Holtzman et al. 2020)."""
    temperature: float = 1.0


class Written(NamedTuple):
    position: Int[Array, ""]
    """Tokens so far."""
    written: Int[Array, "rows tokens+1"]
    """The token before the first, then those of the caption."""
    done: Bool[Array, "rows"]
    score: Float[Array, "rows"]
    """The log-probability of each beam."""
    length: Int[Array, "rows"]
    cache: Any


def generate(
    model: CLIP,
    params: Params,
    patches: Float[Array, "batch *tokens width"],
    decoding: Decoding,
    *,
    start_id: int,
    end_id: int,
    vocab_size: int,
    key: Key[Array, ""],
) -> Int[Array, "batch tokens+1"]:
    """The ids of a caption for each image, ``Outputs.patches``; the first is the token before the caption.

    Ids from ``vocab_size`` on are not chosen: the tokenizer does not have them. What follows the end token is 0.
    """
    beams = decoding.beams if decoding.method == "beam" else 1
    memory = jnp.repeat(model.memory(params["image"], patches), beams, axis=0)
    rows, tokens = len(memory), decoding.max_tokens
    caching = replace(model, compute=model.compute._replace(cache=tokens, attend=xla, remat="none"))

    def advance(state: Written) -> Written:
        logits, cache = next_logits(caching, params, memory, state.written, state.position, state.cache)
        logits = jnp.where(jnp.arange(logits.shape[1]) < vocab_size, logits, -jnp.inf)
        too_early = state.position < decoding.min_tokens
        logits = logits.at[:, end_id].set(jnp.where(too_early, -jnp.inf, logits[:, end_id]))
        state = state._replace(cache=cache)
        if decoding.method == "beam":
            state, chosen = _beam(state, logits, decoding)
        else:
            chosen = _one(logits, decoding, jax.random.fold_in(key, state.position))
        chosen = jnp.where(state.done, 0, chosen)
        position = state.position + 1
        return state._replace(
            position=position,
            written=jax.lax.dynamic_update_slice_in_dim(state.written, chosen[:, None], position, axis=1),
            done=state.done | (chosen == end_id),
        )

    first = Written(
        position=jnp.zeros((), jnp.int32),
        written=jnp.zeros((rows, tokens + 1), jnp.int32).at[:, 0].set(start_id),
        done=jnp.zeros(rows, bool),
        # One beam at the start: equal ones would stay equal.
        score=jnp.where(jnp.arange(rows) % beams == 0, 0.0, -jnp.inf),
        length=jnp.zeros(rows, jnp.int32),
        cache=None,
    )
    last = jax.lax.while_loop(lambda state: (state.position < tokens) & ~jnp.all(state.done), advance, advance(first))
    return last.written[::beams]  # beams are sorted


def complete(
    model: CLIP,
    params: Params,
    patches: Float[Array, "batch *tokens width"],
    given: Int[Array, "batch length"],
    count: Int[Array, "batch"],
    vocab_size: int,
) -> Int[Array, "batch length"]:
    """The ids of a text for each image that begins with the first ``count`` ids of ``given``, the others greedily.

    What follows the end of a text means nothing. For decoders that read the caption themselves.
    """
    rows, length = given.shape
    memory = model.memory(params["image"], patches)
    caching = replace(model, compute=model.compute._replace(cache=length, attend=xla, remat="none"))

    def advance(position: Int[Array, ""], state: tuple[Array, Any]) -> tuple[Array, Any]:
        written, cache = state
        logits, cache = next_logits(caching, params, memory, written, position, cache)
        best = jnp.argmax(jnp.where(jnp.arange(logits.shape[1]) < vocab_size, logits, -jnp.inf), axis=1)
        chosen = jnp.where(position < count, jnp.take(given, position, axis=1), best.astype(jnp.int32))
        return jax.lax.dynamic_update_slice_in_dim(written, chosen[:, None], position + 1, axis=1), cache

    state = advance(jnp.zeros((), jnp.int32), (jnp.zeros((rows, length + 1), jnp.int32), None))
    return jax.lax.fori_loop(1, length, advance, state)[0][:, 1:]


def next_logits(
    model: CLIP,
    params: Params,
    memory: Float[Array, "rows keys width"],
    written: Int[Array, "rows tokens+1"],
    position: Int[Array, ""],
    cache: Any,
) -> tuple[Float[Array, "rows vocab"], Any]:
    """The logits of the token after ``written[:, position]``, and the cache with this one; None is an empty cache."""
    text, decoder = model.architecture.text, model.architecture.decoder
    cache = cache or {"text": {}, "decoder": {}}
    token, tokens = jax.lax.dynamic_slice_in_dim(written, position, 1, axis=1), None
    if decoder.form == "coca":
        seen = None
        if text.pooling == "class":
            seen = class_mask(written, text.shifted_mask)[:, None, : model.compute.cache]
        (_, tokens), found = model.text_tower.apply(
            {"params": params["text"], **cache["text"]}, token, position, seen, mutable=["cache"]
        )
        cache = cache | {"text": found}
    (hidden, head, bias), found = decoder.module(model.compute).apply(
        {"params": params["decoder"], **cache["decoder"]}, tokens, memory, token, None, position, mutable=["cache"]
    )
    logits = jnp.dot(hidden[:, 0], head.astype(hidden.dtype), preferred_element_type=jnp.float32)
    return logits if bias is None else logits + bias, cache | {"decoder": found}


def _one(logits: Float[Array, "rows vocab"], decoding: Decoding, key: Key[Array, ""]) -> Int[Array, "rows"]:
    if decoding.method == "greedy":
        return jnp.argmax(logits, axis=1).astype(jnp.int32)
    logits = logits / decoding.temperature
    order = jnp.argsort(-logits, axis=1)
    sorted_logits = jnp.take_along_axis(logits, order, axis=1)
    probabilities = jax.nn.softmax(sorted_logits, axis=1)
    before = jnp.cumsum(probabilities, axis=1) - probabilities
    drawn = jax.random.categorical(key, jnp.where(before < decoding.top_p, sorted_logits, -jnp.inf), axis=1)
    return jnp.take_along_axis(order, drawn[:, None], axis=1)[:, 0].astype(jnp.int32)


def _beam(state: Written, logits: Float[Array, "rows vocab"], decoding: Decoding) -> tuple[Written, Int[Array, "rows"]]:
    """The best continuations of an image's beams, best first, and the token of each; a finished one continues as is."""
    beams, vocabulary = decoding.beams, logits.shape[1]
    unchanged = jnp.where(jnp.arange(vocabulary) == 0, 0.0, -jnp.inf)
    change = jnp.where(state.done[:, None], unchanged, jax.nn.log_softmax(logits, axis=1))
    scores, length = state.score[:, None] + change, state.length + ~state.done
    ranked = (scores / length[:, None] ** decoding.length_penalty).reshape(-1, beams * vocabulary)
    best = jax.lax.top_k(ranked, beams)[1]
    rows = (best // vocabulary + beams * jnp.arange(len(best))[:, None]).reshape(-1)
    chosen = (best % vocabulary).reshape(-1).astype(jnp.int32)

    def reorder(path: Any, leaf: Array) -> Array:
        # The memory is the image's, whatever the beam; ``position`` counts tokens.
        return leaf[:, rows] if path[-1].key in ("key", "value") else leaf

    return state._replace(
        written=state.written[rows],
        done=state.done[rows],
        score=scores[rows, chosen],
        length=length[rows],
        cache=jax.tree_util.tree_map_with_path(reorder, state.cache),
    ), chosen
