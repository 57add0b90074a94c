"""The methods of a model take what can be meant, and name what cannot, before anything is computed."""

import io
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from PIL import Image

import clip_jax
from clip_jax import inputs
from clip_jax.errors import UserError
from clip_jax.models.text import TextTower
from tests.data.shards import jpeg


@pytest.fixture(scope="module")
def model(small_run):
    return clip_jax.load(small_run)


def test_bytes_and_open_files_are_images(model, tmp_path, monkeypatch):
    data = jpeg(3, (50, 40))
    (tmp_path / "photo.jpg").write_bytes(data)
    monkeypatch.setenv("HOME", str(tmp_path))
    expected = model.encode_image(tmp_path / "photo.jpg")
    for form in (data, bytearray(data), io.BytesIO(data), "~/photo.jpg", (form for form in [data])):
        np.testing.assert_array_equal(model.encode_image(form), expected)
    with open(tmp_path / "photo.jpg", "rb") as file:
        np.testing.assert_array_equal(model.encode_image([file]), expected)


def test_arrays_of_one_or_four_channels_are_images(model):
    grey = np.random.default_rng(0).integers(0, 256, (40, 50)).astype(np.uint8)
    color = np.repeat(grey[..., None], 3, axis=-1)
    alpha = np.concatenate([color, grey[..., None]], axis=-1)
    expected = model.encode_image(color)
    for form in (grey, grey[..., None], alpha, jnp.asarray(color), np.stack([color]), color[:, ::-1][:, ::-1]):
        np.testing.assert_array_equal(model.encode_image(form), expected)


SMALL = np.zeros((8, 8, 3), np.uint8)


@pytest.mark.parametrize(
    ("images", "message"),
    [
        ([], "images: none; give at least one"),
        (np.zeros((0, 8, 8, 3), np.uint8), "images: none"),
        (None, "images: None is not an image"),
        (3, "images: 3 is not an image"),
        ({"a.jpg": 1}, "is not an image"),
        ([SMALL, None], "images: None is not an image"),
        (np.zeros(5, np.uint8), "uint8[5] is not an image"),
        (np.zeros((0, 8, 3), np.uint8), "uint8[0, 8, 3] has no pixels"),
        (np.zeros((8, 8, 2), np.uint8), "uint8[8, 8, 2] is not uint8[height, width, 3]"),
        (np.zeros((3, 8, 8), np.uint8), "uint8[3, 8, 8] is not"),
        (np.zeros((8, 8, 3), np.float32), "float32[8, 8, 3] is not uint8[height, width, 3]; normalized pixels go"),
        (b"", "image: empty image file"),
        (b"no image", "image: undecodable image"),
        (io.StringIO("text"), "opened as text"),
        ("nul\0.jpg", "cannot be read"),
        ("https://host/photo.jpg", "cannot be read (No such file or directory); download it first"),
    ],
)
def test_what_is_no_image_is_one_line(model, images, message):
    for method in (model.preprocess, model.encode_image):
        with pytest.raises(UserError, match=re.escape(message)) as caught:
            method(images)
        assert "\n" not in str(caught.value)


def test_a_pillow_image_that_cannot_be_decoded_is_one_line(model, tmp_path):
    (tmp_path / "cut.jpg").write_bytes(jpeg(3, (200, 200))[:2000])
    with pytest.raises(UserError, match=r"cut.jpg: undecodable"):
        model.encode_image(Image.open(tmp_path / "cut.jpg"))


@pytest.mark.parametrize(
    ("texts", "message"),
    [
        (None, "texts: None is not a text"),
        ([], "texts: none; give at least one"),
        (["a", None], "texts[1]: None is not a str"),
        (["a", b"b"], "texts[1]: b'b' is not a str"),
        (b"a", "texts: b'a' is not a text"),
        ([["a"]], "texts[0]: ['a'] is not a str"),
        (5, "texts: 5 is not a text"),
    ],
)
def test_what_is_no_text_is_one_line(model, texts, message):
    for method in (model.tokenize, model.encode_text):
        with pytest.raises(UserError, match=re.escape(message)):
            method(texts)


