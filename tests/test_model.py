"""``load`` gives a model that embeds, compares and classifies, whatever form images and texts come in."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from PIL import Image

import clip_jax
from clip_jax.errors import UserError
from tests.data.shards import jpeg


@pytest.fixture(scope="module")
def model(small_run):
    return clip_jax.load(small_run)


@pytest.fixture
def photo(tmp_path):
    path = tmp_path / "a photo.jpg"
    path.write_bytes(jpeg(3, (50, 40)))
    return path


def test_paths_images_and_arrays_embed_the_same(model, photo):
    image = Image.open(photo)
    forms = [str(photo), photo, image, np.asarray(image), [photo], [str(photo), image]]
    embeddings = [model.encode_image(form) for form in forms]
    assert [e.shape for e in embeddings] == [(1, 24)] * 5 + [(2, 24)]
    for embedding in embeddings:
        np.testing.assert_allclose(embedding[0], embeddings[0][0], atol=1e-6)
        assert embedding.dtype == np.float32


def test_preprocess_and_tokenize_are_the_first_half_of_encoding(model, photo):
    pixels = model.preprocess(photo)
    assert pixels.shape == (1, 32, 32, 3) and -1 <= pixels.min() < pixels.max() <= 1
    np.testing.assert_allclose(model.encode_pixels(pixels), model.encode_image(photo), atol=1e-6)
    tokens = model.tokenize(["a picture", "another"])
    assert tokens.shape == (2, 32) and tokens.dtype == np.int32
    np.testing.assert_allclose(model.encode_tokens(tokens), model.encode_text(["a picture", "another"]), atol=1e-6)


def test_embeddings_have_unit_length_unless_asked(model, photo):
    for encode, what in ((model.encode_image, photo), (model.encode_text, "a picture")):
        raw, unit = encode(what, normalize=False), encode(what)
        assert np.linalg.norm(unit) == pytest.approx(1, abs=1e-6) and np.linalg.norm(raw) != pytest.approx(1, abs=1e-3)
        np.testing.assert_allclose(raw / np.linalg.norm(raw), unit, atol=1e-6)


def test_many_are_encoded_as_each_alone(model):
    texts = [f"picture number {i}" for i in range(70)]
    together = model.encode_text(texts)
    np.testing.assert_allclose(together[69], model.encode_text(texts[69])[0], atol=1e-5)
    images = [np.full((8, 8, 3), i, np.uint8) for i in range(66)]
    np.testing.assert_allclose(model.encode_image(images)[65], model.encode_image(images[65])[0], atol=1e-5)


def test_another_number_of_inputs_compiles_nothing_new(model, photo):
    texts = [f"picture number {i}" for i in range(64)]
    for count in (1, 2, 4, 8, 16, 32, 64):
        model.encode_text(texts[:count])
    compiled = model._encode_tokens._cache_size()
    for count in (3, 5, 7, 11, 29, 63):
        model.encode_text(texts[:count])
    assert model._encode_tokens._cache_size() == compiled
    model.encode_image([photo] * 3, batch_size=4)
    compiled = model._encode_pixels._cache_size()
    assert model.encode_image([photo] * 7, batch_size=4, workers=1).shape == (7, 24)
    assert model._encode_pixels._cache_size() == compiled


@pytest.mark.parametrize("encode", ["encode_image", "encode_text"])
def test_nothing_to_encode_is_a_mistake(model, encode):
    with pytest.raises(UserError, match="give at least one"):
        getattr(model, encode)([])


def test_similarity_is_the_cosine_of_anything(model, photo):
    image, text = model.encode_image(photo, normalize=False), model.encode_text(["one", "two"])
    assert model.similarity(image, text).shape == (1, 2)
    np.testing.assert_allclose(np.diagonal(model.similarity(text, text)), 1, atol=1e-6)
    expected = (image @ text.T) / np.linalg.norm(image)
    np.testing.assert_allclose(model.similarity(image, text), expected, atol=1e-6)


def test_classify_is_a_softmax_over_scaled_cosines(model, photo):
    labels = ["picture number 3", "picture number 4", "something else"]
    probabilities = model.classify([photo, photo], labels)
    assert probabilities.shape == (2, 3)
    np.testing.assert_allclose(probabilities.sum(axis=1), 1, rtol=1e-5)
    cosines = np.asarray(model.similarity(model.encode_image(photo), model.encode_text(labels)))
    np.testing.assert_allclose(probabilities[:1], jax.nn.softmax(model.scale * cosines), atol=1e-5)


def test_siglip_classifies_with_the_prompts_of_its_published_protocol(model, photo):
    """big_vision's evaluator canonicalizes class names and templates; OpenCLIP does the same in its tokenizer."""
    siglip = dataclasses.replace(model, preset=model.preset._replace(tokenizer="siglip2"))
    spelled, plain = ["St. Bernard_dog", "A Cat!"], ["st bernard dog", "a cat"]
    found = siglip.classify(photo, spelled, ["A photo of: {}."])
    np.testing.assert_allclose(found, model.classify(photo, plain, ["a photo of {}"]), atol=1e-6)
    assert np.abs(found - model.classify(photo, spelled, ["A photo of: {}."])).max() > 1e-6
    same, empty = "'C' and 'c[+][+]': .* both are 'c'", "'[?]': .* nothing is left"
    for labels, reason in ((["C", "c++"], same), (["a", "?"], empty)):
        model.classify(photo, labels)
        with pytest.raises(UserError, match=reason):
            siglip.classify(photo, labels)


