"""``load``: a run folder or foreign weights -> a ``Model`` that embeds and compares images and texts."""

import dataclasses
import re
from collections.abc import Callable, Sequence
from functools import cached_property, partial
from pathlib import Path
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh
from jaxtyping import Array, Float, Int

from clip_jax import inputs, presets
from clip_jax.batching import BATCH, encode_in_batches
from clip_jax.data import images as image_files
from clip_jax.data.templates import check as check_templates
from clip_jax.data.tokenizers import Tokenizer, stored
from clip_jax.devices.sharding import batch_shards
from clip_jax.errors import UserError, nearest
from clip_jax.evaluation import prompts, zero_shot
from clip_jax.inputs import Images, OneImage
from clip_jax.interop import folders, foreign, tokenizer_files
from clip_jax.models.clip import CLIP, unit
from clip_jax.models.compute import Compute
from clip_jax.models.generate import Decoding, generate
from clip_jax.presets import Preset
from clip_jax.storage import buckets, checkpoints, run_folder


@dataclasses.dataclass(frozen=True)
class Model:
    """Parameters with everything needed to use them. Embeddings are float32[n, D], of unit length by default."""

    name: str
    preset: Preset
    clip: CLIP
    params: Any
    open_tokenizer: Callable[[], Tokenizer]
    """Called for the first text, so that a model without a vocabulary still encodes images."""
    step: int
    """The training step of the checkpoint; 0 for foreign weights."""
    batch_stats: Any = dataclasses.field(default_factory=dict)
    """The running statistics of batch norm; a ViT has none."""

    def __repr__(self) -> str:
        return f"clip_jax.Model({self.name!r}, image {self.image_size} px, {self.embed_dim} features, step {self.step})"

    @cached_property
    def tokenizer(self) -> Tokenizer:
        return self.open_tokenizer()

    @property
    def image_size(self) -> int:
        """Height and width of the pixels that ``encode_pixels`` takes."""
        return self.preset.architecture.image.image_size

    @property
    def embed_dim(self) -> int:
        return self.preset.architecture.embed_dim

    @property
    def scale(self) -> float:
        """``exp(logit_scale)``, the factor of cosines before a softmax."""
        self._need("image", "text")
        return float(jnp.exp(self.params["logit_scale"]))

    def preprocess(self, images: Images) -> Float[np.ndarray, "n height width 3"]:
        """Paths, bytes, open files, PIL images or uint8[H, W, 3] (one or several) -> normalized pixels.

        Raises UserError.
        """
        pixels = np.stack([self._pixels(image) for image in inputs.images(images)])
        return np.asarray(self.preset.preprocess.normalize(pixels))

    def tokenize(self, texts: str | Sequence[str]) -> Int[np.ndarray, "n length"]:
        """Texts (one or several) -> token ids."""
        return self.tokenizer(inputs.texts(texts))

    def encode_image(
        self,
        images: Images,
        *,
        normalize: bool = True,
        return_tokens: int | None = None,
        batch_size: int = BATCH,
        workers: int | None = None,
        progress: bool | None = None,
    ) -> Float[np.ndarray, "n dim"] | Float[np.ndarray, "n tokens width"]:
        """Embeddings of paths, PIL images or uint8 arrays, ``batch_size`` at a time.

        ``workers`` threads (None: one per core) decode ahead of the device. The last batch is padded to a power of two,
        which limits the number of compilations. The number of images and the batch size change an embedding only by
        rounding. ``progress``: whether to show a bar on standard error; None: for long lists on a terminal. Raises
        UserError for an unusable image.

        ``return_tokens``: the block after which all tokens are returned instead of an embedding, counted from 1, or
        from the end: -1 is the last block. LLaVA uses
        ``load("ViT-L/14-336-quickgelu", weights=...).encode_image(image, return_tokens=-2)[:, 1:]``.
        """
        encode = partial(self.encode_pixels, normalize=normalize, return_tokens=return_tokens)
        return encode_in_batches(
            inputs.images(images),
            self._pixels,
            lambda pixels: encode(self._normalize(pixels)),
            batch_size=batch_size,
            workers=workers,
            progress=progress,
        )

    def encode_text(
        self,
        texts: str | Sequence[str],
        *,
        normalize: bool = True,
        return_tokens: int | None = None,
        batch_size: int = BATCH,
        progress: bool | None = None,
    ) -> Float[np.ndarray, "n dim"] | Float[np.ndarray, "n length width"]:
        """Embeddings of texts; all arguments as in ``encode_image``.

        Stable Diffusion 1 uses ``encode_text(prompts, return_tokens=-1)`` followed by the final norm
        (``model.clip.text_tokens(..., normalize=True)``); Stable Diffusion XL uses -2 without the norm.
        """
        encode = partial(self.encode_tokens, normalize=normalize, return_tokens=return_tokens)
        return encode_in_batches(self.tokenize(texts), None, encode, batch_size=batch_size, progress=progress)

    def encode_pixels(
        self, pixels: Float[Array, "n height width 3"], *, normalize: bool = True, return_tokens: int | None = None
    ) -> Float[Array, "n dim"] | Float[Array, "n tokens width"]:
        """Embeddings of normalized pixels; jitted, and differentiable with respect to them. Raises UserError."""
        self._need("image")
        pixels = inputs.pixels(pixels, self.image_size, self.preset.preprocess)
        rows = self._rows(pixels)
        if return_tokens is not None:
            return self._image_tokens(self.params, rows, return_tokens)[: len(pixels)]
        encoded = self._encode_pixels(self.params, rows, self.batch_stats)[: len(pixels)]
        return unit(encoded) if normalize else encoded

    def encode_tokens(
        self, tokens: Int[Array, "n length"], *, normalize: bool = True, return_tokens: int | None = None
    ) -> Float[Array, "n dim"] | Float[Array, "n length width"]:
        """Embeddings of token ids; jitted. Raises UserError."""
        self._need("text")
        tokens = inputs.tokens(tokens, self.preset.architecture.text)
        rows = self._rows(tokens)
        if return_tokens is not None:
            return self._text_tokens(self.params, rows, return_tokens)[: len(tokens)]
        encoded = self._encode_tokens(self.params, rows)[: len(tokens)]
        return unit(encoded) if normalize else encoded

    def _need(self, *towers: str) -> None:
        """Raises UserError if the weights do not contain these towers."""
        if missing := [tower for tower in towers if tower not in self.params]:
            raise UserError(f"{self.name}: these weights have no {missing[0]} tower; load those of the whole model")

    def _rows(self, x: Array) -> Array:
        """Padded to a multiple of the devices that split a batch, where the model is on a mesh."""
        mesh = self.clip.compute.mesh
        if mesh is None or not -len(x) % batch_shards(mesh):
            return x
        return jnp.pad(x, ((0, -len(x) % batch_shards(mesh)), *((0, 0),) * (x.ndim - 1)), mode="edge")

    def similarity(self, a: Float[Array, "n dim"], b: Float[Array, "m dim"]) -> Float[Array, "n m"]:
        """Cosines between any embeddings: image-text, text-text, image-image."""
        a, b = jnp.atleast_2d(a), jnp.atleast_2d(b)
        if a.ndim != 2 or b.ndim != 2 or a.shape[1] != b.shape[1]:
            raise UserError(f"embeddings of shapes {list(a.shape)} and {list(b.shape)} have no cosines")
        return unit(a) @ unit(b).T

    def classify(
        self, images: Images, labels: Sequence[str], templates: Sequence[str] = ("{}",)
    ) -> Float[np.ndarray, "n labels"]:
        """Probabilities of the labels for each image: a softmax over scaled cosines (Radford et al. 2021, 3.1.2).

        ``templates`` are prompts with {} for the label; their embeddings are averaged. SigLIP's models read labels and
        templates without capitals and punctuation, as they were evaluated (``evaluation/prompts``); UserError where
        nothing is left of a label, or two labels become one.
        """
        if isinstance(labels, str):
            raise UserError("labels: a list of texts, not one text")
        check_templates("templates", templates)
        given = prompts.Prompts(tuple(inputs.texts(labels, "labels")), tuple(templates))
        wanted = prompts.for_model(given, self.preset.tokenizer)
        prompts.check_different(given, wanted)
        classes = zero_shot.classifier(wanted.class_names, wanted.templates, self.encode_text)
        return np.asarray(jax.nn.softmax(self.scale * self.encode_image(images) @ classes.T, axis=-1))

    def generate(
        self,
        images: Images,
        *,
        method: str = "beam",
        max_tokens: int = 30,
        min_tokens: int = 0,
        beams: int = 6,
        length_penalty: float = 1.0,
        top_p: float = 0.9,
        temperature: float = 1.0,
        seed: int = 0,
        batch_size: int = BATCH,
        workers: int | None = None,
        progress: bool | None = None,
    ) -> list[str]:
        """A caption for each image, from a model with a decoder; ``models.generate.Decoding`` describes the arguments.

        ``method`` is ``greedy``, ``top_p`` (random, from ``seed``) or ``beam``. Other arguments as in ``encode_image``.
        Raises UserError.
        """
        decoding = self._decoding(method, max_tokens, min_tokens, beams, length_penalty, top_p, temperature)
        key = jax.random.key(seed)
        rows = encode_in_batches(
            inputs.images(images),
            self._pixels,
            lambda pixels: self._generate(self.params, self._rows(self._normalize(pixels)), decoding, key)[
                : len(pixels)
            ],
            batch_size=batch_size,
            workers=workers,
            progress=progress,
        )
        first = 0 if self.preset.architecture.decoder.form == "coca" else 1
        return [self.tokenizer.decode(row[first:]) for row in rows]

    def _decoding(self, method: str, max_tokens: int, min_tokens: int, beams: int, *more: float) -> Decoding:
        """Checks the arguments of ``generate``."""
        self._need("image", "text")
        decoder = self.preset.architecture.decoder
        if decoder is None:
            raise UserError(f"{self.name}: has no decoder; models trained with objectives.captioning and CoCa have one")
        decoding = Decoding(method, min(max_tokens, decoder.length), min_tokens, beams, *more)
        if method not in ("greedy", "top_p", "beam"):
            raise UserError(f"method={method!r}: greedy, top_p or beam")
        for name in ("max_tokens", "beams"):
            if getattr(decoding, name) < 1:
                raise UserError(f"{name}={getattr(decoding, name)} must be at least 1")
        if not 0 < decoding.top_p <= 1 or decoding.temperature <= 0:
            raise UserError(f"top_p={decoding.top_p}, temperature={decoding.temperature}: above 0, and top_p at most 1")
        if decoder.form == "coca" and self.tokenizer.start_id is None:
            raise UserError(f"{self.name}: its tokenizer has no start token, with which a caption begins")
        return decoding

    @cached_property
    def _generate(self):
        tokenizer, coca = self.tokenizer, self.preset.architecture.decoder.form == "coca"

        def caption(params: Any, pixels: Array, decoding: Decoding, key: Array) -> Array:
            patches = self.clip.patches(params, pixels, self.batch_stats)
            return generate(
                self.clip,
                params,
                patches,
                decoding,
                start_id=tokenizer.start_id if coca else 0,
                end_id=tokenizer.end_id,
                vocab_size=tokenizer.vocab_size,
                key=key,
            )

        return jax.jit(caption, static_argnums=2)

    @cached_property
    def _normalize(self):
        return jax.jit(self.preset.preprocess.normalize)

    @cached_property
    def _encode_pixels(self):
        return jax.jit(self.clip.encode_image)

    @cached_property
    def _encode_tokens(self):
        return jax.jit(self.clip.encode_text)

    @cached_property
    def _image_tokens(self):
        return jax.jit(self.clip.image_tokens, static_argnums=2)

    @cached_property
    def _text_tokens(self):
        return jax.jit(self.clip.text_tokens, static_argnums=2)

    def _pixels(self, image: OneImage) -> np.ndarray:
        data, name = inputs.image(image)
        how = self.preset.preprocess
        try:
            return image_files.resize_and_crop(
                data, self.image_size, resize=how.resize, interpolation=how.interpolation, exif=how.exif
            )
        except image_files.BadImageError as error:
            raise UserError(f"{name}: {error}") from error


