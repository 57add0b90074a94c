"""Bytes in, uint8 numpy out: decode, crop, resize. Normalization happens on the device.

Faster crops for training, with almost the same pixels, are in ``fast_crops.py``.

JPEGs are decoded by libjpeg-turbo (``simplejpeg``; the same bits as Pillow's decoder, about 1.5 times as fast),
everything else by Pillow, which also resizes: its bicubic filter is antialiased and is what OpenAI's, OpenCLIP's
and Hugging Face's preprocessing use. Both release the interpreter lock. No step makes an image of more than
``MAX_PIXELS``, whatever the shape of the file.
"""

import functools
import io
from typing import NamedTuple

import numpy as np
import simplejpeg
from PIL import ExifTags, Image

MAX_PIXELS = 128 * 1024 * 1024  # a decompression bomb is refused from its header; the same bound as OpenCLIP's

Image.MAX_IMAGE_PIXELS = None  # replaced by the bound above, which has an error of its own

ENDINGS = ("jpg", "jpeg", "jfif", "jpe", "png", "webp", "gif", "bmp", "tif", "tiff", "avif")
"""Names of image files end in one of these, in lower or upper case; the content decides how a file is read."""

FORMATS = (
    *("JPEG", "MPO", "PNG", "WEBP", "GIF", "BMP", "DIB", "TIFF", "AVIF", "JPEG2000"),
    *("PPM", "ICO", "QOI", "TGA", "PCX", "SGI", "PSD"),
)
"""Pillow's formats that are read. EPS is not: it would start Ghostscript on a file from the internet."""

_T = Image.Transpose
TURNS = {
    **{2: _T.FLIP_LEFT_RIGHT, 3: _T.ROTATE_180, 4: _T.FLIP_TOP_BOTTOM, 5: _T.TRANSPOSE},
    **{6: _T.ROTATE_270, 7: _T.TRANSVERSE, 8: _T.ROTATE_90},
}
"""EXIF orientation -> what makes the image upright."""

INTERPOLATIONS = {"bicubic": Image.Resampling.BICUBIC, "bilinear": Image.Resampling.BILINEAR}


class BadImageError(ValueError):
    """An image that cannot be used; the message is the reason."""


class Crop(NamedTuple):
    """A part of an image, resized."""

    pixels: np.ndarray
    """uint8[size, size, 3]; may be read-only."""
    box: tuple[float, float, float, float]
    """Left, top, right and bottom of the part, as fractions of the image."""
    flipped: bool = False
    """Whether the part is mirrored, left to right."""


def decode(data: bytes | np.ndarray, min_size: int | None = None, exif: bool = False) -> Image.Image:
    """Decodes an encoded file (or uint8[H, W, 3]) to an RGB image. Raises BadImageError.

    With ``min_size`` a JPEG may be decoded at 1/2, 1/4 or 1/8 of its size, which is much faster for photos, as long as
    both sides keep at least ``min_size`` pixels. ``exif``: turned as its EXIF orientation says.
    """
    if isinstance(data, np.ndarray):
        if data.dtype != np.uint8 or data.ndim != 3 or data.shape[2] != 3:
            raise BadImageError(f"image array is {data.dtype}{list(data.shape)}, not uint8[height, width, 3]")
        return Image.fromarray(data)
    if not data:
        raise BadImageError("empty image file")
    pixels = None
    if size := jpeg_size(data):
        least = min(min_size or 0, *size)
        pixels = decode_jpeg(data, min_height=least, min_width=least)
    image = _decode_with_pillow(data) if pixels is None else Image.fromarray(pixels)
    return turned(image, orientation(data)) if exif else image


def file_format(data: bytes) -> str:
    """Pillow's name of the format of a file that it can read: ``JPEG``, ``PNG``."""
    return Image.open(io.BytesIO(data), formats=_formats()).format


def orientation(file: bytes | Image.Image) -> int:
    """The EXIF orientation, 1 to 8; 1, which turns nothing, where there is none."""
    try:
        image = file if isinstance(file, Image.Image) else Image.open(io.BytesIO(file), formats=_formats())
        return image.getexif().get(ExifTags.Base.Orientation, 1)
    except Exception:  # EXIF data of web images is often broken; the image is not
        return 1


