"""Decoding and resizing give Pillow's pixels; what cannot be decoded is said, not raised through."""

import io

import numpy as np
import pytest
from PIL import Image, ImageOps

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
    crops = [images.random_resized_crop(jpeg(0), 24, np.random.default_rng(seed)).pixels for seed in (1, 1, 2)]
    assert crops[0].shape == (24, 24, 3) and crops[0].dtype == np.uint8
    assert np.array_equal(crops[0], crops[1]) and not np.array_equal(crops[0], crops[2])


def test_crops_cover_the_area_and_aspect_they_are_asked_for():
    rng = np.random.default_rng(0)
    for _ in range(200):
        left, top, right, bottom = images.crop_box(300, 200, rng, (0.3, 0.6), (3 / 4, 4 / 3))
        assert 0 <= left < right <= 300 and 0 <= top < bottom <= 200
        assert 0.28 <= (right - left) * (bottom - top) / 60_000 <= 0.62
        assert 0.72 <= (right - left) / (bottom - top) <= 1.38


@pytest.mark.parametrize(("width", "height"), [(400, 10), (10, 400)])
def test_an_extreme_aspect_falls_back_to_the_middle(width, height):
    left, top, right, bottom = images.crop_box(width, height, np.random.default_rng(0), (0.9, 1.0), (3 / 4, 4 / 3))
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


def saved(image: Image.Image, format_: str, **options) -> bytes:
    file = io.BytesIO()
    image.save(file, format_, **options)
    return file.getvalue()


RAMP = np.arange(0, 65536, 257, dtype=np.uint16).reshape(16, 16)
"""Gray levels 0, 1, ..., 255 in 16 bits."""


@pytest.mark.parametrize(
    "data",
    [
        saved(Image.fromarray(RAMP), "PNG"),
        saved(Image.fromarray(RAMP), "TIFF"),
        saved(Image.fromarray(RAMP.astype(np.int32)), "TIFF"),
        saved(Image.fromarray(RAMP), "PPM"),
        saved(Image.fromarray(RAMP.astype(np.float32) / 65535), "TIFF"),
        saved(Image.fromarray((RAMP >> 8).astype(np.float32)), "TIFF"),
        saved(Image.fromarray((RAMP >> 8).astype(np.int32)), "TIFF"),
        saved(Image.fromarray((RAMP >> 8).astype(np.uint8)), "PNG"),
    ],
)
def test_deep_gray_images_are_scaled_to_8_bits(data):
    expected = np.repeat((RAMP >> 8).astype(np.uint8)[..., None], 3, axis=2)
    np.testing.assert_array_equal(np.asarray(images.decode(data)), expected)
    np.testing.assert_array_equal(images.resize_and_crop(Image.open(io.BytesIO(data)), 16), expected)


@pytest.mark.parametrize("value", [-0.1, 256.0, np.nan, np.inf])
def test_floats_without_a_known_range_are_refused(value):
    pixels = np.full((4, 4), 0.5, np.float32)
    pixels[1, 2] = value
    with pytest.raises(images.BadImageError, match="floats outside"):
        images.decode(saved(Image.fromarray(pixels), "TIFF"))


@pytest.mark.parametrize("format_", ["GIF", "BMP", "TIFF", "WEBP", "AVIF", "JPEG2000", "ICO", "PPM"])
def test_the_usual_formats_are_read_whatever_their_name(format_):
    gray = Image.new("RGB", (32, 32), (90, 90, 90))
    assert np.abs(np.asarray(images.decode(saved(gray, format_))).astype(int) - 90).max() <= 2


@pytest.mark.parametrize("format_", ["GIF", "WEBP", "PNG"])
def test_of_an_animated_image_the_first_frame_is_read(format_):
    frames = [Image.new("RGB", (32, 32), (shade, shade, shade)) for shade in (30, 120, 220)]
    file = io.BytesIO()
    frames[0].save(file, format_, save_all=True, append_images=frames[1:], lossless=True)
    decoded = images.decode(file.getvalue())
    assert np.abs(np.asarray(decoded).astype(int) - 30).max() <= 2


def test_a_format_that_would_start_another_program_is_not_read(monkeypatch):
    data = saved(Image.new("RGB", (8, 8)), "EPS")
    monkeypatch.setattr("PIL.EpsImagePlugin.Ghostscript", lambda *_, **__: pytest.fail("Ghostscript was started"))
    with pytest.raises(images.BadImageError):
        images.decode(data)


