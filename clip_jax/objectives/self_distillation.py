"""Self-distillation and masked prediction: the image tower predicts what a slower copy of itself sees in a larger view.

    p(x) = softmax((teacher(x) - center) / teacher_temperature)                         (DINO, Caron et al. 2021)
    local  = mean over crops of -sum_k p(global)_k log softmax(student(crop) / temperature)_k             (SILC)
    masked = the same for each masked patch, which the student predicts from the patches it sees           (TIPS)
    loss   = settings.local * local + settings.masked * masked              (SigLIP 2, arXiv 2502.14786, section 2.2)

Teacher and student are heads on the image tower's embedding (``local``) and on its patches (``masked``), whose outputs
are similarities to prototypes. The teacher is an EMA of tower and heads, or of the heads alone (TIPSv2); it starts from
the student. All views are augmented crops; the other objectives see the image of the pair as before. The loss
weights, the number of crops and the mask ratio are SigLIP 2's; head sizes, temperatures and momenta are DINO's.
"""

import functools
from dataclasses import replace

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int, Key

from clip_jax.data import images
from clip_jax.data.augment import Augment, augment
from clip_jax.data.sources.sample import Sample
from clip_jax.data.tokenizers import Tokenizer
from clip_jax.data.views import Arrays, View
from clip_jax.devices.sharding import batch_shards
from clip_jax.errors import UserError
from clip_jax.losses import prototypes
from clip_jax.models import flops
from clip_jax.models.attention import xla
from clip_jax.models.clip import CLIP, Batch, Params
from clip_jax.models.prototype_head import HeadShape, PrototypeHead
from clip_jax.models.transformer import normal
from clip_jax.models.vit import ImageTower
from clip_jax.objectives.cost import Cost, Transfer, saved_bytes, traceable
from clip_jax.objectives.objective import Ema, MeshLike, Objective, ObjectiveSpec, Rows, Settings, Sums, row_weights
from clip_jax.presets import Preprocess

NAME = "self_distillation"
TERMS = ("local", "masked")
PASSES = 3
"""A forward and a backward pass, in forward passes."""


def make(settings: Settings, model: CLIP, preprocess: Preprocess, tokenizer: Tokenizer | None) -> Objective:
    """Raises UserError for a tower without patches, and for settings without a loss."""
    check(settings, model)
    used = terms(settings)

    def init(key: Key[Array, ""]) -> Params:
        return init_params(model, settings, key)

    def init_aux() -> dict[str, Array]:
        return {term: jnp.zeros(settings["prototypes"]) for term in used}

    def prepare(batch: Batch) -> Batch:
        return {f"{NAME}/weight": row_weights(len(batch["text"]))}

    def local(rows: Rows) -> tuple[Float[Array, ""], Sums]:
        batch = {name: preprocess.normalize(rows.batch[name]) for name in view_shapes(settings, model)}
        batch["weight"] = rows.batch[f"{NAME}/weight"]
        masked = mask_patches(rows.keys, settings, model)
        return distill(model, settings, rows.params, rows.ema[NAME], rows.aux, batch, masked)

    def update(aux: dict[str, Array], sums: Sums, embeddings: object) -> dict[str, Array]:
        momentum = settings["center_momentum"]
        return {term: momentum * center + (1 - momentum) * sums[f"{term}_center"] for term, center in aux.items()}

    def cost(*, batch_size: int, micro_batches: int, mesh: MeshLike, slices: int) -> Cost:
        return _cost(settings, model, batch_size, micro_batches, mesh)

    heads = tuple(f"objectives/{NAME}/{term}_head/*" for term in used)
    tower = ("image/*",) if settings["teacher"] == "model" else ()
    return Objective(
        views={NAME: view(settings, model, preprocess)},
        init=init,
        init_aux=init_aux,
        prepare=prepare,
        local=local,
        update=update,
        cost=cost,
        emas={NAME: Ema(settings["momentum"], (*tower, *heads))},
    )