def turned(image: Image.Image, orientation: int) -> Image.Image:
    """The image made upright; unchanged for an orientation that says nothing."""
    turn = TURNS.get(orientation)
    return image if turn is None else image.transpose(turn)


def jpeg_size(data: bytes) -> tuple[int, int] | None:
    """Width and height of a JPEG, from its header; None for what only Pillow can judge. Raises BadImageError."""
    if data[:3] != b"\xff\xd8\xff":
        return None
    try:
        height, width, colorspace, _ = simplejpeg.decode_jpeg_header(data)
    except Exception:  # a broken header: Pillow reads the file, or says what is wrong with it
        return None
    _check_pixels(width, height)
    return (width, height) if colorspace in ("YCbCr", "RGB", "Gray") else None  # CMYK needs Pillow's conversion


def decode_jpeg(data: bytes, **scaling: int) -> np.ndarray | None:
    """uint8[height, width, 3], with simplejpeg's ``min_height``, ...; None for what only Pillow can judge."""
    try:
        return simplejpeg.decode_jpeg(data, "RGB", **scaling)
    except Exception:  # harmless warnings (stray bytes before a marker) as well as truncation: Pillow tells them apart
        return None


def _decode_with_pillow(data: bytes) -> Image.Image:
    try:
        image = Image.open(io.BytesIO(data), formats=_formats())
        _check_pixels(*image.size)
        return to_rgb(image)
    except BadImageError:
        raise
    except Exception as error:  # on broken files decoders raise OSError, ValueError, SyntaxError and others
        raise BadImageError(f"undecodable image ({type(error).__name__})") from error


@functools.cache
def _formats() -> tuple[str, ...]:
    Image.init()  # Pillow may have been built without one of them
    return tuple(name for name in FORMATS if name in Image.OPEN)


def to_rgb(image: Image.Image) -> Image.Image:
    """8 bits per channel. Deep gray images are scaled: Pillow's own conversion clips them, mostly to white.

    16 bits keep their upper 8, as Pillow does for 16-bit color. Wider integers and floats have no fixed range: values
    within 0..1 (floats), 0..255 or 0..65535 (integers) are taken for what they seem. Raises BadImageError for others.
    """
    if image.mode.startswith("I;16"):
        return Image.fromarray((np.asarray(image) >> 8).astype(np.uint8)).convert("RGB")
    if image.mode not in ("I", "F"):
        return image.convert("RGB")
    values = np.asarray(image)
    low, high = values.min(), values.max()
    if image.mode == "F":
        if not (low >= 0 and high <= 255):  # so that NaN is refused too
            raise BadImageError("image of floats outside 0..1 and 0..255")
        values = np.rint(values * 255 if high <= 1 else values)
    else:
        if low < 0 or high > 65535:
            raise BadImageError("image of integers outside 0..65535")
        # Pillow scales a 16-bit PGM to 0..65535, even one that is nearly black.
        values = values >> 8 if high > 255 or image.format == "PPM" else values
    return Image.fromarray(values.astype(np.uint8)).convert("RGB")


def _check_pixels(width: int, height: int) -> None:
    if width * height > MAX_PIXELS:
        raise BadImageError(f"image of {width}x{height} pixels is larger than {MAX_PIXELS} pixels")


def random_resized_crop(
    data: bytes | np.ndarray,
    size: int,
    rng: np.random.Generator,
    *,
    scale: tuple[float, float] = (0.9, 1.0),
    ratio: tuple[float, float] = (3 / 4, 4 / 3),
    interpolation: str = "bicubic",
    exif: bool = False,
) -> Crop:
    """A random part of the image of relative area ``scale`` and aspect ``ratio``, resized to ``size`` x ``size``.

    The crop is sampled as in torchvision's RandomResizedCrop (ten tries, then the central part), which OpenCLIP uses.
    """
    # A crop of the smallest area still has at least ``size`` pixels on its shorter side after scaled decoding.
    wanted = int(np.ceil(size / (scale[0] * ratio[0]) ** 0.5))
    image = decode(data, min_size=wanted, exif=exif)
    width, height = image.size
    box = crop_box(width, height, rng, scale, ratio)
    pixels = np.asarray(resize_part(image, (size, size), INTERPOLATIONS[interpolation], box))
    return Crop(pixels, relative(box, width, height))


