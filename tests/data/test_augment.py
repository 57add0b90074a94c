"""Augmentations: each by its definition, none of them in a batch unless it is on, the same on any number of hosts."""

import colorsys
import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from clip_jax import config as configs
from clip_jax.data import augment_device, images
from clip_jax.data.augment import NONE, Augment, augment, gray, jitter
from clip_jax.data.augment_device import augment_batch
from clip_jax.data.images import Crop
from clip_jax.data.order import Order
from clip_jax.data.sources.shapes import open_shapes
from clip_jax.data.stream import Faults, TrainingBatches
from clip_jax.data.views import pair_views
from clip_jax.devices.sharding import make_mesh, to_devices
from clip_jax.errors import UserError
from clip_jax.training import console
from clip_jax.training.learner import Learner
from tests.data.shards import jpeg
from tests.data.test_stream import Lengths
from tests.training.steps import batches as batches_of_pairs
from tests.training.steps import learner_of

WHOLE = (0.0, 0.0, 1.0, 1.0)


def picture(seed: int = 0) -> np.ndarray:
    return np.asarray(images.decode(jpeg(seed, (20, 16))))


class Given:
    """A generator that returns one factor for each change, in the order brightness, contrast, saturation, hue."""

    def __init__(self, *factors, order=(0, 1, 2, 3)):
        self.factors, self.order = list(factors), order

    def uniform(self, low, high):
        factor = self.factors.pop(0)
        assert low <= factor <= high
        return factor

    def permutation(self, count):
        return np.array(self.order)


def luminance(pixels):
    return pixels.astype(float) @ [0.299, 0.587, 0.114]


def blend(pixels, other, factor):
    """Between another image and this one; beyond it for a factor above 1."""
    return np.clip(other + factor * (pixels.astype(float) - other), 0, 255)


@pytest.mark.parametrize("factor", [0.6, 0.9, 1.0, 1.3])
def test_brightness_contrast_and_saturation_blend_with_black_the_mean_and_gray(factor):
    pixels = picture()
    others = (0.0, np.round(luminance(pixels).mean()), luminance(pixels)[..., None])
    for number, other in enumerate(others):
        strength, factors = [0.0] * 4, [1.0, 1.0, 1.0, 0.0]
        strength[number], factors[number] = 0.4, factor
        found = jitter(pixels, Given(*factors), tuple(strength))
        assert np.abs(found.astype(float) - blend(pixels, other, factor)).max() <= 1.5


@pytest.mark.parametrize("turn", [-0.3, 0.0, 0.1, 0.5])
def test_the_hue_turns_around_the_circle(turn):
    pixels = picture(2)
    found = jitter(pixels, Given(1.0, 1.0, 1.0, turn), (0.0, 0.0, 0.0, 0.5))
    for given, turned in zip(pixels.reshape(-1, 3), found.reshape(-1, 3), strict=True):
        hue, saturation, value = colorsys.rgb_to_hsv(*given / 255)
        expected = np.array(colorsys.hsv_to_rgb((hue + turn) % 1, saturation, value)) * 255
        # Pillow's HSV has 256 hues and 256 saturations: at most four of them for six parts of the circle.
        assert np.abs(turned - expected).max() <= 12


def test_gray_is_the_luminance():
    found = gray(picture())
    assert np.abs(found.astype(float) - luminance(picture())[..., None]).max() <= 1


def test_changes_are_spread_over_their_range_and_come_in_random_order():
    pixels, rng = np.full((1, 1, 3), 100, np.uint8), np.random.default_rng(0)
    bright = [int(jitter(pixels, rng, (0.3, 0.0, 0.0, 0.0))[0, 0, 0]) for _ in range(300)]
    assert min(bright) in (70, 71) and max(bright) in (129, 130) and abs(np.mean(bright) - 100) < 4
    both = {jitter(picture(), np.random.default_rng(seed), (0.9, 0.9, 0.9, 0.0)).tobytes() for seed in range(20)}
    assert len(both) == 20


