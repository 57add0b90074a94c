"""Captions one token at a time, with kept keys and values, equal those of the whole model run again for every token."""

from dataclasses import replace

import jax
import numpy as np
import pytest

from clip_jax.models.clip import CLIP
from clip_jax.models.generate import Decoding, generate
from clip_jax.objectives import captioning
from tests.models.test_clip import SMALL, params_of

ROWS, TOKENS, VOCAB, START, END = 3, 7, 12, 10, 11
TEXT = replace(SMALL.text, vocab_size=VOCAB)
TOWERS = {
    "coca": (replace(SMALL.image, pooling="queries", queries=5, query_heads=2), replace(TEXT, pooling="class")),
    "coca_shifted_mask": (SMALL.image, replace(TEXT, pooling="class", shifted_mask=True)),
    "clip": (SMALL.image, TEXT),
    "cappa": (SMALL.image, replace(TEXT, causal=False, pooling="last")),
}


def case(name):
    image, text = TOWERS[name]
    architecture = replace(SMALL, image=image, text=text)
    model = CLIP(captioning.adapt(captioning.SPEC.defaults | {"parallel": 0.5 * (name == "cappa")}, architecture))
    rng = np.random.default_rng(0)
    params = jax.tree.map(lambda leaf: leaf + 0.2 * rng.normal(size=leaf.shape).astype(np.float32), params_of(model))
    return model, params, rng.normal(size=(ROWS, 32, 32, 3)).astype(np.float32)


def whole_model(model, params, image):
    """A function of ids [rows, written] -> log-probabilities of the next one, by both towers and the decoder."""
    coca = model.architecture.decoder.form == "coca"

    @jax.jit
    def logits(image, text):
        outputs = model.forward(params, {}, {"image": image, "text": text}, train=False)
        hidden, head, bias = model.decode(params, outputs.tokens, outputs.patches, text)
        return jax.nn.log_softmax(hidden @ head + (0 if bias is None else bias))

    def after(row, written):
        ids = np.zeros((1, model.architecture.text.context_length), np.int32)
        given = written if coca else written[1:]
        ids[0, : len(given)] = given
        return np.asarray(logits(image[row : row + 1], ids))[0, len(written) - 1]

    return after


def searched(after, row, decoding):
    """Beam search over lists of ids; one beam is greedy."""
    beams = [([START], 0.0)]
    for index in range(TOKENS):
        found = []
        for ids, score in beams:
            if END in ids[1:]:
                found.append((ids, score))
                continue
            for token, value in enumerate(after(row, ids)):
                if token != END or index >= decoding.min_tokens:
                    found.append(([*ids, token], score + value))
        beams = sorted(found, key=lambda beam: -beam[1] / (len(beam[0]) - 1) ** decoding.length_penalty)
        beams = beams[: decoding.beams if decoding.method == "beam" else 1]
    return beams[0][0]


def made(model, params, image, decoding, seed=0):
    start = START if model.architecture.decoder.form == "coca" else 0
    options = dict(start_id=start, end_id=END, vocab_size=VOCAB, key=jax.random.key(seed))
    run = jax.jit(lambda image: generate(model, params, model.patches(params, image), decoding, **options))
    return np.asarray(run(image)).tolist()


def until_end(ids):
    return ids[: ids.index(END, 1) + 1] if END in ids[1:] else ids


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "method"),
    [("coca", "greedy"), ("coca_shifted_mask", "beam"), ("cappa", "beam"), ("clip", "greedy")],
)
def test_captions_with_the_cache_are_those_without(name, method):
    model, params, image = case(name)
    decoding = Decoding(method, TOKENS, min_tokens=2, beams=3)
    after = whole_model(model, params, image)
    if model.architecture.decoder.form == "cappa":
        reference = [[0, *searched(after, row, decoding)[1:]] for row in range(ROWS)]
    else:
        reference = [searched(after, row, decoding) for row in range(ROWS)]
    found = made(model, params, image, decoding)
    assert [until_end(ids) for ids in found] == reference
    if name != "clip":  # the greedy captions of this one's random weights are alike
        assert len({tuple(ids) for ids in reference}) > 1  # the image decides
    assert all(set(ids[len(until_end(ids)) :]) <= {0} for ids in found)


@pytest.mark.slow
def test_top_p_draws_from_the_most_probable_tokens_alone():
    model, params, image = case("coca")
    image = np.repeat(image[:1], 64, axis=0)
    probabilities = np.exp(whole_model(model, params, image)(0, [START]))
    order = np.argsort(-probabilities)
    kept = set(order[: 1 + int(np.sum(np.cumsum(probabilities[order]) < 0.5))].tolist())
    drawn = {ids[1] for ids in made(model, params, image, Decoding("top_p", 1, top_p=0.5))}
    assert drawn <= kept < set(range(VOCAB)) and len(drawn) > 1
    assert {ids[1] for ids in made(model, params, image, Decoding("top_p", 1, top_p=1e-6))} == {order[0]}
