"""Distillation: the student's logits over the global batch, or its embeddings, follow those of larger models.

    logits:   mean over rows and columns of -sum_j softmax(teacher's logits)_j log softmax(student's logits)_j
    cosine:   mean over pairs and towers of 1 - cos(P student's embedding, teacher's embedding)
    mse:      mean over pairs and towers of |P student's unit embedding - teacher's unit embedding|^2

The first is OpenCLIP's DistillClipLoss; each model has its own scale, and only logits meet, so that widths may differ.
The embeddings of another width are compared after a learned projection P (Yang et al. 2023, CLIP-KD, section 3). Of
several teachers the mean is taken: for the logits that is the cross-entropy to the mean of their probabilities
(MobileCLIP, Vasu et al. 2024, equation 2).

A teacher is in the step, where it embeds the student's pixels and tokens: both need the same image size, context
length and vocabulary. It is a constant of the step, sharded as parameters are: no gradient, no moments, not in the
checkpoints. Or its embeddings are stored for known crops (``data/reinforced.py``): then nothing has to match.
"""

from collections.abc import Callable, Sequence

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax.sharding import Mesh
from jaxtyping import Array, Float, Key

from clip_jax.data import reinforced
from clip_jax.data.tokenizers import Tokenizer
from clip_jax.devices.sharding import batch_shards
from clip_jax.errors import UserError
from clip_jax.losses.distillation import Both, distillation
from clip_jax.losses.mesh_grid import grid_rows
from clip_jax.models import flops
from clip_jax.models.clip import CLIP, Batch, Params, unit
from clip_jax.objectives.contrastive import FLOAT32, LOGITS_BYTES, RING_TRIPS
from clip_jax.objectives.cost import Cost, Transfer, crossing
from clip_jax.objectives.objective import Embeddings, MeshLike, Metrics, Objective, ObjectiveSpec, Rows, Settings
from clip_jax.presets import Preprocess, Preset, preset

NAME = "distillation"
SIDES = ("image", "text")
Targets = list[tuple[Float[Array, "batch dim"], Float[Array, "batch dim"]]]
"""For each teacher, the image embeddings times its scale, and the text embeddings."""


def make(settings: Settings, model: CLIP, preprocess: Preprocess, tokenizer: Tokenizer | None) -> Objective:
    if settings["stored"]:
        if settings["teacher"] or settings["teacher_weights"]:
            raise UserError("config.objectives.distillation: stored embeddings, or a teacher in the step, not both")
        return from_stored(reinforced.open_store(settings["stored"]), settings, model, preprocess, tokenizer)
    names, weights = (
        [part.strip() for part in settings[name].split(",") if part.strip()] for name in ("teacher", "teacher_weights")
    )
    if not names or len(names) != len(weights):
        raise UserError(
            "config.objectives.distillation: teacher is a model's name, such as ViT-L/14, and teacher_weights its "
            "weights: a folder, a file or hf://org/name; of several teachers, as many of each, separated by commas"
        )
    made = from_teachers([preset(name) for name in names], settings, model, preprocess)
    return made._replace(teachers=tuple(zip(names, weights, strict=True)))


def from_teachers(teachers: Sequence[Preset], settings: Settings, student: CLIP, preprocess: Preprocess) -> Objective:
    """The objective for architectures that run in the step."""
    for teacher in teachers:
        check_inputs("config.objectives.distillation.teacher", teacher, student)
    models = [CLIP(teacher.architecture, student.compute) for teacher in teachers]

    def targets(rows: Rows) -> Targets:
        found = []
        for number, (teacher, model) in enumerate(zip(teachers, models, strict=True)):
            params, batch_stats = (rows.constants[str(number)][name] for name in ("params", "batch_stats"))
            pixels = normalized_as(teacher, rows.batch["image"], preprocess)
            image = jnp.exp(params["logit_scale"]) * unit(model.encode_image(params, pixels, batch_stats))
            found.append((image, unit(model.encode_text(params, rows.batch["text"]))))
        return found

    def abstract_constants() -> Params:
        found = {}
        for number, model in enumerate(models):
            params = jax.eval_shape(model.init, jax.random.key(0))
            params = {name: params[name] for name in (*SIDES, "logit_scale")}
            found[str(number)] = {"params": params, "batch_stats": jax.eval_shape(model.init_batch_stats)}
        return found

    forward = sum(sum(flops.forward(model.architecture).values()) for model in models)
    widths = [model.architecture.embed_dim for model in models]
    return _objective(targets, widths, forward, settings, student)._replace(abstract_constants=abstract_constants)


