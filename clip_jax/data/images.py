"""Bytes in, uint8 numpy out: decode, crop, resize. Normalization happens on the device.

JPEGs are decoded by libjpeg-turbo (``simplejpeg``; the same bits as Pillow's decoder, about 1.5 times as fast),
everything else by Pillow, which also resizes: its bicubic filter is antialiased and is what OpenAI's, OpenCLIP's
and Hugging Face's preprocessing use. Both release the interpreter lock.
"""

import io

import numpy as np
import simplejpeg
from PIL import Image

MAX_PIXELS = 128 * 1024 * 1024  # a decompression bomb is refused from its header; the same bound as OpenCLIP's

Image.MAX_IMAGE_PIXELS = None  # replaced by the bound above, which has an error of its own

INTERPOLATIONS = {"bicubic": Image.Resampling.BICUBIC, "bilinear": Image.Resampling.BILINEAR}


class BadImageError(ValueError):
    """An image that cannot be used; the message is the reason."""


def decode(data: bytes | np.ndarray, min_size: int | None = None) -> Image.Image:
    """Decodes an encoded file (or uint8[H, W, 3]) to an RGB image. Raises BadImageError.

    With ``min_size`` a JPEG may be decoded at 1/2, 1/4 or 1/8 of its size, which is much faster for photos, as long as
    both sides keep at least ``min_size`` pixels.
    """
    if isinstance(data, np.ndarray):
        if data.dtype != np.uint8 or data.ndim != 3 or data.shape[2] != 3:
            raise BadImageError(f"image array is {data.dtype}{list(data.shape)}, not uint8[height, width, 3]")
        return Image.fromarray(data)
    if not data:
        raise BadImageError("empty image file")
    try:
        if data[:3] == b"\xff\xd8\xff":
            height, width, colorspace, _ = simplejpeg.decode_jpeg_header(data)
            _check_pixels(width, height)
            if colorspace in ("YCbCr", "RGB", "Gray"):  # CMYK needs Pillow's conversion
                smallest = min(min_size or 0, height, width)
                pixels = simplejpeg.decode_jpeg(data, "RGB", min_height=smallest, min_width=smallest)
                return Image.fromarray(pixels)
        image = Image.open(io.BytesIO(data))
        _check_pixels(*image.size)
        return image.convert("RGB")
    except BadImageError:
        raise
    except Exception as error:  # on broken files decoders raise OSError, ValueError, SyntaxError and others
        raise BadImageError(f"undecodable image ({type(error).__name__})") from error


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
) -> np.ndarray:
    """uint8[size, size, 3]: a random part of the image of relative area ``scale`` and aspect ``ratio``, resized.

    The crop is sampled as in torchvision's RandomResizedCrop (ten tries, then the central part), which OpenCLIP uses.
    """
    # A crop of the smallest area still has at least ``size`` pixels on its shorter side after scaled decoding.
    wanted = int(np.ceil(size / (scale[0] * ratio[0]) ** 0.5))
    image = decode(data, min_size=wanted)
    width, height = image.size
    left, top, right, bottom = _crop_box(width, height, rng, scale, ratio)
    box = (left, top, right, bottom)
    return np.asarray(image.resize((size, size), INTERPOLATIONS[interpolation], box=box))


def _crop_box(
    width: int, height: int, rng: np.random.Generator, scale: tuple[float, float], ratio: tuple[float, float]
) -> tuple[int, int, int, int]:
    """(left, top, right, bottom) in pixels."""
    for _ in range(10):
        area = width * height * rng.uniform(*scale)
        aspect = np.exp(rng.uniform(*np.log(ratio)))
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


def resize_and_crop(
    data: bytes | np.ndarray | Image.Image, size: int, *, resize: str = "shortest", interpolation: str = "bicubic"
) -> np.ndarray:
    """uint8[size, size, 3], for evaluation: nothing random, the same pixels as OpenCLIP's Pillow transforms.

    ``resize``: ``shortest`` scales the shorter side to ``size`` and crops the center; ``squash`` scales both sides.
    """
    image = data.convert("RGB") if isinstance(data, Image.Image) else decode(data)
    width, height = image.size
    filter_ = INTERPOLATIONS[interpolation]
    if resize == "squash":
        return np.asarray(image.resize((size, size), filter_))
    # torchvision's rule: the longer side is truncated, and the crop's offset rounded, half to even. Transformers
    # rounds down, so that its crop of one image in four begins a pixel earlier.
    short, long = min(width, height), max(width, height)
    long = int(size * long / short)
    width, height = (size, long) if width <= height else (long, size)
    if image.size != (width, height):
        image = image.resize((width, height), filter_)
    left, top = round((width - size) / 2.0), round((height - size) / 2.0)
    return np.asarray(image.crop((left, top, left + size, top + size)))