def test_numpys_texts_are_texts(model):
    np.testing.assert_array_equal(model.tokenize(np.array(["a", "bc"])), model.tokenize(["a", "bc"]))


PIXELS = np.zeros((2, 32, 32, 3), np.float32)


@pytest.mark.parametrize(
    ("pixels", "message"),
    [
        (PIXELS.transpose(0, 3, 1, 2), "float32[2, 3, 32, 32] is not float[n, 32, 32, 3]"),
        (PIXELS.transpose(0, 3, 1, 2), "transpose(0, 2, 3, 1)"),
        (PIXELS[0], "float32[32, 32, 3] is not"),
        (PIXELS[:0], "float32[0, 32, 32, 3] is not"),
        (PIXELS[:, :16, :16], "float32[2, 16, 16, 3] is not"),
        (PIXELS[..., :1], "float32[2, 32, 32, 1] is not"),
        (PIXELS.astype(np.uint8), "uint8 images go to encode_image"),
        (jnp.asarray(PIXELS.astype(np.uint8)), "uint8 images go to encode_image"),
        (PIXELS + 255, "from 255 to 255; normalized ones are between -1 and 1"),
        (PIXELS * np.nan, "from nan to nan"),
        ("photo.jpg", "'photo.jpg' is not float"),
    ],
)
def test_pixels_of_another_shape_type_or_range_are_one_line(model, pixels, message):
    with pytest.raises(UserError, match=re.escape(message)):
        model.encode_pixels(pixels)


def test_pixels_and_tokens_may_be_traced_and_of_half_precision(model):
    assert jax.jit(model.encode_pixels)(PIXELS).shape == (2, 24)
    assert model.encode_pixels(jnp.asarray(PIXELS, jnp.bfloat16)).shape == (2, 24)
    tokens = model.tokenize(["a", "b"])
    np.testing.assert_allclose(jax.jit(model.encode_tokens)(tokens), model.encode_tokens(tokens), atol=1e-6)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda tokens: tokens[0], "is not int[n, at most 32]"),
        (lambda tokens: tokens[:0], "is not int[n, at most 32]"),
        (lambda tokens: np.concatenate([tokens, tokens], axis=1), "int32[2, 64] is not int[n, at most 32]"),
        (lambda tokens: tokens.astype(np.float32), "float32[2, 32] is not"),
        (lambda tokens: tokens + 49408, "is not an id of this model's text tower"),
        (lambda tokens: jnp.asarray(tokens) - 5, "-5 is not an id"),
        (lambda tokens: ["a text"], "['a text'] is not int"),
    ],
)
def test_tokens_of_another_shape_type_or_range_are_one_line(model, change, message):
    with pytest.raises(UserError, match=re.escape(message)):
        model.encode_tokens(change(model.tokenize(["a", "b"])))


def test_a_tower_that_pools_one_position_needs_that_position():
    last = TextTower(8, 100, 32, 1, 1, 64, pooling="last", causal=False)
    with pytest.raises(UserError, match=r"int64\[1, 7\] is not int\[n, 8\]"):
        inputs.tokens(np.zeros((1, 7), int), last)
    inputs.tokens(np.zeros((1, 8), int), last)
    eos = TextTower(8, 100, 32, 1, 1, 64, pooling="eos", eos_id=5)
    with pytest.raises(UserError, match="a row without the end token 5"):
        inputs.tokens(np.array([[1, 5], [1, 2]]), eos)
    inputs.tokens(np.array([[1, 5], [5, 2]]), eos)


def test_similarity_is_of_embeddings_of_one_width(model):
    one, many = np.ones(24, np.float32), np.ones((3, 24), np.float32)
    assert model.similarity(one, many).shape == (1, 3)
    for other in (np.ones((3, 1)), np.ones((3, 23)), np.ones((2, 3, 24))):
        with pytest.raises(UserError, match="have no cosines"):
            model.similarity(many, other)
