"""How a foreign folder's images become pixels -> ``Preprocess``: Transformers' image processors, OpenCLIP's transforms.

Every key that changes a number is read or refused. A missing key has the default of the folder's own family, never
that of another: SigLIP's pixels are not normalized like CLIP's.
"""

import math
from pathlib import Path
from typing import Any

from clip_jax.errors import UserError
from clip_jax.interop import folders
from clip_jax.presets import OPENAI, PREPROCESS, SIGLIP, Preprocess

RESAMPLE = {2: "bilinear", 3: "bicubic"}
"""Pillow's constants."""

# The classes of a family have the same settings and defaults, and differ in speed.
FAMILIES = {"CLIP": OPENAI, "Siglip": SIGLIP}
CLASSES = {
    f"{family}{kind}": family
    for family in FAMILIES
    for kind in ("FeatureExtractor", "ImageProcessor", "ImageProcessorFast", "ImageProcessorPil")
}

READ = ("size", "crop_size", "resample", "image_mean", "image_std", "rescale_factor", "default_to_square")
SWITCHES = ("do_resize", "do_center_crop", "do_rescale", "do_normalize")
# Keys that change no pixel of an RGB image: names, the order of the output's axes, batching.
NEUTRAL = (
    "image_processor_type",
    "feature_extractor_type",
    "processor_class",
    "do_convert_rgb",
    "data_format",
    "input_data_format",
    "return_tensors",
    "device",
    "disable_grouping",
    "use_fast",
    "backend",
    "_valid_processor_keys",
)


def read_transformers(folder: Path) -> tuple[dict[str, Any] | None, str]:
    """The image processor of a Transformers folder, and its name in errors; None if the folder has none.

    Transformers 5 saves it inside ``processor_config.json``, and prefers that where both files exist.
    """
    file = folder / "processor_config.json"
    if file.is_file() and isinstance(nested := folders.read_json(file).get("image_processor"), dict):
        return nested, f"{file}: image_processor"
    file = folder / "preprocessor_config.json"
    return (folders.read_json(file) if file.is_file() else None), str(file)


def from_transformers(settings: dict[str, Any] | None, family: str, image_size: int, origin: str) -> Preprocess:
    """The settings of a ``CLIPImageProcessor`` or ``SiglipImageProcessor``; without any, the family's own.

    ``family`` (``CLIP`` or ``Siglip``) is the model's, for settings that do not name their class. Raises UserError.
    """
    if settings is None:
        return FAMILIES[family]
    name = settings.get("image_processor_type") or settings.get("feature_extractor_type") or f"{family}ImageProcessor"
    if name not in CLASSES:
        raise UserError(f"{origin}: {name} is not supported; CLIPImageProcessor and SiglipImageProcessor are")
    for key, value in settings.items():
        # None and False switch off whatever the key may mean.
        if key not in (*READ, *SWITCHES, *NEUTRAL) and value is not None and value is not False:
            raise UserError(f"{origin}: {key}={value!r:.60} is not supported")
    family = CLASSES[name]
    usual = {"do_resize": True, "do_center_crop": family == "CLIP", "do_rescale": True, "do_normalize": True}
    switches = usual | {key: bool(settings[key]) for key in SWITCHES if settings.get(key) is not None}
    if not switches["do_resize"]:
        raise UserError(f"{origin}: do_resize=False is not supported: this model takes images of one size")
    resample = settings.get("resample")
    if resample is not None and resample not in RESAMPLE:
        raise UserError(f"{origin}: resample={resample!r} is not supported; {RESAMPLE} are")
    mean, std = _folded(settings, switches, FAMILIES[family], origin)
    return Preprocess(
        mean,
        std,
        resize=_resize(settings, switches["do_center_crop"], FAMILIES[family], image_size, origin),
        interpolation=FAMILIES[family].interpolation if resample is None else RESAMPLE[resample],
    )