def test_an_augmentation_has_its_probability_and_a_flip_is_reported():
    crop, rng = Crop(picture(), WHOLE), np.random.default_rng(0)
    found = [augment(crop, rng, Augment(flip=0.25, gray=0.5)) for _ in range(400)]
    flipped = [f.flipped for f in found]
    grays = [bool((f.pixels == f.pixels[..., :1]).all()) for f in found]
    assert abs(np.mean(flipped) - 0.25) < 0.08 and abs(np.mean(grays) - 0.5) < 0.08
    assert abs(np.corrcoef(flipped, grays)[0, 1]) < 0.2
    for one in found:
        mirrored = one.pixels[:, ::-1] if one.flipped else one.pixels
        expected = gray(crop.pixels) if (one.pixels == one.pixels[..., :1]).all() else crop.pixels
        np.testing.assert_array_equal(mirrored, expected)
    assert augment(crop._replace(flipped=True), rng, Augment(flip=1.0)).flipped is False


def batches(how=NONE, seed=0):
    source = open_shapes("train", image_size=32, examples=40)
    views = pair_views(
        image_size=24,
        context_length=1,
        tokenizer=Lengths(),
        crop_scale=(0.5, 1.0),
        crop_ratio=(3 / 4, 4 / 3),
        interpolation="bicubic",
        augment=how,
    )
    return TrainingBatches(source, Order(len(source), 8, seed), views, Faults(1.0))


ALL = Augment(flip=0.5, jitter=(0.4, 0.4, 0.4, 0.1), jitter_probability=0.8, gray=0.2)


def test_augmented_batches_are_the_same_on_any_number_of_hosts():
    make = batches(ALL)
    whole = make(3, np.arange(8))
    for hosts in (2, 4):
        parts = [make(3, rows)["image"] for rows in np.split(np.arange(8), hosts)]
        np.testing.assert_array_equal(whole["image"], np.concatenate(parts))
    assert not np.array_equal(whole["image"], batches(ALL, seed=1)(3, np.arange(8))["image"])


def test_augmentations_come_after_crop_and_caption_which_stay_the_same():
    plain, flipped = (batches(how)(0, np.arange(8)) for how in (NONE, Augment(flip=1.0)))
    np.testing.assert_array_equal(flipped["image"], plain["image"][:, :, ::-1])
    np.testing.assert_array_equal(flipped["text"], plain["text"])


def test_colors_on_a_device_are_those_of_the_workers_for_the_same_strengths():
    rng = np.random.default_rng(0)
    strength = (0.9, 0.9, 0.9, 0.0)
    on_device = jax.jit(lambda *given: augment_device.jitter(*given, strength))
    for _ in range(10):
        pixels = rng.integers(0, 256, (32, 20, 3), np.uint8)
        factors, order = rng.integers(410, 7782, 3) / augment_device.STEPS, rng.permutation(4)
        expected = jitter(pixels, Given(*factors, 0.0, order=order), strength)
        given = jnp.asarray(pixels.transpose(2, 0, 1), jnp.int32), jnp.asarray(factors, jnp.float32), 0
        found = np.asarray(on_device(*given, jnp.asarray(order)))
        np.testing.assert_array_equal(found.transpose(1, 2, 0), expected)
    np.testing.assert_array_equal(augment_device.luminance(given[0]), gray(pixels)[..., 0])
    # Pillow rounds 0.3 % of all hues down where they are exact.
    pixels = rng.integers(0, 256, (64, 64, 3), np.uint8)
    turn = jax.jit(augment_device.turned_hue)
    for part in (-0.5, -0.11, 0.0, 0.37):
        expected = jitter(pixels, Given(1.0, 1.0, 1.0, part), (0.0, 0.0, 0.0, 0.5)).astype(int)
        found = np.asarray(turn(jnp.asarray(pixels.transpose(2, 0, 1), jnp.int32), int(part * 255)))
        difference = np.abs(found.transpose(1, 2, 0) - expected).max(axis=-1)
        assert np.mean(difference > 0) < 0.01 and difference.max() <= 8