def check(settings: Settings, model: CLIP) -> None:
    where, image = f"config.objectives.{NAME}", model.architecture.image
    if not isinstance(image, ImageTower):
        raise UserError(f"{where}: a ResNet has no patches; choose a vision transformer")
    if not terms(settings):
        raise UserError(f"{where}: local and masked are both 0: give one of them a weight, or {NAME} a weight of 0")
    for key in ("global_scale", "local_scale"):
        low, high = settings[key] if len(settings[key]) == 2 else (0, 0)
        if not 0 < low <= high <= 1:
            raise UserError(f"{where}: {key}={settings[key]}: two areas, 0 < smallest <= largest <= 1")
    if settings["jitter"] and (len(settings["jitter"]) != 4 or min(settings["jitter"]) < 0):
        raise UserError(f"{where}: jitter={settings['jitter']}: brightness, contrast, saturation and hue, or ()")
    if settings["local"] > 0 and settings["local_size"] < image.patch_size:
        raise UserError(f"{where}: local_size={settings['local_size']} is smaller than a patch ({image.patch_size})")
    if settings["masked"] > 0 and settings["targets"] == "masked" and not masked_patches(settings, model):
        raise UserError(f"{where}: mask_share={settings['mask_share']} masks no patch; targets=all needs none")


def terms(settings: Settings) -> tuple[str, ...]:
    return tuple(term for term in TERMS if settings[term] > 0)


# Views


def view_shapes(settings: Settings, model: CLIP) -> dict[str, tuple[int, ...]]:
    """The arrays of the crops: name -> shape for one example."""
    size, local, number = model.architecture.image.image_size, settings["local_size"], settings["local_crops"]
    shapes = {f"{NAME}/global": (size, size, 3)}
    return shapes | ({f"{NAME}/local": (number, local, local, 3)} if settings["local"] > 0 else {})


def view(settings: Settings, model: CLIP, preprocess: Preprocess) -> View:
    """One global crop and the local ones, of one decoded image, each with augmentations of its own."""
    shapes = view_shapes(settings, model)
    scales = {f"{NAME}/global": settings["global_scale"], f"{NAME}/local": settings["local_scale"]}
    how = Augment(0.5, tuple(settings["jitter"]), 0.8 if settings["jitter"] else 1.0, settings["gray"])
    # Scaled decoding keeps the pixels that the smallest crop needs.
    needed = max(int(np.ceil(shape[-2] / (scales[name][0] * 3 / 4) ** 0.5)) for name, shape in shapes.items())

    def fill(sample: Sample, rng: np.random.Generator, arrays: Arrays) -> None:
        image = np.asarray(images.decode(sample.image, min_size=needed, exif=preprocess.exif))
        for name, shape in shapes.items():
            for out in arrays[name].reshape(-1, *shape[-3:]):
                options = dict(scale=scales[name], interpolation=preprocess.interpolation)
                out[:] = augment(images.random_resized_crop(image, shape[-2], rng, **options), rng, how).pixels

    return View({name: (shape, np.dtype(np.uint8)) for name, shape in shapes.items()}, fill)


def masked_patches(settings: Settings, model: CLIP) -> int:
    """How many patches of an image are masked."""
    return round(settings["mask_share"] * model.architecture.image.grid**2) if settings["masked"] > 0 else 0


def mask_patches(keys: Key[Array, "batch"], settings: Settings, model: CLIP) -> Int[Array, "batch masked"] | None:
    """The indices of each image's masked patches, in random order; None if no patch is masked."""
    count, patches = masked_patches(settings, model), model.architecture.image.grid**2
    if not count:
        return None
    return jax.lax.top_k(jax.vmap(lambda key: jax.random.uniform(key, (patches,)))(keys), count)[1]


# Parameters and loss


def head_shape(term: str, settings: Settings, model: CLIP) -> HeadShape:
    """The local term's head is on the embedding, the masked term's on patches."""
    tower = model.architecture.image
    width = model.architecture.embed_dim if term == "local" and tower.projection else tower.width
    return HeadShape(width, settings["hidden"], settings["bottleneck"], settings["prototypes"])


