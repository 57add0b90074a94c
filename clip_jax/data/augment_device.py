"""The augmentations of ``augment.py`` on the devices, as a part of the training step: ``config.data.augment.where``.

The same transforms as Pillow's, with the same rounding, in integers and in exact products: an image is the same to the
bit on any device, mesh and division into micro-batches. Strengths are drawn in steps of 1/4096, for which float32 is
exact. Given the same strengths, pixels equal the host's, but for hues that Pillow's own rounding puts one of its 256
steps lower (0.3 % of all colors). Random numbers are functions of the seed, the position in the data and the row.
"""

import zlib

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int, Key, UInt8, UInt32

from clip_jax.data.augment import Augment

Pixels = UInt8[Array, "height width 3"]
Planes = Int[Array, "3 height width"]

STEPS = 4096
"""A factor is a multiple of 1 / STEPS: its product with a difference of 8 bits has at most 24 bits."""


def augment_batch(
    images: UInt8[Array, "batch height width 3"], how: Augment, seed: int, position: Int[Array, ""] | int
) -> UInt8[Array, "batch height width 3"]:
    """The crops with their augmentations: first the mirror, then the colors, as ``augment.augment``.

    ``position``: the number of the batch in the data.
    """
    rng = jax.random.fold_in(jax.random.fold_in(jax.random.key(seed), position), zlib.crc32(b"augment"))
    keys = jax.vmap(jax.random.fold_in, (None, 0))(rng, jnp.arange(len(images)))
    return jax.vmap(lambda image, key: _augment(image, key, how))(images, keys)


def _augment(pixels: Pixels, key: Key[Array, ""], how: Augment) -> Pixels:
    # All numbers come from one draw, for each draw is a hash that takes long to compile.
    flip, colors, grays, turn, *rest = jax.random.bits(key, (11,)) >> 8
    if how.flip > 0:
        pixels = jnp.where(_happens(flip, how.flip), pixels[:, ::-1], pixels)
    if not how.jitter and how.gray == 0:
        return pixels
    # Channels first: each is then a plane, with which all devices compute faster than with pixels of three numbers.
    planes = jnp.moveaxis(pixels, -1, 0).astype(jnp.int32)
    if how.jitter:
        ranges = [(max(0.0, 1 - change), 1 + change) for change in how.jitter[:3]]
        factors = jnp.stack([_between(bits, *ends) for bits, ends in zip(rest[:3], ranges, strict=True)])
        turned = _between(turn, 0.0, 2 * how.jitter[3]) - round(STEPS * how.jitter[3])
        turned = jnp.sign(turned) * (jnp.abs(turned) * 255 // STEPS)  # towards zero, as int(turn * 255)
        strengths = (factors / STEPS).astype(jnp.float32), turned, jnp.argsort(jnp.stack(rest[3:]))
        planes = jnp.where(_happens(colors, how.jitter_probability), jitter(planes, *strengths, how.jitter), planes)
    if how.gray > 0:
        planes = jnp.where(_happens(grays, how.gray), luminance(planes), planes)
    return jnp.moveaxis(planes.astype(jnp.uint8), 0, -1)


def _happens(bits: UInt32[Array, ""], probability: float) -> Bool[Array, ""]:
    """From 24 random bits."""
    return bits < round(probability * 2**24)


def _between(bits: UInt32[Array, ""], low: float, high: float) -> Int[Array, ""]:
    """One of the multiples of 1 / STEPS in ``[low, high]``, as an integer."""
    first, last = round(low * STEPS), round(high * STEPS)
    return first + (bits % (last - first + 1)).astype(jnp.int32)


def jitter(
    x: Planes, factors: Float[Array, "3"], turn: Int[Array, ""], order: Int[Array, "4"], strength: tuple[float, ...]
) -> Planes:
    """Brightness, contrast, saturation (0 to 2) and hue, in ``order``; those whose strength is 0 are not changed."""
    changes = (
        lambda x: _blend(x, jnp.zeros_like(x), factors[0]),
        lambda x: _blend(x, _mean(x), factors[1]),
        lambda x: _blend(x, luminance(x), factors[2]),
        lambda x: turned_hue(x, turn),
    )
    changes = [change if strength[kind] > 0 else lambda x: x for kind, change in enumerate(changes)]
    # A loop, for every image of a batch has another order: each round computes all changes and selects.
    return jax.lax.fori_loop(0, 4, lambda i, x: jax.lax.switch(order[i], changes, x), x)


def luminance(x: Planes) -> Int[Array, "height width"]:
    """ITU-R 601 in Pillow's fixed point."""
    return (19595 * x[0] + 38470 * x[1] + 7471 * x[2] + 0x8000) >> 16


def _mean(x: Planes) -> Int[Array, ""]:
    """The mean luminance, rounded half up."""
    gray = luminance(x)
    return (2 * jnp.sum(gray) + gray.size) // (2 * gray.size)


def _blend(x: Planes, other: Int[Array, "..."], factor: Float[Array, ""]) -> Planes:
    """Pillow's ``Image.blend``: truncated, and clipped where the factor is above 1."""
    mixed = other.astype(jnp.float32) + factor * (x - other).astype(jnp.float32)
    return jnp.clip(mixed, 0, 255).astype(jnp.int32)


def turned_hue(x: Planes, turn: Int[Array, ""]) -> Planes:
    """The hue moved by steps of 1/256 of the circle: Pillow's conversions to HSV and back, in integers."""
    red, green, blue = x
    value = jnp.maximum(jnp.maximum(red, green), blue)
    chroma = value - jnp.minimum(jnp.minimum(red, green), blue)
    six = 6 * jnp.maximum(chroma, 1)
    angle = jnp.where(
        red == value,
        green - blue,
        jnp.where(green == value, 2 * chroma + blue - red, 4 * chroma + red - green),
    )
    angle = jnp.where(angle < 0, angle + six, angle)
    hue = (_quotient(angle * 255, six) + turn) & 255  # 0 for a gray pixel, whose saturation is 0
    saturation = _quotient(chroma * 255, jnp.maximum(value, 1))
    part = _quotient(hue * 6, 255)
    rest = hue * 6 - part * 255
    low = _quotient(2 * value * (255 - saturation) + 255, 510)
    falling = _quotient(2 * value * (65025 - saturation * rest) + 65025, 130050)
    rising = _quotient(2 * value * (65025 - saturation * (255 - rest)) + 65025, 130050)
    table = (
        (value, falling, low, low, rising, value, value),
        (rising, value, value, falling, low, low, rising),
        (low, low, rising, value, value, falling, low),
    )
    return jnp.stack([jax.lax.select_n(part, *channel) for channel in table])


def _quotient(number: Int[Array, "..."], divisor: Int[Array, "..."] | int) -> Int[Array, "..."]:
    """``number // divisor`` of numbers from 0 to 2^26, quotients of at most 2^9: TPUs divide integers bit by bit.

    The quotient of floats is wrong by at most one.
    """
    found = (number.astype(jnp.float32) / jnp.asarray(divisor, jnp.float32)).astype(jnp.int32)
    rest = number - found * divisor
    return found + (rest >= divisor) - (rest < 0)