@pytest.mark.parametrize("shape", [(1, 4_000_000), (4_000_000, 1), (3, 700_000)])
@pytest.mark.parametrize("resize", ["shortest", "squash"])
def test_a_strip_never_becomes_larger_than_the_bound(shape, resize, monkeypatch):
    made = []
    original = Image.Image.resize

    def spy(self, size, resample=None, box=None):
        rows = size[0] * ((box[3] - box[1]) if box else self.height)  # Pillow resizes rows first
        made.extend([size[0] * size[1], rows])
        return original(self, size, resample, box=box)

    monkeypatch.setattr(Image.Image, "resize", spy)
    pixels = np.zeros((*shape, 3), np.uint8)
    pixels[shape[0] // 2 :, shape[1] // 2 :] = 255
    assert images.resize_and_crop(pixels, 64, resize=resize).shape == (64, 64, 3)
    assert images.random_resized_crop(pixels, 64, np.random.default_rng(0)).pixels.shape == (64, 64, 3)
    assert max(made) <= images.MAX_PIXELS


@pytest.mark.parametrize("size", [(40, 600), (600, 40), (37, 901)])
def test_a_strip_has_the_pixels_of_the_resize_that_is_avoided(size, monkeypatch):
    rng = np.random.default_rng(0)
    image = Image.fromarray(rng.integers(0, 256, (6, 6, 3), np.uint8)).resize(size, Image.Resampling.BICUBIC)
    expected = images.resize_and_crop(image, 32)
    squashed = images.resize_and_crop(image, 32, resize="squash")
    monkeypatch.setattr(images, "MAX_PIXELS", 32 * 100)
    assert np.abs(images.resize_and_crop(image, 32).astype(int) - expected).max() <= 1
    assert np.abs(images.resize_and_crop(image, 32, resize="squash").astype(int) - squashed).max() <= 2


def stray_zeros(data: bytes) -> list[bytes]:
    """Valid JPEGs of which libjpeg says "extraneous bytes before marker"."""
    first_table = data.index(b"\xff\xdb")
    return [data[:first_table] + b"\0\0\0" + data[first_table:], data[:-2] + b"\0" * 5 + data[-2:]]


@pytest.mark.parametrize("number", [0, 1])
def test_a_jpeg_with_harmless_warnings_is_decoded_as_pillow_does(number):
    data = stray_zeros(jpeg(3, (320, 256)))[number]
    expected = np.asarray(Image.open(io.BytesIO(data)).convert("RGB"))
    np.testing.assert_array_equal(np.asarray(images.decode(data)), expected)
    assert images.random_resized_crop(data, 24, np.random.default_rng(0)).pixels.shape == (24, 24, 3)
    assert images.resize_and_crop(data, 24).shape == (24, 24, 3)


@pytest.mark.parametrize("bytes_left", [2, 0.9, 0.5])
def test_a_truncated_jpeg_stays_an_error_also_with_harmless_warnings(bytes_left):
    for data in (jpeg(3, (320, 256)), *stray_zeros(jpeg(3, (320, 256)))):
        cut = data[:-bytes_left] if bytes_left == 2 else data[: int(len(data) * bytes_left)]
        with pytest.raises(images.BadImageError):
            images.decode(cut)


@pytest.mark.parametrize("orientation", [None, 1, 2, 3, 4, 5, 6, 7, 8, 99])
@pytest.mark.parametrize("format_", ["JPEG", "PNG", "WEBP"])
def test_images_are_turned_by_their_exif_orientation_where_this_is_asked_for(orientation, format_):
    exif = Image.Exif()
    if orientation is not None:
        exif[274] = orientation
    data = saved(Image.open(io.BytesIO(jpeg(5, (48, 32)))), format_, exif=exif)
    opened = Image.open(io.BytesIO(data))
    upright = ImageOps.exif_transpose(opened).convert("RGB")
    np.testing.assert_array_equal(np.asarray(images.decode(data)), np.asarray(opened.convert("RGB")))
    np.testing.assert_array_equal(np.asarray(images.decode(data, exif=True)), np.asarray(upright))
    expected = images.resize_and_crop(upright, 16)
    for given in (data, opened):
        np.testing.assert_array_equal(images.resize_and_crop(given, 16, exif=True), expected)
    crops = [
        images.random_resized_crop(x, 32, np.random.default_rng(0), exif=True).pixels
        for x in (data, np.asarray(upright))
    ]
    np.testing.assert_array_equal(*crops)


def test_training_crops_from_jpegs_decoded_smaller_are_near_those_of_the_whole_image(shared_data):
    """docs/models.md has the number: up to 11 of 255 on average, over photographs."""
    for photo in sorted((shared_data / "photos").glob("*.jpg"))[::3]:
        data = photo.read_bytes()
        whole = np.asarray(images.decode(data))
        for size in (64, 128, 224):
            scaled, exact = (
                images.random_resized_crop(x, size, np.random.default_rng(0)).pixels for x in (data, whole)
            )
            assert np.abs(scaled.astype(int) - exact).mean() < 11