def load(
    source: str | Path,
    weights: str | Path | None = None,
    *,
    image_size: int | None = None,
    context_length: int | None = None,
    mesh: Mesh | None = None,
    dtype: str = "float32",
    tokenizer: str | Path | Tokenizer | None = None,
    step: int | None = None,
) -> Model:
    """A run's folder, an OpenCLIP or Hugging Face folder, or ``hf://org/name``; or a model's name with its ``weights``.

    ``load("runs/demo")`` loads the newest checkpoint, ``step=300`` or ``load("runs/demo@300")`` another that the run
    kept; ``load("ViT-B/32", weights="ViT-B-32.safetensors")`` a file or folder in any library's layout. Folders may be
    in a bucket, ``gs://`` or ``s3://``. Foreign weights are adapted to another ``image_size`` or ``context_length``
    by resizing their position embeddings, which is logged. With a ``mesh`` the parameters are sharded over it and
    batches are split; without a mesh, everything is on one device. ``tokenizer`` is the one that the model was
    trained with, or its file or folder, for a model whose folder has none; a tokenizer that does not fit the tower
    is rejected. Raises UserError. Pickles are not opened (``clip-jax import`` converts them).
    """
    if weights is not None:
        name = str(source)
        found = foreign.open_weights(folders.local(weights), name, presets.preset(name))
        return _foreign(found, image_size, context_length, mesh, dtype, tokenizer)
    at = re.fullmatch(r"(?!hf://)(.+)@(\d+)", str(source))
    if step is None and at and not Path(source).expanduser().exists():
        source, step = at[1], int(at[2])
    folder = folders.local(source)
    if folder.is_file():
        raise UserError(f"{folder}: does not say which model it is: load(NAME, weights={str(folder)!r})")
    if not folder.is_dir():
        raise UserError(_not_there(str(source)))
    if run_folder.is_run(folder):
        if image_size or context_length:
            raise UserError(f"{folder}: a run is loaded at its own size; image_size, context_length are for weights")
        return _run(folder, source if buckets.is_bucket(source) else folder, mesh, dtype, tokenizer, step)
    if step is not None:
        raise UserError(f"{folder}: a folder of weights has no steps; step= is for runs")
    return _foreign(foreign.open_folder(folder), image_size, context_length, mesh, dtype, tokenizer)