def init_params(model: CLIP, settings: Settings, key: Key[Array, ""]) -> Params:
    """The heads and the embedding of masked patches, boxed with their logical axes."""
    anywhere = model.compute._replace(attend=xla, mesh=None)
    keys = dict(zip((*TERMS, "mask"), jax.random.split(key, 3), strict=True))
    params = {}
    for term in terms(settings):
        shape = head_shape(term, settings, model)
        head = PrototypeHead(shape, anywhere)
        params[f"{term}_head"] = head.init(keys[term], jnp.zeros((1, shape.width)))["params"]
    if masked_patches(settings, model):
        mask = normal(0.02)(keys["mask"], (model.architecture.image.width,), jnp.float32)
        params["mask_embedding"] = nn.LogicallyPartitioned(mask, ("embed",))
    return params


def distill(
    model: CLIP,
    settings: Settings,
    params: Params,
    ema: Params,
    centers: dict[str, Array],
    batch: dict[str, Array],
    masked: Int[Array, "batch masked"] | None,
) -> tuple[Float[Array, ""], Sums]:
    """The weighted sum of the terms over the normalized crops in ``batch``, and the sums for ``update`` and metrics."""
    own_params, image = params["objectives"][NAME], batch[f"{NAME}/global"]
    teacher = ema if settings["teacher"] == "model" else {"image": params["image"]} | ema
    embedding, patches = jax.lax.stop_gradient(model.image_features(teacher, image))
    total, sums = jnp.zeros(()), {}
    for term in terms(settings):
        if term == "local":
            crops = batch[f"{NAME}/local"]
            student = model.image_features(params, crops.reshape(-1, *crops.shape[2:]))[0]
            student, target = student.reshape(len(crops), 1, crops.shape[1], -1), embedding[:, None]
        else:
            hidden = None if masked is None else jnp.any(masked[..., None] == jnp.arange(patches.shape[1]), axis=1)
            mask_embedding = own_params.get("mask_embedding")
            student, target = model.image_features(params, image, hidden, mask_embedding)[1], patches
            if settings["targets"] == "masked":
                student, target = (jnp.take_along_axis(x, masked[..., None], axis=1) for x in (student, target))
            student = student[:, :, None]
        head = PrototypeHead(head_shape(term, settings, model), model.compute)
        student, student_kernel = head.apply({"params": own_params[f"{term}_head"]}, student)
        teacher_head = {"params": ema["objectives"][NAME][f"{term}_head"]}
        target, teacher_kernel = jax.lax.stop_gradient(head.apply(teacher_head, target))
        found = prototypes.cross_entropy(
            student,
            target,
            (student_kernel, teacher_kernel),
            centers[term],
            batch["weight"],
            temperature=settings["temperature"],
            teacher_temperature=settings["teacher_temperature"],
            mesh=model.compute.mesh,
        )
        total = total + settings[term] * found.loss
        sums |= {term: found.loss, f"{term}_entropy": found.entropy, f"{term}_center": found.logits}
    return total, sums


# Plan


