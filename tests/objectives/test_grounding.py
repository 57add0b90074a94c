"""Grounded captions: texts of boxes and back, what counts in the loss, and the error of the boxes that are found."""

from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from clip_jax import presets
from clip_jax.data.sources.boxes import Box
from clip_jax.data.sources.sample import Sample
from clip_jax.data.tokenizers.tokenizer import Tokenizer
from clip_jax.devices.sharding import make_mesh
from clip_jax.errors import UserError
from clip_jax.evaluation import grounding as evaluation
from clip_jax.evaluation.embed import Variables, make_embedder
from clip_jax.models.clip import CLIP
from clip_jax.objectives import captioning, grounding
from clip_jax.objectives.objective import Rows
from tests.models.test_clip import SMALL, params_of

LENGTH = 40


class Letters:
    """A codec with an id per character."""

    def encode(self, text):
        return [ord(letter) - 30 for letter in text]

    def decode(self, ids):
        return "".join(chr(max(0, i) + 30) for i in ids)


TOKENIZER = Tokenizer(Letters(), LENGTH, 100, None, 1, 1, "letters")  # padded with the end token, like SigLIP's
TEXT = replace(SMALL.text, causal=False, pooling="last", context_length=LENGTH)
MODEL = CLIP(captioning.adapt({"layers": 1, "parallel": 0.0}, replace(SMALL, text=TEXT)))


def objective():
    return grounding.make({}, MODEL, presets.HALF, TOKENIZER)


def example(*boxes):
    image = np.full((32, 32, 3), 90, np.uint8)
    return Sample(image, ("a scene",), "key", extras={"boxes": boxes})


def filled(samples):
    view, batch = objective().views["grounding"], {}
    for name, (shape, dtype) in view.arrays.items():
        batch[name] = np.zeros((len(samples), *shape), dtype)
    for row, sample in enumerate(samples):
        view.fill(sample, np.random.default_rng(row), {name: array[row] for name, array in batch.items()})
    return batch


def test_a_box_is_four_integers_and_is_read_again():
    text = grounding.write("refer", (0.1, 0.2504, 0.5, 1.0), "a kite: red")
    assert text == "ARef: a kite: red : 50 125 250 500"
    assert grounding.read_box(text) == (0.1, 0.25, 0.5, 1.0)
    assert grounding.write("describe", (0.0, 0.0, 0.5, 1.0), "a kite") == "GCap: 0 0 250 500 : a kite"
    for wrong in ("ARef: a kite : 1 2 3", "ARef: a kite : 1 2 3 x", "ARef: a kite"):
        assert grounding.read_box(wrong) is None


def test_tokens_of_the_tasks_name_and_images_without_boxes_do_not_count():
    long = Box((0.0, 0.0, 1.0, 1.0), "a text that is far too long")
    batch = filled([example(Box((0.0, 0.0, 0.5, 1.0), "a kite")), example(), example(long)])
    assert batch["has_region"][:, 0].tolist() == [True, False, False]
    weights = np.asarray(objective().prepare({name: jnp.asarray(x) for name, x in batch.items()})["grounding/weight"])
    assert weights[1:].sum() == 0 and weights.sum() == pytest.approx(1)
    texts = (": a kite : 0 0 250 500", ": 0 0 250 500 : a kite")
    for row, name, text in zip(weights[0], grounding.TASKS.values(), texts, strict=True):
        counted = np.flatnonzero(row)
        # After "ARef: ", the rest and the end token.
        assert counted.tolist() == list(range(len(name) + 1, len(name) + len(text)))
        assert np.ptp(row[counted]) == 0


def test_the_loss_is_the_mean_over_tasks_regions_and_tokens():
    samples = [example(Box((0.0, 0.0, 0.5, 1.0), "a kite")), example(), example(Box((0.2, 0.4, 0.6, 0.8), "ox"))]
    made, batch, params = objective(), {n: jnp.asarray(x) for n, x in filled(samples).items()}, params_of(MODEL)
    head = jax.random.normal(jax.random.key(2), params["decoder"]["projection"].shape)
    params["decoder"] = params["decoder"] | {"projection": head}
    image = np.random.default_rng(0).normal(size=(3, 32, 32, 3)).astype(np.float32)
    batch |= {"image": image, "text": jnp.zeros((3, LENGTH), jnp.int32)}

    @jax.jit
    def run(params):
        outputs = MODEL.forward(params, {}, batch, train=False)
        loss, sums = made.local(Rows(params, {}, {}, {}, {}, outputs, batch | made.prepare(batch), None))
        texts = [batch["region"][:, task] for task in range(2)]
        decoded = [MODEL.decode(params, outputs.tokens, outputs.patches, text) for text in texts]
        return loss, sums, [jax.nn.log_softmax(hidden @ head + bias) for hidden, head, bias in decoded]

    loss, sums, log_p = run(params)
    losses = np.zeros((2, 2))
    for task in range(2):
        for number, row in enumerate((0, 2)):
            ids = np.asarray(batch["region"][row, task])
            tokens = range(6, int(np.argmax(ids == TOKENIZER.end_id)) + 1)
            losses[task, number] = -np.mean([log_p[task][row, t, ids[t]] for t in tokens])
    assert float(loss) == pytest.approx(losses.mean(), rel=1e-5)
    assert [float(sums[task]) for task in grounding.TASKS] == pytest.approx(losses.mean(axis=1), rel=1e-5)