def _not_there(source: str) -> str:
    """Why there is no folder of this name, and what was probably meant."""
    if page := re.match(r"https?://(?:www\.)?(?:huggingface\.co|hf\.co)/([\w.-]+/[\w.-]+)", source):
        return f"{source}: a web page; load its repository as {folders.HUB}{page[1]}"
    if source.replace("/", "-") in {name.replace("/", "-") for name in presets.list_models()}:
        return f"{source}: a name says the architecture alone; load({source!r}, weights=PATH_OR_HF)"
    if re.fullmatch(r"[\w.-]+/[\w.-]+", source):
        return (
            f"{source}: no such folder; the repository of that name on the Hugging Face hub is "
            f"{folders.HUB}{source}{nearest(source, presets.list_models())}"
        )
    return f"{source}: no such folder; give the --workdir of a run, or a folder of weights"


def _run(
    folder: Path,
    checkpoints_in: str | Path,
    mesh: Mesh | None,
    dtype: str,
    tokenizer: str | Path | Tokenizer | None,
    step: int | None,
) -> Model:
    run = run_folder.read(folder)
    step = checkpoints.need_step(checkpoints_in, step)
    # A run of several phases has a model for each: the one that trained the checkpoint's step.
    models = [phase for phase in run.get("phases", ()) if phase["start"] < step]
    preset = presets.from_json(models[-1] if models else run["model"])
    clip = CLIP(preset.architecture, Compute(dtype=jnp.dtype(dtype), mesh=mesh))
    abstract = nn.meta.unbox(jax.eval_shape(clip.init, jax.random.key(0)))
    abstract = jax.tree.map(
        lambda leaf, where: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=where),
        abstract,
        foreign.shardings(preset.architecture, mesh),
    )
    if tokenizer is None:
        length = preset.architecture.text.context_length
        open_tokenizer = partial(stored.open_tokenizer, folder, preset.tokenizer, length)
    else:
        open_tokenizer = _given(tokenizer_files.given(tokenizer, preset.tokenizer, preset.architecture.text))
    params, batch_stats = checkpoints.load_model(checkpoints_in, step, abstract, jax.eval_shape(clip.init_batch_stats))
    return Model(run["model"]["name"], preset, clip, params, open_tokenizer, step, batch_stats)


def _foreign(
    found: foreign.Foreign,
    image_size: int | None,
    context_length: int | None,
    mesh: Mesh | None,
    dtype: str,
    tokenizer: str | Path | Tokenizer | None,
) -> Model:
    preset = foreign.resized(found.preset, image_size, context_length)
    open_tokenizer = partial(foreign.open_tokenizer, found._replace(preset=preset), tokenizer)
    if tokenizer is not None:
        open_tokenizer = _given(open_tokenizer())
    params, batch_stats = foreign.read_params(found, foreign.onto_devices(preset.architecture, mesh))
    clip = CLIP(preset.architecture, Compute(dtype=jnp.dtype(dtype), mesh=mesh))
    return Model(found.name, preset, clip, params, open_tokenizer, step=0, batch_stats=batch_stats)


def _given(tokenizer: Tokenizer) -> Callable[[], Tokenizer]:
    """Returns a tokenizer that was opened and checked before the weights were read."""
    return lambda: tokenizer
