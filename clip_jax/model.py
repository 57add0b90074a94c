"""``load``: a run's folder -> a ``Model`` that embeds, compares and classifies images and texts."""

import dataclasses
from collections.abc import Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int
from PIL import Image

from clip_jax import checkpoint, presets, run_folder
from clip_jax.data import images as image_files
from clip_jax.data.tokenizers import Tokenizer
from clip_jax.errors import UserError
from clip_jax.evaluation import zero_shot
from clip_jax.models.clip import CLIP, unit
from clip_jax.presets import Preset

Images = str | Path | Image.Image | np.ndarray | Sequence[str | Path | Image.Image | np.ndarray]

BATCH = 64
"""Images or texts encoded at once; a smaller last batch is filled up, so that nothing is compiled twice."""


@dataclasses.dataclass(frozen=True)
class Model:
    """Parameters with everything needed to use them. Embeddings are float32[n, D], of unit length unless asked."""

    name: str
    preset: Preset
    clip: CLIP
    params: Any
    tokenizer: Tokenizer
    step: int
    """How many training steps the parameters have seen."""

    def __repr__(self) -> str:
        return f"clip_jax.Model({self.name!r}, image {self.image_size} px, {self.embed_dim} features, step {self.step})"

    @property
    def image_size(self) -> int:
        """Height and width of the pixels that ``encode_pixels`` takes."""
        return self.preset.architecture.image.image_size

    @property
    def embed_dim(self) -> int:
        return self.preset.architecture.embed_dim

    @property
    def scale(self) -> float:
        """``exp(logit_scale)``: what multiplies cosines before a softmax."""
        return float(jnp.exp(self.params["logit_scale"]))

    def preprocess(self, images: Images) -> Float[np.ndarray, "n height width 3"]:
        """Paths, PIL images or uint8[H, W, 3] arrays (one or several) -> normalised pixels. Raises UserError."""
        pixels = np.stack([self._pixels(image) for image in _as_list(images)])
        return np.asarray(self.preset.preprocess.normalize(pixels))

    def tokenize(self, texts: str | Sequence[str]) -> Int[np.ndarray, "n length"]:
        """Texts (one or several) -> token ids."""
        return self.tokenizer([texts] if isinstance(texts, str) else list(texts))

    def encode_image(self, images: Images, *, normalize: bool = True) -> Float[np.ndarray, "n dim"]:
        """Embeddings of paths, PIL images or uint8 arrays, decoded and encoded a batch at a time."""
        images = _as_list(images)
        chunks = [images[i : i + BATCH] for i in range(0, len(images), BATCH)]
        return _in_batches(lambda chunk: self.encode_pixels(self.preprocess(chunk), normalize=normalize), chunks)

    def encode_text(self, texts: str | Sequence[str], *, normalize: bool = True) -> Float[np.ndarray, "n dim"]:
        """Embeddings of texts."""
        tokens = self.tokenize(texts)
        chunks = [tokens[i : i + BATCH] for i in range(0, len(tokens), BATCH)]
        return _in_batches(lambda chunk: self.encode_tokens(chunk, normalize=normalize), chunks)

    def encode_pixels(
        self, pixels: Float[Array, "n height width 3"], *, normalize: bool = True
    ) -> Float[Array, "n dim"]:
        """Embeddings of normalised pixels; jitted, and differentiable with respect to them."""
        encoded = self._encode_pixels(self.params, pixels)
        return unit(encoded) if normalize else encoded

    def encode_tokens(self, tokens: Int[Array, "n length"], *, normalize: bool = True) -> Float[Array, "n dim"]:
        """Embeddings of token ids; jitted."""
        encoded = self._encode_tokens(self.params, tokens)
        return unit(encoded) if normalize else encoded

    def similarity(self, a: Float[Array, "n dim"], b: Float[Array, "m dim"]) -> Float[Array, "n m"]:
        """Cosines between any embeddings: image-text, text-text, image-image."""
        return unit(jnp.asarray(a)) @ unit(jnp.asarray(b)).T

    def classify(
        self, images: Images, labels: Sequence[str], templates: Sequence[str] = ("{}",)
    ) -> Float[np.ndarray, "n labels"]:
        """Probabilities of the labels for each image: a softmax over scaled cosines (Radford et al. 2021, 3.1.2).

        ``templates`` are prompts with {} for the label; their embeddings are averaged.
        """
        if isinstance(labels, str) or not len(labels):
            raise UserError("labels: a list with at least one text")
        classes = zero_shot.classifier(labels, templates, self.encode_text)
        return np.asarray(jax.nn.softmax(self.scale * self.encode_image(images) @ classes.T, axis=-1))

    @cached_property
    def _encode_pixels(self):
        return jax.jit(self.clip.encode_image)

    @cached_property
    def _encode_tokens(self):
        return jax.jit(self.clip.encode_text)

    def _pixels(self, image: str | Path | Image.Image | np.ndarray) -> np.ndarray:
        if isinstance(image, str | Path):
            try:
                data = Path(image).read_bytes()
            except OSError as error:
                raise UserError(f"{image}: cannot be read ({error.strerror})") from error
        else:
            data = image
        resize, interpolation = self.preset.preprocess.resize, self.preset.preprocess.interpolation
        try:
            return image_files.resize_and_crop(data, self.image_size, resize=resize, interpolation=interpolation)
        except image_files.BadImageError as error:
            raise UserError(f"{image if isinstance(image, str | Path) else 'image'}: {error}") from error


def load(folder: str | Path, *, dtype: str = "float32") -> Model:
    """The newest checkpoint of a run's folder. Raises UserError where there is no run or no checkpoint."""
    folder = Path(folder)
    if not folder.is_dir():
        raise UserError(f"{folder}: no such folder; give the --workdir of a run")
    run = run_folder.read(folder)
    preset = presets.from_json(run["model"])
    clip = CLIP(preset.architecture, jnp.dtype(dtype))
    abstract = nn.meta.unbox(jax.eval_shape(clip.init, jax.random.key(0)))
    here = jax.sharding.SingleDeviceSharding(jax.devices()[0])
    abstract = jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=here), abstract)
    step, params = checkpoint.load_params(folder, abstract)
    tokenizer = run_folder.open_tokenizer(folder, preset.tokenizer, preset.architecture.text.context_length)
    return Model(run["model"]["name"], preset, clip, params, tokenizer, step)


def _as_list(images: Images) -> list:
    single = isinstance(images, str | Path | Image.Image) or (isinstance(images, np.ndarray) and images.ndim == 3)
    return [images] if single else list(images)


def _in_batches(encode, chunks: list) -> Float[np.ndarray, "n dim"]:
    """The results of all chunks after each other; a short one after a full one is filled up by repeating its rows."""
    out = []
    for chunk in chunks:
        wanted = len(chunks[0])
        filled = [chunk[i % len(chunk)] for i in range(wanted)]
        out.append(np.asarray(encode(np.stack(filled) if isinstance(chunk, np.ndarray) else filled))[: len(chunk)])
    if not out:
        raise UserError("nothing to encode: give at least one image or text")
    return np.concatenate(out)
