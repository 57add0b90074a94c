"""Crops of ``data.resize="simd"`` are Pillow's up to rounding, do not alias, and decode no more than they need."""

import importlib.util
import io
import sys

import numpy as np
import pytest
from PIL import Image, ImageOps

from clip_jax import config as configs
from clip_jax.data import fast_crops, images
from clip_jax.data.faults import Faults
from clip_jax.data.order import Order
from clip_jax.data.sources import open_source
from clip_jax.data.stream import TrainingBatches
from clip_jax.data.views import pair_views
from clip_jax.errors import UserError
from tests.data.shards import jpeg, write_shards
from tests.data.test_images import saved, stray_zeros
from tests.data.test_stream import Lengths

needs_library = pytest.mark.skipif(
    importlib.util.find_spec("cykooz_resizer") is None, reason="cykooz-resizer is not installed"
)


def both(pillow, simd, size: int, seed: int = 0, **options) -> tuple[np.ndarray, np.ndarray]:
    """int64[size, size, 3] of both settings, from the same draws."""
    return tuple(
        crop(data, size, np.random.default_rng(seed), **options).pixels.astype(int)
        for crop, data in ((images.random_resized_crop, pillow), (fast_crops.random_resized_crop, simd))
    )


def photos(shared_data) -> list[bytes]:
    return [path.read_bytes() for path in sorted((shared_data / "photos").glob("*.jpg"))]


@needs_library
@pytest.mark.parametrize("interpolation", ["bicubic", "bilinear"])
@pytest.mark.parametrize("scale", [(0.9, 1.0), (0.08, 0.3)])
def test_crops_are_those_of_pillow_up_to_rounding(shared_data, interpolation, scale):
    """The difference over photographs, reduced and enlarged; docs/data.md has the number."""
    for number, photo in enumerate(photos(shared_data)):
        whole = np.asarray(images.decode(photo))
        for size in (64, 224):
            pillow, simd = both(whole, whole, size, seed=number, scale=scale, interpolation=interpolation)
            difference = np.abs(pillow - simd)
            assert difference.mean(axis=(0, 1)).max() < 0.3
            # Bicubic values beyond 0 and 255 are cut off between the passes, whose order is another one than Pillow's.
            assert difference.max() <= (20 if interpolation == "bicubic" else 1)
            assert (difference <= 1).mean() > 0.95


@needs_library
@pytest.mark.parametrize("size", [37, 64, 100, 200])
def test_a_fine_checkerboard_becomes_gray(size):
    """A filter of fixed width would show moiré from black to white here."""
    board = np.indices((512, 512)).sum(axis=0) % 2 * np.uint8(255)
    board = np.repeat(board[..., None].astype(np.uint8), 3, axis=2)
    for seed in range(3):
        crop = fast_crops.random_resized_crop(board, size, np.random.default_rng(seed), scale=(0.5, 1.0)).pixels
        inner = crop[2:-2, 2:-2].astype(int)  # at the edges half of the filter is cut off
        assert np.abs(inner - 127.5).max() < 12
        assert abs(inner.mean() - 127.5) < 1


@needs_library
def test_a_jpeg_is_decoded_at_the_smallest_fraction_that_its_crop_allows(monkeypatch):
    decoded, original = [], images.decode_jpeg

    def spy(data, **scaling):
        decoded.append(original(data, **scaling))
        return decoded[-1]

    monkeypatch.setattr(images, "decode_jpeg", spy)
    data = jpeg(0, (1003, 1501))
    for size, shape in ((400, (1501, 1003)), (200, (751, 502)), (128, (376, 251)), (64, (188, 126)), (32, (188, 126))):
        crop = fast_crops.random_resized_crop(data, size, np.random.default_rng(0), ratio=(1.0, 1.0)).pixels
        assert crop.shape == (size, size, 3)
        assert decoded.pop().shape[:2] == shape
    small = fast_crops.random_resized_crop(data, 64, np.random.default_rng(0), scale=(0.01, 0.02)).pixels
    assert small.shape == (64, 64, 3) and decoded.pop().shape[:2] == (1501, 1003)


@needs_library
def test_crops_from_jpegs_decoded_smaller_are_near_those_of_the_whole_image(shared_data):
    means = []
    for number, photo in enumerate(photos(shared_data)):
        whole = np.asarray(images.decode(photo))
        for size in (48, 64, 128, 224):
            pillow, simd = both(whole, photo, size, seed=number)
            means.append(np.abs(pillow - simd).mean())
    assert max(means) < 1.7 and np.mean(means) < 0.6