def from_stored(
    store: reinforced.Store, settings: Settings, student: CLIP, preprocess: Preprocess, tokenizer: Tokenizer | None
) -> Objective:
    """The objective for stored embeddings, with the views that they are of."""
    widths = [width for width, _ in store.teachers]

    def targets(rows: Rows) -> Targets:
        found, start = [], 0
        for width, scale in store.teachers:
            image, text = (unit(rows.batch[f"teacher_{side}"][:, start : start + width]) for side in SIDES)
            found.append((scale * image, text))
            start += width
        return found

    architecture = student.architecture
    views = reinforced.views(
        store,
        image_size=architecture.image.image_size,
        context_length=architecture.text.context_length,
        tokenizer=tokenizer,
        interpolation=preprocess.interpolation,
    )
    return _objective(targets, widths, 0, settings, student)._replace(
        views=views, constants_fingerprint=store.fingerprint, source_fingerprint=store.manifest["source"]
    )


def _objective(
    targets: Callable[[Rows], Targets], widths: Sequence[int], forward_flops: int, settings: Settings, student: CLIP
) -> Objective:
    dtype, dim = student.compute.dtype, student.architecture.embed_dim
    projected = [number for number, width in enumerate(widths) if width != dim and settings["features"] > 0]

    def init(key: Key[Array, ""]) -> Params:
        found = {}
        for number in projected:
            for side in SIDES:
                key, subkey = jax.random.split(key)
                kernel = dim**-0.5 * jax.random.normal(subkey, (dim, widths[number]), jnp.float32)
                found[f"{side}_{number}"] = {"projection": nn.LogicallyPartitioned(kernel, (None, None))}
        return found

    def embed(rows: Rows) -> Embeddings:
        found = {
            f"teacher_{side}_{number}": vectors
            for number, both in enumerate(jax.lax.stop_gradient(targets(rows)))
            for side, vectors in zip(SIDES, both, strict=True)
        }
        return {"image": rows.outputs.image, "text": rows.outputs.text} | found

    def across(params: Params, embeddings: Embeddings, batch: Batch, mesh: Mesh) -> tuple[Float[Array, ""], Metrics]:
        logits = features = jnp.zeros(())
        for number in range(len(widths)):
            teacher = {side: embeddings[f"teacher_{side}_{number}"] for side in SIDES}
            if settings["logits"] > 0:
                image, text = (Both(embeddings[side].astype(dtype), teacher[side].astype(dtype)) for side in SIDES)
                logits += distillation(image, text, jnp.exp(params["logit_scale"]), mesh=mesh) / len(widths)
            for side in SIDES if settings["features"] > 0 else ():
                ours = embeddings[side]
                if number in projected:
                    ours = ours @ params["objectives"][NAME][f"{side}_{number}"]["projection"]
                features += feature_loss(settings["feature_loss"], ours, unit(teacher[side])) / (2 * len(widths))
        metrics = {} if not settings["features"] else {f"{NAME}/features": features}
        return settings["logits"] * logits + settings["features"] * features, metrics

    def cost(*, batch_size: int, micro_batches: int, mesh: MeshLike, slices: int) -> Cost:
        teachers = widths if settings["logits"] > 0 else ()
        costs = [_cost(width, student, batch_size, mesh, slices) for width in teachers]
        pairs = batch_size // batch_shards(mesh)
        projections = 3 * 2 * 2 * pairs * dim * sum(widths[number] for number in projected)
        return Cost(
            flops=sum(cost.flops for cost in costs) + pairs * forward_flops // mesh.shape["tensor"] + projections,
            across=sum(cost.across for cost in costs) + 4 * FLOAT32 * pairs * sum(widths),
            transfers=tuple(transfer for cost in costs for transfer in cost.transfers),
        )

    return Objective(init=init, embed=embed, across=across, cost=cost)