def test_pixels_have_gradients(model, photo):
    text = model.encode_text("a picture")

    def similarity(pixels):
        return jnp.sum(model.encode_pixels(pixels) @ text.T)

    gradient = jax.grad(similarity)(jnp.asarray(model.preprocess(photo)))
    assert gradient.shape == (1, 32, 32, 3) and float(jnp.abs(gradient).max()) > 0


def test_the_loaded_model_is_the_trained_one(small_run, model):
    """Recall of the held-out pairs, computed here, equals the run's last evaluation."""
    from clip_jax.data.sources import open_source
    from clip_jax.losses import reference
    from tests.training.runs import metrics

    held_out = open_source(f"tar:{small_run.parent}/held_out", image_size=32)
    images = model.encode_image([s.image if isinstance(s.image, np.ndarray) else _decoded(s.image) for s in held_out])
    texts = model.encode_text([s.captions[0] for s in held_out])
    last = metrics(small_run)[-1]
    loss, _ = reference.softmax(images, texts, model.scale)
    assert float(loss) == pytest.approx(last["eval/held_out/loss"], rel=1e-4)
    assert model.step == 12


def _decoded(data):
    from clip_jax.data.images import decode

    return np.asarray(decode(data))


def test_mistakes_are_one_line(model, tmp_path):
    (tmp_path / "broken.jpg").write_bytes(b"no image")
    with pytest.raises(UserError, match=r"broken.jpg: undecodable image"):
        model.encode_image(tmp_path / "broken.jpg")
    with pytest.raises(UserError, match=r"nowhere.jpg: cannot be read"):
        model.encode_image("nowhere.jpg")
    with pytest.raises(UserError, match="labels: none; give at least one"):
        model.classify("x.jpg", [])
    with pytest.raises(UserError, match="no such folder"):
        clip_jax.load("nowhere")
    with pytest.raises(UserError, match="neither a run folder nor one of weights"):
        clip_jax.load(tmp_path)


def test_a_step_may_be_part_of_the_name(small_run, model):
    assert clip_jax.load(f"{small_run}@{model.step}").step == model.step
    with pytest.raises(UserError, match=rf"{small_run}: no checkpoint of step 7; it keeps .*{model.step}"):
        clip_jax.load(f"{small_run}@7")


def test_a_run_without_a_checkpoint_says_so(small_run, tmp_path):
    (tmp_path / "run.json").write_text((small_run / "run.json").read_text())
    with pytest.raises(UserError, match="no checkpoint yet"):
        clip_jax.load(tmp_path)


def test_the_public_names_are_listed_before_they_are_imported():
    """Completion in a notebook asks dir(); nothing is imported for it."""
    assert {"load", "list_models", "__version__"} <= set(dir(clip_jax))


def test_models_are_listed_by_their_usual_names():
    assert {"ViT-B/32", "ViT-B/32-quickgelu", "ViT-B/16", "ViT-L/14"} <= set(clip_jax.list_models())