def _resize(settings: dict[str, Any], crops: bool, family: Preprocess, image_size: int, origin: str) -> str:
    """``shortest`` or ``squash``. Raises UserError if the result is not a square of the model's size."""
    size, crop = settings.get("size"), settings.get("crop_size")
    if isinstance(size, int):
        square = settings.get("default_to_square")
        size = {"height": size, "width": size} if square else {"shortest_edge": size}
    square = {"height": image_size, "width": image_size}
    known = {"shortest": {"shortest_edge": image_size}, "squash": square}
    # Newer versions save every possible key, the unused ones as null.
    given = {k: v for k, v in size.items() if v is not None} if isinstance(size, dict) else size
    resize = family.resize if given is None else next((name for name, wanted in known.items() if wanted == given), None)
    if resize is None:
        raise UserError(
            f"{origin}: size={size!r}, but the model takes {image_size} pixels; supported are {list(known.values())}"
        )
    if crops and crop is not None and crop != image_size and crop != square:
        raise UserError(f"{origin}: crop_size={crop!r}, but the model takes {image_size} pixels")
    if resize == "shortest" and not crops:
        raise UserError(f"{origin}: do_center_crop=False after scaling the shorter side leaves images that do not fit")
    return resize


def _folded(settings: dict[str, Any], switches: dict[str, bool], family: Preprocess, origin: str) -> tuple[Any, Any]:
    """Mean and standard deviation of ``(pixels / 255 - mean) / std`` that equal the processor's factor and statistics.

    (f p - m) / s = (p / 255 - m / 255 f) / (s / 255 f)
    """
    mean, std = (0.0,) * 3, (1.0,) * 3
    if switches["do_normalize"]:
        mean = statistics(settings.get("image_mean"), family.mean, f"{origin}: image_mean")
        std = statistics(settings.get("image_std"), family.std, f"{origin}: image_std", positive=True)
    factor = settings.get("rescale_factor") if switches["do_rescale"] else 1.0
    factor = 1 / 255 if factor is None else factor
    if not isinstance(factor, int | float) or not factor > 0 or math.isinf(factor):
        raise UserError(f"{origin}: rescale_factor={factor!r} is not a positive number")
    if math.isclose(255 * factor, 1, rel_tol=1e-9):
        return mean, std
    return tuple(x / (255 * factor) for x in mean), tuple(x / (255 * factor) for x in std)


def statistics(value: Any, default: tuple, origin: str, *, positive: bool = False) -> tuple[float, float, float]:
    """Three finite numbers, one per channel, or one number for all; the default for None. Raises UserError."""
    if value is None:
        return default
    values = tuple(value) if isinstance(value, list | tuple) else (value,) * 3
    numbers = all(isinstance(x, int | float) and math.isfinite(x) and (x > 0 or not positive) for x in values)
    if len(values) != 3 or not numbers:
        raise UserError(f"{origin}={value!r:.60} is not three {'positive ' if positive else ''}numbers")
    return values


def from_open_clip(settings: dict[str, Any] | None, tokenizer: str, origin: str) -> Preprocess:
    """OpenCLIP's ``preprocess_cfg``; ``tokenizer`` is that of the preset, which says the family. Raises UserError.

    OpenCLIP itself gives a SigLIP without these settings the statistics of OpenAI; such a model was trained with its
    own.
    """
    family = PREPROCESS.get(tokenizer, OPENAI)
    settings = {key: value for key, value in (settings or {}).items() if value is not None}
    interpolation = settings.get("interpolation", family.interpolation)
    resize = settings.get("resize_mode", family.resize)
    # Not read: size, which OpenCLIP replaces by the model's; fill_color, which only resize_mode "longest" uses; and any
    # other key, which OpenCLIP ignores.
    for name, value, supported in (
        ("mode", settings.get("mode", "RGB"), ("RGB",)),
        ("interpolation", interpolation, ("bicubic", "bilinear", "random")),
        ("resize_mode", resize, ("shortest", "squash")),
    ):
        if value not in supported:
            raise UserError(f"{origin}.{name}={value!r:.60} is not supported; {', '.join(supported)} are")
    return Preprocess(
        mean=statistics(settings.get("mean"), family.mean, f"{origin}.mean"),
        std=statistics(settings.get("std"), family.std, f"{origin}.std", positive=True),
        resize=resize,
        # OpenCLIP draws a filter in training only; its evaluation takes the bicubic one.
        interpolation="bicubic" if interpolation == "random" else interpolation,
    )
