"""Distillation from a teacher's logits on a mesh, exact over the global batch; ``mesh_grid`` describes how it is split.

Each device computes a tile of the student's logits and the same tile of the teacher's. The forward pass keeps the
log-sum-exps of every row and column of both and the student's expected logit under the teacher's probabilities, as
online softmaxes; the backward pass computes both tiles again. Embeddings of student and teacher may differ in width.
"""

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import AbstractMesh, Mesh
from jaxtyping import Array, Float

from clip_jax.devices.sharding import batch_sharding
from clip_jax.losses import mesh_grid
from clip_jax.losses.mesh_grid import BATCH, DEFAULT_TILING, REPLICATED, ROWS, Tiling
from clip_jax.losses.softmax import EMPTY, OnlineSoftmax, log_sum_exp, merge_softmax, reduce_block


class Both(NamedTuple):
    """Images or texts as the student and as the teacher embed them; the teacher's images include its scale."""

    student: Float[Array, "n dim"]
    teacher: Float[Array, "n teacher_dim"]


def distillation(
    image: Both, text: Both, scale: Float[Array, ""], *, mesh: Mesh, tiling: Tiling = DEFAULT_TILING
) -> Float[Array, ""]:
    """Cross-entropy of the student's softmax to the teacher's, mean of rows and columns (OpenCLIP's DistillClipLoss).

    ``-mean_i sum_j softmax(T)_ij log softmax(S)_ij`` and the same for the columns, half and half, with the student's
    logits S = scale * image @ text.T and the teacher's T. No gradient goes to the teacher.
    """
    image, text = jax.lax.with_sharding_constraint((image, text), batch_sharding(mesh))
    widths = image.student.shape[1] + image.teacher.shape[1]
    gathered = jax.ShapeDtypeStruct((len(image.student), widths), image.student.dtype)
    return _distillation(image, text, scale, mesh_grid.make_grid(mesh, gathered, tiling), tiling)


class KLSums(NamedTuple):
    """Sums over the logits of a row or of a column."""

    student: OnlineSoftmax
    teacher: OnlineSoftmax
    expected: Float[Array, "n"]
    """The sum of exp(teacher's logit - the teacher's maximum) times the student's logit."""


NOTHING = KLSums(EMPTY, EMPTY, np.float32(0))


def _sums(student: Float[Array, "images texts"], teacher: Float[Array, "images texts"], axis: int) -> KLSums:
    of_teacher = reduce_block(teacher, axis)
    weights = jnp.exp(teacher - jnp.expand_dims(of_teacher.max, axis))
    return KLSums(reduce_block(student, axis), of_teacher, jnp.sum(weights * student, axis=axis))


def _merge(one: KLSums, other: KLSums) -> KLSums:
    teacher = merge_softmax(one.teacher, other.teacher)
    shift = jnp.where(jnp.isfinite(teacher.max), teacher.max, 0)
    expected = sum(side.expected * jnp.exp(side.teacher.max - shift) for side in (one, other))
    return KLSums(merge_softmax(one.student, other.student), teacher, expected)


def _reduce_grid_rows(columns: KLSums) -> KLSums:
    """Combines the columns of the devices of a grid column."""
    maxima = jax.lax.pmax((columns.student.max, columns.teacher.max), ROWS)
    shifts = [jnp.exp(side.max - maximum) for side, maximum in zip(columns[:2], maxima, strict=True)]
    scaled = (columns.student.sum * shifts[0], columns.teacher.sum * shifts[1], columns.expected * shifts[1])
    student, teacher, expected = jax.lax.psum(scaled, ROWS)
    return KLSums(OnlineSoftmax(maxima[0], student), OnlineSoftmax(maxima[1], teacher), expected)


class Side(NamedTuple):
    """Images and their rows of the logits, or texts and their columns, as the backward pass needs them."""

    embeddings: Both
    student_lse: Float[Array, "n"]
    teacher_lse: Float[Array, "n"]


def _logits(images: Both, texts: Both, scale: Float[Array, ""]) -> tuple[Array, Array]:
    """float32 logits of a block: the student's and the teacher's."""
    student = scale * mesh_grid.matmul(images.student, texts.student.T)
    return student, mesh_grid.matmul(images.teacher, texts.teacher.T)


@functools.partial(jax.custom_vjp, nondiff_argnums=(3, 4))
def _distillation(
    image: Both, text: Both, scale: Float[Array, ""], grid: AbstractMesh, tiling: Tiling
) -> Float[Array, ""]:
    return _forward(image, text, scale, grid, tiling)[0]


