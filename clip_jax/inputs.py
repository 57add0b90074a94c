"""What the methods of a ``Model`` accept: shapes, types and ranges are checked here, not by what happens to broadcast.

Every unambiguous input is accepted (encoded bytes, open files, gray arrays); any other is a UserError of one line.
"""

import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, BinaryIO

import jax
import numpy as np
from PIL import Image

from clip_jax.errors import UserError
from clip_jax.models.text import TextTower
from clip_jax.presets import Preprocess

OneImage = str | Path | bytes | BinaryIO | Image.Image | np.ndarray
Images = OneImage | Sequence[OneImage]

ONE = "a path, encoded bytes, an open file, a PIL image or uint8[height, width, 3]"


def images(given: Images) -> list[OneImage]:
    """One or several images as a list with at least one. Raises UserError."""
    if isinstance(given, str | os.PathLike | bytes | bytearray | memoryview | Image.Image) or hasattr(given, "read"):
        return [given]
    if hasattr(given, "ndim"):
        if given.ndim not in (2, 3, 4):
            raise UserError(f"images: {_described(given)} is not an image, nor a batch of them; give {ONE}")
        given = [given] if given.ndim < 4 else list(given)
    elif isinstance(given, Mapping) or not hasattr(given, "__iter__"):
        raise UserError(f"images: {given!r:.60} is not an image; give {ONE}, or a list of them")
    found = list(given)
    if not found:
        raise UserError("images: none; give at least one")
    return found


def image(given: OneImage) -> tuple[bytes | Image.Image | np.ndarray, str]:
    """What ``data.images`` decodes, and the image's name in errors; a path may begin with ``~``. Raises UserError."""
    if isinstance(given, str | os.PathLike):
        try:
            return Path(given).expanduser().read_bytes(), str(given)
        except (OSError, ValueError, RuntimeError) as error:  # ValueError: a null byte; RuntimeError: ~nobody
            more = "; download it first" if "://" in str(given) else ""
            raise UserError(f"{given}: cannot be read ({getattr(error, 'strerror', None) or error}){more}") from error
    if isinstance(given, bytes | bytearray | memoryview):
        return bytes(given), "image"
    if hasattr(given, "read"):
        data = given.read()
        if not isinstance(data, bytes):
            raise UserError("image: a file opened as text; open it with mode 'rb'")
        return data, str(getattr(given, "name", "image"))
    if isinstance(given, Image.Image):
        try:
            given.load()
        except Exception as error:  # a closed or truncated file: OSError, ValueError, SyntaxError, ...
            raise UserError(f"{getattr(given, 'filename', '') or 'image'}: undecodable image ({error})") from error
        return given, "image"
    if hasattr(given, "ndim"):
        return _pixels(np.asarray(given)), "image"
    raise UserError(f"images: {given!r:.60} is not an image; give {ONE}")


def _pixels(array: np.ndarray) -> np.ndarray:
    """uint8[height, width, 3] of an array with one channel, three, or three and alpha."""
    channels = 1 if array.ndim == 2 else array.shape[-1]
    if array.dtype != np.uint8 or array.ndim not in (2, 3) or channels not in (1, 3, 4):
        more = "; normalized pixels go to encode_pixels" if array.dtype.kind == "f" else ""
        raise UserError(f"image: {_described(array)} is not uint8[height, width, 3]{more}")
    if not array.size:
        raise UserError(f"image: {_described(array)} has no pixels")
    array = array.reshape(*array.shape[:2], channels)
    return np.repeat(array, 3, axis=-1) if channels == 1 else np.ascontiguousarray(array[..., :3])


def texts(given: str | Sequence[str], name: str = "texts") -> list[str]:
    """One or several texts as a list with at least one. Raises UserError."""
    if isinstance(given, str):
        return [str(given)]
    if isinstance(given, bytes | Mapping) or not hasattr(given, "__iter__"):
        raise UserError(f"{name}: {given!r:.60} is not a text; give a str, or a list of them")
    found = list(given)
    if not found:
        raise UserError(f"{name}: none; give at least one")
    for i, text in enumerate(found):
        if not isinstance(text, str):
            raise UserError(f"{name}[{i}]: {text!r:.60} is not a str")
    return [str(text) for text in found]  # a NumPy str is one too