def test_a_device_mirrors_and_grays_with_the_probabilities_of_the_setting():
    how, crop = Augment(flip=0.25, gray=0.5), picture()
    found = np.asarray(jax.jit(lambda images: augment_batch(images, how, 0, 0))(np.stack([crop] * 256)))
    outcomes = {
        (flipped, is_gray): pixels[:, ::-1] if flipped else pixels
        for is_gray, pixels in ((False, crop), (True, gray(crop)))
        for flipped in (False, True)
    }
    drawn = np.array([next(k for k, pixels in outcomes.items() if (image == pixels).all()) for image in found])
    assert np.abs(drawn.mean(axis=0) - (0.25, 0.5)).max() < 0.1 and abs(np.corrcoef(drawn.T)[0, 1]) < 0.2


@pytest.mark.slow
def test_augmentations_of_a_device_follow_from_seed_position_and_row_alone():
    crops = np.stack([picture(i % 5) for i in range(64)])
    mirrored = jax.jit(lambda image, seed, position: augment_batch(image, ALL, seed, position))
    found = np.asarray(mirrored(crops, 0, 7))
    shards = to_devices({"image": crops}, make_mesh(4, 2), len(crops))["image"]
    np.testing.assert_array_equal(np.asarray(mirrored(shards, 0, 7)), found)
    for other in ((0, 8), (1, 7)):
        assert not np.array_equal(np.asarray(mirrored(crops, *other)), found)
    assert len({image.tobytes() for image in found}) > 55


def test_a_step_augments_before_anything_else_sees_the_images(monkeypatch):
    """So that micro-batches, a selection of pairs and teachers have the same images."""

    class Seen(Exception):
        pass

    def choose(learner, state, batch, constants):
        raise Seen(batch["image"])

    monkeypatch.setattr(Learner, "choose", choose)
    how = Augment(flip=0.5, gray=0.2)  # cheap to compile
    learner = learner_of(make_mesh(1, devices=jax.devices()[:1]), augment=how, micro_batches=2, seed=5)
    pairs = next(batches_of_pairs(1))
    with jax.disable_jit(), pytest.raises(Seen) as seen:
        learner.step()(types.SimpleNamespace(data_step=3), pairs, {})
    expected = jax.jit(lambda images: augment_batch(images, how, 5, 3))(pairs["image"])
    np.testing.assert_array_equal(seen.value.args[0], expected)
    assert not np.array_equal(expected, pairs["image"])


def run_with(flip, captions):
    config = configs.defaults()
    config.data.augment.flip = flip
    samples = [open_shapes("train")[0]._replace(captions=(caption,)) for caption in captions]
    return types.SimpleNamespace(config=config, train=samples)


def test_a_run_warns_once_about_mirrored_captions_that_name_a_side():
    captions = ["a dog", "a dog left of a cat", "a bright day", "the Rightmost door"]
    (warning,) = console.mirrored_captions(run_with(0.5, captions))
    assert 'flip=0.5: captions of 2 of 4 examples say left or right ("a dog left of a cat")' in warning
    assert not console.mirrored_captions(run_with(0.0, captions))
    assert not console.mirrored_captions(run_with(0.5, ["a bright day", "copyright", "leftovers"]))


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"flip": "1.5"}, "data.augment.flip=1.5 must be at least 0 and at most 1"),
        ({"jitter": "(0.4, 0.4)"}, "brightness, contrast, saturation and hue"),
        ({"jitter": "(0.4, 0.4, 0.4, 0.6)"}, "the hue at most 0.5"),
        ({"jitter_probability": "0.5"}, "has no effect without data.augment.jitter"),
        ({"where": "device"}, "data.augment.where=device has no effect without flip"),
        ({"where": "device", "flip": "0.5", "grounding": "1"}, "workers, which do not know of a mirrored image"),
        ({"flip": "0.5", "image_embeddings": "x"}, "data.augment has no effect with data.image_embeddings"),
    ],
)
def test_a_setting_out_of_range_is_one_line(settings, message):
    names = {"image_embeddings": "data.image_embeddings", "grounding": "objectives.grounding.weight"}
    with pytest.raises(UserError, match=message):
        configs.load("configs/demo.py", {names.get(name, f"data.augment.{name}"): v for name, v in settings.items()})
