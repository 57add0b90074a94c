"""Zero-shot segmentation from patches: the last block's values instead of its attention (MaskCLIP, Zhou et al. 2022).

CLIP's last block mixes the patches into the class token; its value path keeps them apart, and norm, projection and a
cosine with the texts then classify every patch without training: ``x + out(value(norm(x)))``, then the block's MLP,
the final norm and the projection. For an attention pool (SigLIP) each patch is pooled alone: ``out(value(patch))`` and
the pool's MLP. Cosines are resized to the picture bilinearly; the nearest class is the pixel's.

``mean_iou``: intersection over union of each class over all pixels of the set, averaged over the classes that occur
in the masks or in the predictions. Pixels of the value ``IGNORE`` are left out. A pixel that is equally near to several
classes counts as an equal share of each, as in ``zero_shot``: a constant model is right in 1/C of the pixels, and its
``mean_iou`` is at most 1/C; argmax would give it the pixels of the first class, which may be most of a set.

Traps: whole images at the model's own size, as here, score several points below sliding windows at a larger one, and
"background" as a class name describes nothing: published numbers leave it out or threshold it.
"""

from collections.abc import Callable
from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int, UInt8

from clip_jax.data.images import BadImageError, resize_and_crop
from clip_jax.data.sources.sample import BadSampleError
from clip_jax.data.stream import read
from clip_jax.errors import UserError
from clip_jax.evaluation import prompts
from clip_jax.evaluation.masks import IGNORE
from clip_jax.evaluation.ranking import TIE
from clip_jax.evaluation.subject import Ensemble, Result, Subject, Task
from clip_jax.models.clip import CLIP, Params, unit
from clip_jax.models.norm import LayerNorm
from clip_jax.models.transformer import MLP, Stack, image_block_init
from clip_jax.models.vit import rotary_angles