def _cost(settings: Settings, model: CLIP, batch_size: int, micro_batches: int, mesh: MeshLike) -> Cost:
    """The teacher's forward pass over the global crop; the student's passes over it, masked, and over the local crops;
    the heads, and the logits over the prototypes, which the backward pass computes again."""
    tower, dim, compute = model.architecture.image, model.architecture.embed_dim, model.compute
    pairs, tensor = batch_size // batch_shards(mesh), mesh.shape["tensor"]

    def student(size: int) -> int:
        seen = replace(tower, image_size=size)
        repeated = flops.repeated(seen, compute.remat, fused=compute.attend is not xla)
        return PASSES * seen.forward_flops(dim) + repeated

    total, working = tower.forward_flops(dim), 0
    weights, uses = _tower_bytes(traceable(model)), 1
    for term in terms(settings):
        shape, patches = head_shape(term, settings, model), tower.grid**2
        if term == "local":
            targets, views, size = 1, settings["local_crops"], settings["local_size"]
        else:
            targets, views, size = patches, 1, tower.image_size
            targets = masked_patches(settings, model) if settings["targets"] == "masked" else patches
        total += views * student(size)
        total += targets * ((PASSES * views + 1) * shape.forward_flops() + (4 * views + 2) * shape.prototype_flops())
        chunk = prototypes.chunk_size(pairs // micro_batches * targets, views, shape.prototypes)
        logits = 4 * chunk * shape.prototypes * (2 * views + 3)
        kernels = 4 * 3 * shape.bottleneck * shape.prototypes // tensor
        working, uses = max(working, logits // tensor + kernels), uses + 3
    fsdp = mesh.shape["fsdp"]
    gathered = micro_batches * uses * weights // tensor * (fsdp - 1) // fsdp
    saved = _saved(traceable(model), tuple(settings.items()), pairs // micro_batches)
    transfers = (Transfer("image tower for further views", gathered),) if gathered else ()
    return Cost(flops=pairs * total // tensor, activations=saved, working=working, transfers=transfers)


@functools.lru_cache(maxsize=64)
def _tower_bytes(model: CLIP) -> int:
    """Bytes of the image tower's parameters in the compute type, as they travel along fsdp."""
    params = jax.eval_shape(model.init, jax.random.key(0))["image"]
    return sum(leaf.size for leaf in jax.tree.leaves(params)) * jnp.dtype(model.compute.dtype).itemsize


@functools.lru_cache(maxsize=64)
def _saved(model: CLIP, settings: tuple[tuple[str, object], ...], pairs: int) -> int:
    settings = dict(settings)
    params = nn.meta.unbox(jax.eval_shape(model.init, jax.random.key(0)))
    shapes = nn.meta.unbox(jax.eval_shape(lambda key: init_params(model, settings, key), jax.random.key(0)))
    params = {"image": params["image"], "objectives": {NAME: shapes}}
    centers = {term: jnp.zeros(settings["prototypes"]) for term in terms(settings)}

    def run(params: Params, rows: int) -> Array:
        crops = {name: jnp.zeros((rows, *shape)) for name, shape in view_shapes(settings, model).items()}
        masked = mask_patches(jax.random.split(jax.random.key(0), rows), settings, model)
        ema = jax.lax.stop_gradient(params)
        return distill(model, settings, params, ema, centers, crops | {"weight": jnp.ones(rows)}, masked)[0]

    return saved_bytes(run, params, pairs)


SPEC = ObjectiveSpec(
    make=make,
    defaults={
        "local": 1.0,  # weight of the local crops' loss (SigLIP 2: 1); 0: none
        "masked": 0.25,  # weight of the masked patches' loss (SigLIP 2: 0.25, TIPS: 2 beside a local one of 1); 0: none
        "mask_share": 0.5,  # share of the patches that are masked (TIPSv2: 0.75)
        "targets": "masked",  # patches in the loss; all: also those that are not masked (iBOT++)
        "teacher": "model",  # an EMA of the image tower and the heads; head: of the heads alone (TIPSv2)
        "momentum": 0.996,  # decay of that EMA; constant, so that the teacher keeps learning from the texts (SILC)
        "local_crops": 8,
        "local_size": 96,  # pixels
        "local_scale": (0.05, 0.4),  # area of a local crop, as a fraction of the image
        "global_scale": (0.4, 1.0),  # area of the global crop
        "jitter": (0.4, 0.4, 0.2, 0.1),  # brightness, contrast, saturation, hue of 0.8 of the crops (DINO); (): none
        "gray": 0.2,  # share of the crops without colors (DINO)
        "prototypes": 32_768,
        "hidden": 2048,  # width of the heads
        "bottleneck": 256,  # width before the prototypes
        "temperature": 0.1,  # the student's
        "teacher_temperature": 0.04,
        "center_momentum": 0.9,
    },
    choices={"targets": ("masked", "all"), "teacher": ("model", "head")},
    ranges={
        "local": (0, 1000),
        "masked": (0, 1000),
        "mask_share": (0, 1),
        "gray": (0, 1),
        "momentum": (0, 1),
        "local_crops": (1, 64),
        "local_size": (1, 10_000),
        "prototypes": (2, 2**20),
        "hidden": (1, 2**16),
        "bottleneck": (1, 2**16),
        "temperature": (1e-3, 10),
        "teacher_temperature": (1e-3, 10),
        "center_momentum": (0, 1),
    },
)
