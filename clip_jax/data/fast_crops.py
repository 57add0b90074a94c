"""Training crops with vector instructions: ``config.data.resize="simd"``, several times as fast as Pillow's.

The filter is Pillow's own (a convolution whose support grows with the reduction, so nothing aliases), computed by
``cykooz_resizer``; values differ by rounding, and by a few levels beside hard edges. Evaluation does not come here.
"""

import functools
import math
from types import ModuleType

import numpy as np
from PIL import Image

from clip_jax.data import images
from clip_jax.errors import UserError

FILTERS = {"bicubic": "catmull_rom", "bilinear": "bilinear"}
"""Pillow's name of a filter -> the library's. Pillow's bicubic has a = -1/2, which makes it Catmull and Rom's."""

FACTORS = (8, 4, 2)
"""libjpeg-turbo decodes to these fractions of the size with vector instructions. It offers 7/8, 3/4 and 5/8 too, which
take longer than the whole image does."""

MARGIN = 1.5
"""A JPEG decoded at a fraction has at least this many pixels per pixel of the crop, so that the resize still filters.

Mean difference from the crop of the whole image over photographs, in levels of 255: 1.2 at a margin of 1 (up to 3.4),
0.6 at 1.5 (up to 1.6), 0.4 at 2 (up to 1.3).
"""


@functools.cache
def library() -> ModuleType:
    """``cykooz_resizer``. Raises UserError where it is not installed."""
    try:
        import cykooz_resizer
    except ImportError as error:
        raise UserError(
            "config.data.resize=simd needs cykooz-resizer: pip install 'clip-jax-tpu[fast]', or leave it at pillow"
        ) from error
    return cykooz_resizer


def random_resized_crop(
    data: bytes | np.ndarray,
    size: int,
    rng: np.random.Generator,
    *,
    scale: tuple[float, float] = (0.9, 1.0),
    ratio: tuple[float, float] = (3 / 4, 4 / 3),
    interpolation: str = "bicubic",
    exif: bool = False,
) -> images.Crop:
    """What ``images.random_resized_crop`` gives, from the same draws.

    The crop is drawn from the size in a JPEG's header, and the file is then decoded as small as this crop allows.
    """
    turn = images.orientation(data) if exif and not isinstance(data, np.ndarray) else 1
    full = None if isinstance(data, np.ndarray) else images.jpeg_size(data)
    if full is None:
        pixels = np.asarray(images.decode(data, exif=exif))
        width, height = pixels.shape[1], pixels.shape[0]
        box = images.crop_box(width, height, rng, scale, ratio)
        return images.Crop(resize(pixels, box, size, interpolation), images.relative(box, width, height))
    width, height = full[::-1] if turn in (5, 6, 7, 8) else full  # these swap the sides
    box = images.crop_box(width, height, rng, scale, ratio)
    sides = min(box[2] - box[0], box[3] - box[1])
    factor = next((f for f in FACTORS if sides >= f * MARGIN * size), 1)
    least = {"min_width": math.ceil(full[0] / factor), "min_height": math.ceil(full[1] / factor)}
    pixels = images.decode_jpeg(data, min_factor=factor, **least)
    if pixels is None:  # Pillow says what is wrong, or decodes the whole image
        pixels, factor = np.asarray(images.decode(data)), 1
    if turn in images.TURNS:
        pixels = np.asarray(images.turned(Image.fromarray(pixels), turn))
    resized = resize(pixels, tuple(side / factor for side in box), size, interpolation)
    return images.Crop(resized, images.relative(box, width, height))


def resize(pixels: np.ndarray, box: tuple[float, ...], size: int, interpolation: str) -> np.ndarray:
    """uint8[size, size, 3], read-only, of a box (left, top, right, bottom) in uint8[height, width, 3].

    Sides of the box are multiples of 1/8: their sums are exact, and never a rounding error outside of the image.
    """
    left, top, right, bottom = box
    # Like Pillow's, the filter reads over the edges of the box: up to two pixels of the larger grid.
    support = math.ceil(2 * max(right - left, bottom - top, size) / size)
    x, y = max(0, math.floor(left) - support), max(0, math.floor(top) - support)
    part = pixels[y : math.ceil(bottom) + support, x : math.ceil(right) + support]
    height, width, _ = part.shape
    if max(width, height) * size > images.MAX_PIXELS:  # a strip; Pillow's half has an order of passes for it
        filter_ = images.INTERPOLATIONS[interpolation]
        inner = (left - x, top - y, right - x, bottom - y)
        return np.asarray(images.resize_part(Image.fromarray(part), (size, size), filter_, inner))
    simd = library()
    options = simd.ResizeOptions(
        simd.ResizeAlg.convolution(simd.FilterType[FILTERS[interpolation]]),
        crop_box=simd.CropBox(left - x, top - y, right - left, bottom - top),
    )
    rgb = simd.PixelType.U8x3
    resized = simd.ImageData(size, size, rgb)
    # A resizer keeps buffers, which two threads must not share; making one costs nothing.
    simd.Resizer().resize(simd.ImageData(width, height, rgb, part.tobytes()), resized, options)
    return np.frombuffer(resized.get_buffer(), np.uint8).reshape(size, size, 3)