def test_a_decoder_without_an_embedding_of_its_own_is_refused():
    for model in (CLIP(SMALL), CLIP(captioning.adapt({"layers": 1, "parallel": 0.0}, SMALL))):
        with pytest.raises(UserError, match="needs a decoder"):
            grounding.make({}, model, presets.HALF, TOKENIZER)


def test_overlap_and_boxes_in_the_center_by_hand():
    one = np.asarray([[0.0, 0.0, 0.5, 0.5], [0.0, 0.0, 0.1, 0.1], [0.0, 0.0, 1.0, 1.0]])
    other = np.asarray([[0.25, 0.0, 0.75, 0.5], [0.5, 0.5, 1.0, 1.0], [0.0, 0.0, 1.0, 1.0]])
    np.testing.assert_allclose(evaluation.iou(one, other), [1 / 3, 0, 1], rtol=1e-6)
    assert evaluation._in_center((0.25, 0.0, 0.5, 1.0), 2, 1) == (0.0, 0.0, 0.5, 1.0)
    assert evaluation._in_center((0.25, 0.0, 0.5, 1.0), 1, 1) == (0.25, 0.0, 0.5, 1.0)


class Source(list):
    name = "list:"


@pytest.mark.parametrize("devices", [1, 8])
def test_the_error_is_of_the_boxes_that_the_decoder_writes(devices):
    """A decoder whose head has a bias for one box, whatever the prompt: what it writes is known."""
    mesh = make_mesh(devices, devices=jax.devices()[:devices])
    model = replace(MODEL, compute=MODEL.compute._replace(mesh=mesh))
    embedder = make_embedder(model, presets.HALF, TOKENIZER, mesh, 4, 1)
    truth = [(0.0, 0.0, 0.5, 0.5), (0.5, 0.5, 1.0, 1.0), (0.2, 0.2, 0.4, 0.4)]
    source = Source([example(*(Box(sides, "ox") for sides in truth[:2])), example(), example(Box(truth[2], "a kite"))])
    params = params_of(MODEL)
    found = evaluation.boxes(embedder, Variables(params, {}), source)
    # The head begins with zeros: it writes the first id for ever, which is no box, and counts as the whole image.
    assert found["readable"] == 0 and found["boxes"] == 3
    assert found["box_error"] == pytest.approx(np.mean([np.abs(np.subtract((0, 0, 1, 1), box)) for box in truth]))
    assert found["iou"] == pytest.approx(np.mean([0.25, 0.25, 0.04]))


def test_a_completion_keeps_what_is_given_and_continues_as_the_decoder_predicts():
    """Token by token with a cache, against the decoder over the whole text."""
    from clip_jax.models.generate import complete

    params = params_of(MODEL)
    params["decoder"] = params["decoder"] | {"projection": jax.random.normal(jax.random.key(2), (48, 100))}
    rng, count = np.random.default_rng(0), jnp.asarray([3, 7, 1])
    given = jnp.asarray(rng.integers(2, 100, (3, LENGTH)), jnp.int32)
    image = rng.normal(size=(3, 32, 32, 3)).astype(np.float32)

    @jax.jit
    def run(params):
        batch = {"image": image, "text": given}
        outputs = MODEL.forward(params, {}, batch, train=False)
        ids = complete(MODEL, params, outputs.patches, given, count, 100)
        hidden, head, bias = MODEL.decode(params, outputs.tokens, outputs.patches, ids)
        return ids, jnp.argmax(hidden @ head + bias, axis=-1)

    ids, predicted = run(params)
    for row, number in enumerate(count.tolist()):
        assert ids[row, :number].tolist() == given[row, :number].tolist()
        assert ids[row, number:].tolist() == predicted[row, number:].tolist()