@needs_library
@pytest.mark.parametrize("orientation", [None, 1, 2, 3, 4, 5, 6, 7, 8, 99])
@pytest.mark.parametrize(("format_", "scaled"), [("JPEG", 2), ("PNG", 1)])
def test_images_are_turned_by_their_exif_orientation(orientation, format_, scaled):
    exif = Image.Exif()
    if orientation is not None:
        exif[274] = orientation
    data = saved(Image.open(io.BytesIO(jpeg(5, (144, 96)))), format_, exif=exif)
    opened = Image.open(io.BytesIO(data))
    upright = np.asarray(ImageOps.exif_transpose(opened).convert("RGB"))
    for size in (48, 24):
        pillow, simd = both(upright, data, size, exif=True)
        assert np.abs(pillow - simd).mean() < scaled
        pillow, simd = both(np.asarray(opened.convert("RGB")), data, size)
        assert np.abs(pillow - simd).mean() < scaled


@needs_library
def test_a_jpeg_that_only_pillow_reads_has_the_same_crop(monkeypatch):
    monkeypatch.setattr(images, "decode_jpeg", lambda data, **scaling: None)
    data = jpeg(3, (320, 256))
    pillow, simd = both(data, data, 24, scale=(0.3, 0.5))
    assert np.abs(pillow - simd).mean() < 0.5


@needs_library
def test_what_is_no_image_is_a_bad_image_and_harmless_warnings_are_none():
    for data in (b"", b"<html></html>", jpeg(0)[:100], b"\xff\xd8\xff" + b"\0" * 50, jpeg(3, (320, 256))[:-2]):
        with pytest.raises(images.BadImageError):
            fast_crops.random_resized_crop(data, 24, np.random.default_rng(0))
    whole = jpeg(3, (320, 256))
    for data in stray_zeros(whole):
        pillow, simd = both(np.asarray(images.decode(whole)), data, 24)
        assert np.abs(pillow - simd).mean() < 0.5


@needs_library
@pytest.mark.parametrize("shape", [(1, 1), (1, 4_000_000), (4_000_000, 1)])
@pytest.mark.parametrize("ratio", [(3 / 4, 4 / 3), (1e-7, 1e7)])
def test_every_shape_has_a_crop_of_the_wanted_size(shape, ratio):
    pixels = np.full((*shape, 3), 90, np.uint8)
    crop = fast_crops.random_resized_crop(pixels, 64, np.random.default_rng(0), ratio=ratio).pixels
    assert crop.shape == (64, 64, 3) and (crop == 90).all()


def views(resize, tokenizer):
    return pair_views(
        image_size=24,
        context_length=1,
        tokenizer=tokenizer,
        crop_scale=(0.5, 1.0),
        crop_ratio=(3 / 4, 4 / 3),
        interpolation="bicubic",
        resize=resize,
    )


@needs_library
def test_both_settings_have_the_same_examples_captions_and_almost_the_same_pixels(tmp_path):
    source = open_source(write_shards(tmp_path, 30), image_size=24)
    pillow, simd = (
        TrainingBatches(source, Order(len(source), 8, 0), views(name, Lengths()), Faults())(3, np.arange(8))
        for name in ("pillow", "simd")
    )
    for name in ("index", "text"):
        np.testing.assert_array_equal(pillow[name], simd[name])
    assert 0 < np.abs(pillow["image"].astype(int) - simd["image"]).mean() < 0.5


def test_without_the_library_one_line_says_what_to_install_and_a_plan_needs_none(monkeypatch):
    monkeypatch.setitem(sys.modules, "cykooz_resizer", None)
    fast_crops.library.cache_clear()
    with pytest.raises(UserError, match=r"^config\.data\.resize=simd needs .*clip-jax-tpu\[fast\].*$"):
        views("simd", Lengths())
    assert views("simd", None)["image"].arrays["image"][0] == (24, 24, 3)
    assert views("pillow", Lengths())


def test_a_restart_may_not_change_the_setting():
    """It changes the batches."""
    old, new = (configs.to_json(configs.defaults()) for _ in range(2))
    new["data"]["resize"] = "simd"
    assert configs.differences(old, new) == ["data.resize"]
