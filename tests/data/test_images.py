"""Decoding and resizing give Pillow's pixels; what cannot be decoded is said, not raised through."""

import io

import numpy as np
import pytest
from PIL import Image

from clip_jax.data import images
from tests.data.shards import jpeg


def test_jpegs_decode_to_the_bits_of_pillow(shared_data):
    for file in sorted((shared_data / "photos").glob("*.jpg")):
        data = file.read_bytes()
        assert np.array_equal(np.asarray(images.decode(data)), np.asarray(Image.open(io.BytesIO(data)).convert("RGB")))


@pytest.mark.parametrize(
    ("mode", "format_"), [("RGBA", "PNG"), ("P", "PNG"), ("L", "JPEG"), ("CMYK", "JPEG"), ("1", "PNG")]
)
def test_every_mode_becomes_rgb(mode, format_):
    file = io.BytesIO()
    Image.new("RGB", (20, 10), (200, 30, 30)).convert(mode).save(file, format_)
    assert np.asarray(images.decode(file.getvalue())).shape == (10, 20, 3)


def test_a_crop_has_the_wanted_size_and_depends_on_the_generator_alone():
    crops = [images.random_resized_crop(jpeg(0), 24, np.random.default_rng(seed)) for seed in (1, 1, 2)]
    assert crops[0].shape == (24, 24, 3) and crops[0].dtype == np.uint8
    assert np.array_equal(crops[0], crops[1]) and not np.array_equal(crops[0], crops[2])


def test_crops_cover_the_area_and_aspect_they_are_asked_for():
    rng = np.random.default_rng(0)
    for _ in range(200):
        left, top, right, bottom = images._crop_box(300, 200, rng, (0.3, 0.6), (3 / 4, 4 / 3))
        assert 0 <= left < right <= 300 and 0 <= top < bottom <= 200
        assert 0.28 <= (right - left) * (bottom - top) / 60_000 <= 0.62
        assert 0.72 <= (right - left) / (bottom - top) <= 1.38


@pytest.mark.parametrize(("width", "height"), [(400, 10), (10, 400)])
def test_an_extreme_aspect_falls_back_to_the_middle(width, height):
    left, top, right, bottom = images._crop_box(width, height, np.random.default_rng(0), (0.9, 1.0), (3 / 4, 4 / 3))
    assert (
        min(right - left, bottom - top) == 10 and abs((left + right) - width) <= 1 and abs((top + bottom) - height) <= 1
    )


@pytest.mark.parametrize("size", [(100, 60), (60, 100), (64, 64), (65, 400)])
def test_shortest_scales_the_shorter_side_and_crops_the_centre(size):
    image = Image.new("RGB", size)
    assert images.resize_and_crop(image, 32).shape == (32, 32, 3)
    ramp = np.zeros((size[1], size[0], 3), np.uint8)
    ramp[:, : size[0] // 2] = 255  # left half white: the crop of the center is half white too
    assert abs(images.resize_and_crop(ramp, 32).mean() - 127.5) < 8


def test_squash_keeps_all_of_the_image():
    image = np.zeros((10, 100, 3), np.uint8)
    image[:, :25] = 255
    assert abs(images.resize_and_crop(image, 32, resize="squash").mean() / 255 - 0.25) < 0.01


@pytest.mark.parametrize(
    "data", [b"", b"<html></html>", jpeg(0)[:100], b"\xff\xd8\xff" + b"\0" * 50, b"\x89PNG\r\n\x1a\n"]
)
def test_what_is_no_image_is_a_bad_image(data):
    with pytest.raises(images.BadImageError):
        images.decode(data)


def test_a_decompression_bomb_is_refused_from_its_header(monkeypatch):
    monkeypatch.setattr(images, "MAX_PIXELS", 1000)
    with pytest.raises(images.BadImageError, match="larger than"):
        images.decode(jpeg(0))


def test_training_crops_from_jpegs_decoded_smaller_are_near_those_of_the_whole_image(shared_data):
    """docs/models.md has the number: up to 11 of 255 on average, over photographs."""
    for photo in sorted((shared_data / "photos").glob("*.jpg"))[::3]:
        data = photo.read_bytes()
        whole = np.asarray(images.decode(data))
        for size in (64, 128, 224):
            scaled, exact = (images.random_resized_crop(x, size, np.random.default_rng(0)) for x in (data, whole))
            assert np.abs(scaled.astype(int) - exact).mean() < 11