def relative(box: tuple[int, int, int, int], width: int, height: int) -> tuple[float, float, float, float]:
    """A box in pixels as fractions of the image."""
    return box[0] / width, box[1] / height, box[2] / width, box[3] / height


def crop_box(
    width: int, height: int, rng: np.random.Generator, scale: tuple[float, float], ratio: tuple[float, float]
) -> tuple[int, int, int, int]:
    """A random (left, top, right, bottom) in whole pixels."""
    lowest, highest = _logarithms(*ratio)
    for _ in range(10):
        # The numbers of rng.uniform, which takes several times as long.
        area = width * height * (scale[0] + (scale[1] - scale[0]) * rng.random())
        aspect = float(np.exp(lowest + (highest - lowest) * rng.random()))
        w, h = round((area * aspect) ** 0.5), round((area / aspect) ** 0.5)
        if 0 < w <= width and 0 < h <= height:
            left, top = int(rng.integers(width - w + 1)), int(rng.integers(height - h + 1))
            return left, top, left + w, top + h
    aspect = min(max(width / height, ratio[0]), ratio[1])
    w, h = (width, round(width / aspect)) if width / height < ratio[0] else (width, height)
    if width / height > ratio[1]:
        w, h = round(height * aspect), height
    left, top = (width - w) // 2, (height - h) // 2
    return left, top, left + w, top + h


@functools.cache
def _logarithms(low: float, high: float) -> tuple[float, float]:
    return tuple(np.log((low, high)).tolist())


def resize_and_crop(
    data: bytes | np.ndarray | Image.Image,
    size: int,
    *,
    resize: str = "shortest",
    interpolation: str = "bicubic",
    exif: bool = False,
) -> np.ndarray:
    """uint8[size, size, 3], for evaluation: nothing random, the same pixels as OpenCLIP's Pillow transforms.

    ``resize``: ``shortest`` scales the shorter side to ``size`` and crops the center; ``squash`` scales both sides.
    """
    if isinstance(data, Image.Image):
        image = turned(to_rgb(data), orientation(data)) if exif else to_rgb(data)
    else:
        image = decode(data, exif=exif)
    width, height = image.size
    filter_ = INTERPOLATIONS[interpolation]
    if resize == "squash":
        return np.asarray(resize_part(image, (size, size), filter_, (0, 0, width, height)))
    # torchvision's rule: the longer side is truncated, and the crop's offset rounded, half to even. Transformers
    # rounds down, so that its crop of one image in four begins a pixel earlier.
    short, long = min(width, height), max(width, height)
    long = int(size * long / short)
    width, height = (size, long) if width <= height else (long, size)
    left, top = round((width - size) / 2.0), round((height - size) / 2.0)
    if width * height > MAX_PIXELS:
        # The longer side of a strip would become gigabytes, of which the crop keeps a square: resize that part alone.
        x, y = image.width / width, image.height / height
        right, bottom = min((left + size) * x, image.width), min((top + size) * y, image.height)
        return np.asarray(resize_part(image, (size, size), filter_, (left * x, top * y, right, bottom)))
    if image.size != (width, height):
        image = image.resize((width, height), filter_)
    return np.asarray(image.crop((left, top, left + size, top + size)))


def resize_part(
    image: Image.Image, size: tuple[int, int], filter_: Image.Resampling, box: tuple[float, float, float, float]
) -> Image.Image:
    """Pillow's resize of a part of the image, without a huge image in between.

    Pillow resizes rows first: a strip of 1 x 10^8 pixels would first become 224 x 10^8. Columns go first there.
    """
    left, top, right, bottom = box
    if size[0] * (bottom - top) > MAX_PIXELS:
        image = image.resize((image.width, size[1]), filter_, box=(0, top, image.width, bottom))
        box = (left, 0, right, size[1])
    return image.resize(size, filter_, box=box)
