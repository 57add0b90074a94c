"""Distillation from a teacher in the step: the student's logits over the global batch follow those of a larger model.

    loss = mean over rows and columns of -sum_j softmax(teacher's logits)_j log softmax(student's logits)_j

OpenCLIP's DistillClipLoss; each model has its own scale, and only logits meet, so that widths may differ. The teacher
embeds the student's pixels and tokens: both need the same image size, context length and vocabulary. It is a constant
of the step, sharded as parameters are: no gradient, no moments, and it is not part of the checkpoints.
"""

import jax
import jax.numpy as jnp
from jax.sharding import Mesh
from jaxtyping import Array, Float

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


def make(settings: Settings, model: CLIP, preprocess: Preprocess, tokenizer: Tokenizer | None) -> Objective:
    name, weights = settings["teacher"], settings["teacher_weights"]
    if not name or not weights:
        raise UserError(
            "config.objectives.distillation: teacher is a model's name, such as ViT-L/14, and teacher_weights its "
            "weights: a folder, a file or hf://org/name"
        )
    return from_teacher(preset(name), model, preprocess)._replace(teacher=(name, weights))


def from_teacher(teacher: Preset, student: CLIP, preprocess: Preprocess) -> Objective:
    """The objective for a teacher's architecture."""
    check_inputs("config.objectives.distillation.teacher", teacher, student)
    model = CLIP(teacher.architecture, student.compute)
    dtype = student.compute.dtype

    def embed(rows: Rows) -> Embeddings:
        params, batch_stats = rows.constants["params"], rows.constants["batch_stats"]
        seen = for_teacher(rows.batch, rows.batch["image"], preprocess, teacher)
        image = jnp.exp(params["logit_scale"]) * unit(model.encode_image(params, seen["image"], batch_stats))
        text = unit(model.encode_text(params, seen["text"]))
        taught = jax.lax.stop_gradient({"teacher_image": image, "teacher_text": text})
        return {"image": rows.outputs.image, "text": rows.outputs.text} | taught

    def across(params: Params, embeddings: Embeddings, batch: Batch, mesh: Mesh) -> tuple[Float[Array, ""], Metrics]:
        image, text = (
            Both(embeddings[name].astype(dtype), embeddings[f"teacher_{name}"].astype(dtype))
            for name in ("image", "text")
        )
        return distillation(image, text, jnp.exp(params["logit_scale"]), mesh=mesh), {}

    def abstract_constants() -> Params:
        params = jax.eval_shape(model.init, jax.random.key(0))
        params = {name: tree for name, tree in params.items() if name != "logit_bias"}
        return {"params": params, "batch_stats": jax.eval_shape(model.init_batch_stats)}

    def cost(*, batch_size: int, micro_batches: int, mesh: MeshLike, slices: int) -> Cost:
        return _cost(model, student, batch_size, mesh, slices)

    return Objective(embed=embed, across=across, cost=cost, abstract_constants=abstract_constants)


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
                "it embeds the model's own pixels and tokens: choose models that share them"
            )


def for_teacher(batch: Batch, image: Array, preprocess: Preprocess, teacher: Preset) -> Batch:
    """The pair with the student's pixels, ``image``, normalized as the teacher's."""
    mean, std = (jnp.asarray(values, jnp.float32) for values in (preprocess.mean, preprocess.std))
    pixels = image * std + mean
    pixels = (pixels - jnp.asarray(teacher.preprocess.mean)) / jnp.asarray(teacher.preprocess.std)
    return {"image": pixels, "text": batch["text"]}


def _cost(teacher: CLIP, student: CLIP, batch_size: int, mesh: MeshLike, slices: int) -> Cost:
    """The teacher's forward pass, once even with micro-batches; two products of logits in each pass, and two gradients.
    Embeddings travel as those of the softmax loss do, with the teacher's beside them."""
    shards, width = batch_shards(mesh), teacher.architecture.embed_dim
    dim, itemsize = student.architecture.embed_dim, jnp.dtype(student.compute.dtype).itemsize
    rows = grid_rows(shards, batch_size, dim + width, itemsize)
    columns, pairs = shards // rows, batch_size // shards
    images = batch_size // rows * itemsize * (RING_TRIPS["softmax"] * dim + 2 * width) if columns > 1 else 0
    texts = batch_size // columns * itemsize * 2 * (dim + width)
    dcn = crossing(texts, rows, min(slices, rows))
    forward = sum(flops.forward(teacher.architecture).values())
    gathered = (itemsize + FLOAT32) * (batch_size // columns) * dim + itemsize * (batch_size // columns) * width
    return Cost(
        flops=pairs * forward // mesh.shape["tensor"] + 2 * pairs * batch_size * (4 * dim + 2 * width),
        across=8 * FLOAT32 * pairs * (dim + width) + gathered + LOGITS_BYTES,
        transfers=(Transfer("embeddings of student and teacher", images + texts * (rows - 1) // rows - dcn, dcn),),
    )


SPEC = ObjectiveSpec(
    make=make,
    defaults={
        "teacher": "",  # the name of its model: ViT-L/14
        "teacher_weights": "",  # a run folder, foreign weights or hf://org/name, as model.init_from
    },
)