def patch_embeddings(
    model: CLIP, params: Params, pixels: Float[Array, "batch height width 3"]
) -> Float[Array, "batch rows columns dim"]:
    """Unit embeddings of the patches of normalized pixels. Raises UserError for a tower without patches."""
    tower = model.architecture.image
    if tower.has_batch_norm:
        raise UserError("patches have embeddings in vision transformers only; this image tower is a ResNet")
    image_params = params["image"]
    rows, columns = (side // tower.patch_size for side in pixels.shape[1:3])
    inits, compute = image_block_init(tower.width, tower.mlp_width), model.compute
    norm = LayerNorm(compute, tower.norm_epsilon)
    if tower.pooling == "attention":
        tokens = model.image_tokens(params, pixels)[:, int(tower.class_token) :]
        tokens = norm.apply({"params": image_params["norm_post"]}, tokens) if tower.norm_before_pooling else tokens
        pool = image_params["attention_pooling"]
        value = jnp.einsum("...w,whd->...hd", tokens, pool["key_value"][:, 1]) + pool["key_value_bias"][1]
        pooled = jnp.einsum("...hd,hdw->...w", value, pool["out"]) + pool["out_bias"]
        normed = norm.apply({"params": pool["norm"]}, pooled)
        x = pooled + MLP(tower.block, inits, compute).apply({"params": pool["mlp"]}, normed)
        x = x if tower.norm_before_pooling else norm.apply({"params": image_params["norm_post"]}, x)
    else:
        before = model.image_tokens(params, pixels, -2) if tower.layers > 1 else _embedded(model, params, pixels)
        last = jax.tree.map(lambda leaf: leaf[-1:], image_params["transformer"])
        rotary = None
        if tower.rotary_grid is not None:
            head_dim = tower.width // tower.heads
            rotary = rotary_angles(rows, columns, head_dim, tower.rotary_grid, tower.class_token)
        values_only = compute._replace(attend=lambda query, key, value, *, causal, mask: value)
        x = Stack(1, tower.block, inits, values_only).apply({"params": last}, before, rotary)
        x = norm.apply({"params": image_params["norm_post"]}, x[:, int(tower.class_token) :])
    if tower.projection:
        x = x @ image_params["projection"]
        x = x + image_params["projection_bias"] if tower.projection_bias else x
    return unit(x).reshape(len(pixels), rows, columns, -1)


def _embedded(model: CLIP, params: Params, pixels: Array) -> Array:
    """The tokens before the only block: a block that adds nothing passes them on."""
    nothing = jax.tree.map(jnp.zeros_like, params["image"]["transformer"])
    unchanged = params | {"image": params["image"] | {"transformer": nothing}}
    return model.image_tokens(unchanged, pixels)


def upsample(maps: Float[np.ndarray, "rows columns classes"], height: int, width: int) -> Float[np.ndarray, "h w c"]:
    """Maps of patches, resized to pixels bilinearly."""
    shape = (height, width, maps.shape[-1])
    return np.asarray(jax.image.resize(jnp.asarray(maps, jnp.float32), shape, "bilinear"))


def confusion(
    maps: Float[np.ndarray, "height width classes"], mask: Int[np.ndarray, "height width"]
) -> Float[np.ndarray, "classes classes"]:
    """Pixels by their class in the mask (rows) and the nearest in maps of cosines; under ties, a share of each.

    Raises ValueError for a mask of other classes.
    """
    classes = maps.shape[2]
    counts = np.zeros((classes, classes))
    for label in np.unique(mask[mask != IGNORE]).tolist():
        if not 0 <= label < classes:
            raise ValueError(f"a mask with class {label}; there are {classes}, and {IGNORE} is ignored")
        cosines = maps[mask == label]
        nearest = cosines >= cosines.max(axis=1, keepdims=True) - TIE
        counts[label] = np.sum(nearest / nearest.sum(axis=1, keepdims=True), axis=0)
    return counts


def mean_iou(counts: Float[np.ndarray, "classes classes"]) -> tuple[float | None, list[float | None]]:
    """(the mean, each class's; None for a class that occurs nowhere) from the sum of ``confusion`` over a set."""
    both = np.diag(counts)
    union = counts.sum(axis=0) + counts.sum(axis=1) - both
    each = [float(b / u) if u else None for b, u in zip(both.tolist(), union.tolist(), strict=True)]
    there = [value for value in each if value is not None]
    return (float(np.mean(there)) if there else None), each


def protocol(task: Task, models: Ensemble) -> Result:
    """``mean_iou`` and the share of right pixels on a source with masks; an ensemble averages maps of cosines."""
    counts = np.zeros((len(task.source.class_names),) * 2)
    hits, skipped, equal = [], 0, True
    makers = [(map_maker(model), model.classifier(task.prompts), share) for model, share in models]
    for index in range(len(task.source)):
        try:
            mask, image = task.source.mask(index), read(task.source, index).image
            maps = sum(share * upsample(make(image) @ classes.T, *mask.shape) for make, classes, share in makers)
            found = confusion(maps, mask)
        except (BadSampleError, BadImageError):
            skipped += 1
            continue
        except ValueError as error:
            raise UserError(f"{task.source.name}, image {index}: {error}") from error
        counts += found
        equal &= bool(np.ptp(maps, axis=2).max() <= TIE)
        hits.append(np.diag(found).sum() / max(1, found.sum()))
    if not hits:
        raise UserError(f"{task.source.name}: none of {len(task.source)} images can be used")
    mean, each = mean_iou(counts)
    metrics = {"mean_iou": mean, "pixel_accuracy": float(np.trace(counts) / max(1, counts.sum()))}
    named = sorted((v, name) for v, name in zip(each, task.source.class_names, strict=True) if v is not None)
    details = {"all_equal": equal, "iou": [[name, value] for value, name in named]}
    wanted = prompts.for_model(task.prompts, models[0][0].tokenizer).fingerprint
    return Result(metrics, "mean_iou", len(hits), skipped, wanted, {"pixels": np.array(hits)}, {}, details)


def map_maker(subject: Subject) -> Callable[[bytes], Float[np.ndarray, "rows columns dim"]]:
    """From an image to the unit embeddings of its patches; the image is squashed, so that they cover all of it.

    What it returns raises UserError if they are not finite.
    """
    embedder, how = subject.embedder, subject.embedder.preprocess

    @jax.jit
    def encode(params: Params, pixels: UInt8[Array, "batch height width 3"]) -> Array:
        return patch_embeddings(model, params, how.normalize(pixels))

    # One image at a time: on a mesh its one row could not be split.
    model = replace(embedder.model, compute=embedder.model.compute._replace(mesh=None))

    def make(image: bytes) -> Float[np.ndarray, "rows columns dim"]:
        pixels = resize_and_crop(
            image, embedder.image_size, resize="squash", interpolation=how.interpolation, exif=how.exif
        )
        found = np.asarray(encode(subject.weights.params, pixels[None]))[0]
        subject.check("an image", patches=found.reshape(-1, found.shape[-1]))
        return found

    return make