def _forward(
    image: Both, text: Both, scale: Float[Array, ""], grid: AbstractMesh, tiling: Tiling
) -> tuple[Float[Array, ""], tuple]:
    def device(image: Both, text: Both, scale: Float[Array, ""]) -> tuple[Float[Array, ""], tuple]:
        gathered = mesh_grid.gather_texts(text)

        def step(images: Both, texts: Both, rows: KLSums, columns: KLSums) -> tuple[KLSums, KLSums]:
            logits = _logits(images, texts, scale)
            return _merge(rows, _sums(*logits, 1)), _merge(columns, _sums(*logits, 0))

        def scan_tile(images: Both, columns: KLSums) -> tuple[KLSums, KLSums]:
            return mesh_grid.scan_blocks(step, images, gathered, NOTHING, columns, tiling)

        columns = mesh_grid.varying(jax.tree.map(lambda x: jnp.full(len(gathered.student), x), NOTHING))
        rows, columns = mesh_grid.scan_ring(scan_tile, _merge, image, columns)
        columns = mesh_grid.local_slice(_reduce_grid_rows(columns), len(text.student))
        lse = [(log_sum_exp(side.student), log_sum_exp(side.teacher)) for side in (rows, columns)]
        losses = [
            student - side.expected / side.teacher.sum for side, (student, _) in zip((rows, columns), lse, strict=True)
        ]
        return mesh_grid.psum_grid(jnp.sum(losses[0] + losses[1])), tuple(lse)

    in_specs, out_specs = (BATCH, BATCH, REPLICATED), (REPLICATED, BATCH)
    loss, lse = jax.shard_map(device, mesh=grid, in_specs=in_specs, out_specs=out_specs)(image, text, scale)
    return loss / (2 * len(image.student)), (image, text, scale, *lse)


class RowGradients(NamedTuple):
    image: Float[Array, "images dim"]
    scale: Float[Array, "images"]


def _backward(grid: AbstractMesh, tiling: Tiling, residuals: tuple, cotangent: Float[Array, ""]) -> tuple:
    def device(image: Both, text: Both, scale: Array, row_lse: tuple, column_lse: tuple) -> tuple[Array, Array, Array]:
        images, gathered = Side(image, *row_lse), mesh_grid.gather_texts(Side(text, *column_lse))
        dtype = image.student.dtype

        def step(
            images: Side, texts: Side, rows: RowGradients, text_gradient: Float[Array, "texts dim"]
        ) -> tuple[RowGradients, Float[Array, "texts dim"]]:
            """The gradient of a logit: the student's probabilities in its row and its column, less the teacher's."""
            student, teacher = _logits(images.embeddings, texts.embeddings, scale)
            in_row, in_column = student - images.student_lse[:, None], student - texts.student_lse[None, :]
            of_row = jnp.exp(in_row) - jnp.exp(teacher - images.teacher_lse[:, None])
            of_column = jnp.exp(in_column) - jnp.exp(teacher - texts.teacher_lse[None, :])
            # Relative to the log-sum-exps, which change nothing: each row and column of gradients sums to zero.
            scale_gradient = rows.scale + jnp.sum(of_row * in_row + of_column * in_column, axis=1)
            gradient = (of_row + of_column).astype(dtype)
            image_gradient = rows.image + mesh_grid.matmul(gradient, texts.embeddings.student)
            text_gradient += mesh_grid.matmul(gradient.T, images.embeddings.student)
            return RowGradients(image_gradient, scale_gradient), text_gradient

        def scan_tile(
            images: Side, text_gradient: Float[Array, "texts dim"]
        ) -> tuple[RowGradients, Float[Array, "texts dim"]]:
            init = RowGradients(jnp.zeros(image.student.shape[1]), np.float32(0))
            return mesh_grid.scan_blocks(step, images, gathered, init, text_gradient, tiling, cast)

        def cast(rows: RowGradients) -> RowGradients:
            """Casts to the dtype of the embeddings: in bfloat16 half of the memory and of the traffic."""
            return rows._replace(image=rows.image.astype(dtype))

        def add(one: RowGradients, other: RowGradients) -> RowGradients:
            return jax.tree.map(jnp.add, one, other)

        text_gradient = mesh_grid.varying(jnp.zeros(gathered.embeddings.student.shape, jnp.float32))
        rows, text_gradient = mesh_grid.scan_ring(scan_tile, add, images, text_gradient)
        text_gradient = jax.lax.psum_scatter(text_gradient.astype(dtype), ROWS, tiled=True)
        return scale * rows.image, scale * text_gradient, mesh_grid.psum_grid(jnp.sum(rows.scale)) / scale

    in_specs, out_specs = (BATCH, BATCH, REPLICATED, BATCH, BATCH), (BATCH, BATCH, REPLICATED)
    gradients = jax.shard_map(device, mesh=grid, in_specs=in_specs, out_specs=out_specs)(*residuals)
    weight = cotangent / (2 * len(residuals[0].student))
    image, text = (
        Both((weight * gradient).astype(both.student.dtype), jnp.zeros_like(both.teacher))
        for gradient, both in zip(gradients[:2], residuals[:2], strict=True)
    )
    return image, text, weight * gradients[2]


_distillation.defvjp(_forward, _backward)