def feature_loss(name: str, ours: Float[Array, "batch dim"], theirs: Float[Array, "batch dim"]) -> Float[Array, ""]:
    """The mean over the batch of the named distance to unit embeddings."""
    if name == "cosine":
        return jnp.mean(1 - jnp.sum(unit(ours) * theirs, axis=1))
    return jnp.mean(jnp.sum((ours - theirs) ** 2, axis=1))


def check_inputs(where: str, teacher: Preset, student: CLIP) -> None:
    """Raises UserError where the teacher cannot see the student's pixels and tokens."""
    ours, theirs = student.architecture, teacher.architecture
    for what, mine, given in (
        ("image size", ours.image.image_size, theirs.image.image_size),
        ("context length", ours.text.context_length, theirs.text.context_length),
        ("vocabulary", ours.text.vocab_size, theirs.text.vocab_size),
    ):
        if mine != given:
            raise UserError(
                f"{where}: its {what} is {given}, and that of config.model {mine}; "
                "a model in the step embeds the trained one's pixels and tokens: choose models that share them or, to "
                "distill, store its embeddings (clip-jax reinforce)"
            )


def normalized_as(teacher: Preset, image: Array, preprocess: Preprocess) -> Array:
    """The student's pixels, which are normalized by its ``preprocess``, normalized as the teacher's."""
    mean, std = (jnp.asarray(values, jnp.float32) for values in (preprocess.mean, preprocess.std))
    return (image * std + mean - jnp.asarray(teacher.preprocess.mean)) / jnp.asarray(teacher.preprocess.std)


def _cost(width: int, student: CLIP, batch_size: int, mesh: MeshLike, slices: int) -> Cost:
    """For each teacher two products of logits in each pass, and two gradients. Embeddings travel as those of the
    softmax loss do, with the teacher's beside them."""
    shards = batch_shards(mesh)
    dim, itemsize = student.architecture.embed_dim, jnp.dtype(student.compute.dtype).itemsize
    rows = grid_rows(shards, batch_size, dim + width, itemsize)
    columns, pairs = shards // rows, batch_size // shards
    images = batch_size // rows * itemsize * (RING_TRIPS["softmax"] * dim + 2 * width) if columns > 1 else 0
    texts = batch_size // columns * itemsize * 2 * (dim + width)
    dcn = crossing(texts, rows, min(slices, rows))
    gathered = (itemsize + FLOAT32) * (batch_size // columns) * dim + itemsize * (batch_size // columns) * width
    return Cost(
        flops=2 * pairs * batch_size * (4 * dim + 2 * width),
        across=8 * FLOAT32 * pairs * (dim + width) + gathered + LOGITS_BYTES,
        transfers=(Transfer("embeddings of student and teacher", images + texts * (rows - 1) // rows - dcn, dcn),),
    )


SPEC = ObjectiveSpec(
    make=make,
    compares=True,
    kind="distillation loss",
    defaults={
        "teacher": "",  # the name of its model: ViT-L/14; of several, separated by commas
        "teacher_weights": "",  # a run folder, foreign weights or hf://org/name, as model.init_from
        "stored": "",  # instead of both: a folder of clip-jax reinforce, made from data.train
        "logits": 1.0,  # weight of the logits' cross-entropy
        "features": 0.0,  # weight of the distance between embeddings (CLIP-KD: 2000, with mse)
        "feature_loss": "cosine",  # or mse
    },
    choices={"feature_loss": ("cosine", "mse")},
    ranges={"logits": (0, 1e9), "features": (0, 1e9)},
)