def pixels(pixels: Any, image_size: int, preprocess: Preprocess) -> np.ndarray | jax.Array:
    """The array, which must be float[n, image_size, image_size, 3] in about the range of normalized pixels.

    Raises UserError for any other, and for n = 0.
    """
    wanted = f"float[n, {image_size}, {image_size}, 3], as preprocess(images) gives them"
    if not hasattr(pixels, "shape") or not hasattr(pixels, "dtype"):
        raise UserError(f"pixels: {pixels!r:.60} is not {wanted}")
    pixels = _array(pixels)
    if pixels.shape[1:] != (image_size, image_size, 3) or not len(pixels):
        channels_first = pixels.ndim == 4 and pixels.shape[1:] == (3, image_size, image_size)
        more = "; move the channels last: transpose(0, 2, 3, 1)" if channels_first else ""
        raise UserError(f"pixels: {_described(pixels)} is not {wanted}{more}")
    if not jax.numpy.issubdtype(pixels.dtype, jax.numpy.floating):
        raise UserError(f"pixels: {_described(pixels)} is not {wanted}; uint8 images go to encode_image")
    # Arrays of NumPy only: reading others back would wait for the device, and a traced one has no values.
    if isinstance(pixels, np.ndarray):
        low, high = ((end - np.array(preprocess.mean)) / np.array(preprocess.std) for end in (0.0, 1.0))
        # Pixels that follow a gradient, or random ones, leave the range; 0..255 is 50 times as wide.
        least, most = low.min() - 4 * (high - low).max(), high.max() + 4 * (high - low).max()
        if not (pixels.min() >= least and pixels.max() <= most):  # so that NaN fails too
            raise UserError(
                f"pixels: from {pixels.min():.4g} to {pixels.max():.4g}; normalized ones are between {low.min():.3g} "
                f"and {high.max():.3g}, as preprocess(images) gives them"
            )
    return pixels


def tokens(tokens: Any, tower: TextTower) -> np.ndarray | jax.Array:
    """The array, which must be int[n, length] with a length and ids that the text tower has.

    Raises UserError for any other, and for n = 0.
    """
    length = tower.context_length
    # A tower that pools the last position needs texts of its full length; others take shorter ones.
    fixed = tower.pooling == "last"
    wanted = f"int[n, {length}]" if fixed else f"int[n, at most {length}]"
    if not hasattr(tokens, "shape") or not hasattr(tokens, "dtype"):
        raise UserError(f"tokens: {tokens!r:.60} is not {wanted}, as tokenize(texts) gives them")
    tokens = _array(tokens)
    fits = tokens.ndim == 2 and tokens.size and (length if fixed else 1) <= tokens.shape[1] <= length
    if not fits or not jax.numpy.issubdtype(tokens.dtype, jax.numpy.integer):
        raise UserError(f"tokens: {_described(tokens)} is not {wanted}, as tokenize(texts) gives them")
    if isinstance(tokens, jax.core.Tracer):
        return tokens
    ids = np.asarray(tokens)
    if ids.min() < 0 or ids.max() >= tower.vocab_size:
        wrong = ids.min() if ids.min() < 0 else ids.max()
        raise UserError(
            f"tokens: {wrong} is not an id of this model's text tower, which has {tower.vocab_size}; its own tokenizer "
            "(load(..., tokenizer=PATH)) gives no other"
        )
    if tower.pooling == "eos" and not (ids == tower.eos_id).any(axis=1).all():
        raise UserError(f"tokens: a row without the end token {tower.eos_id}, at which this model pools a text")
    return tokens


def _array(given: Any) -> np.ndarray | jax.Array:
    """Arrays of other libraries on the host, such as torch's, as NumPy's."""
    return given if isinstance(given, jax.Array | np.ndarray) else np.asarray(given)


def _described(array: Any) -> str:
    return f"{array.dtype}{list(array.shape)}"
