"""Cross-entropy between the prototype assignments of a teacher and a student, a chunk of targets at a time.

    p = softmax((teacher . prototypes - center) / teacher_temperature)         (Caron et al. 2021, DINO, equations 1, 4)
    loss = -weight * mean over targets and views of sum_k p_k log softmax(student . prototypes / temperature)_k

Each of a batch's ``targets`` (its image, or each of its patches) is compared with the student's ``views`` of it. The
logits over the prototypes of all patches would be [batch, patches, prototypes]: 4 GB for 128 images on a device. Here
a device holds those of one chunk, in both passes: the backward pass computes them again.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.sharding import AbstractMesh, Mesh
from jaxtyping import Array, Float

from clip_jax.devices.sharding import batch_shards, copy_for_each_part, split_rows
from clip_jax.losses.vocabulary import CHUNK_LOGITS


class Assigned(NamedTuple):
    """Sums over the batch, in which each row counts by its weight."""

    loss: Float[Array, ""]
    entropy: Float[Array, ""]
    """The entropy of the teacher's assignments, the lowest value of the loss."""
    logits: Float[Array, "prototypes"]
    """The teacher's, of which the center is a running mean."""


def chunk_size(targets: int, views: int, prototypes: int) -> int:
    """The targets of a chunk, of ``targets`` on a device."""
    return min(targets, max(8, CHUNK_LOGITS // (prototypes * (views + 1))))


def cross_entropy(
    student: Float[Array, "batch targets views features"],
    teacher: Float[Array, "batch targets features"],
    prototypes: tuple[Float[Array, "features prototypes"], Float[Array, "features prototypes"]],
    center: Float[Array, "prototypes"],
    weights: Float[Array, "batch"],
    *,
    temperature: float,
    teacher_temperature: float,
    mesh: Mesh | AbstractMesh | None,
) -> Assigned:
    """The sums of the module's docstring; ``prototypes`` are the student's and the teacher's."""
    shards = 1 if mesh is None else batch_shards(mesh)
    views, features = student.shape[2:]
    targets = weights.size // shards * teacher.shape[1]
    size = chunk_size(targets, views, len(center))
    teacher, center = jax.lax.stop_gradient((teacher, center))
    shares = jnp.repeat(weights / teacher.shape[1], teacher.shape[1])
    ours, theirs = (copy_for_each_part(kernel, mesh) for kernel in prototypes)

    def chunks(x: Array, *shape: int) -> Array:
        """[batch * targets, ...] -> [chunks, devices, targets, ...]"""
        x = split_rows(x.reshape(shards, targets, *shape), mesh)
        x = jnp.pad(x, ((0, 0), (0, -targets % size), *((0, 0),) * len(shape)))
        return x.reshape(shards, -1, size, *shape).swapaxes(0, 1)

    @jax.checkpoint
    def step(sums: Assigned, chunk: tuple[Array, Array, Array]) -> tuple[Assigned, None]:
        student, teacher, shares = chunk
        options = dict(preferred_element_type=jnp.float32)
        logits = jnp.einsum("dtvf,dfk->dtvk", student, ours.astype(student.dtype), **options) / temperature
        teacher_logits = jnp.einsum("dtf,dfk->dtk", teacher, theirs.astype(teacher.dtype), **options)
        teacher_logits = jax.lax.stop_gradient(teacher_logits)
        log_p = jax.nn.log_softmax((teacher_logits - center) / teacher_temperature, axis=-1)
        p = jnp.exp(log_p)
        # The mean over the views first: one product with the teacher's assignment for all of them.
        log_q = jnp.mean(logits, axis=2) - jnp.mean(jax.nn.logsumexp(logits, axis=-1), axis=2)[..., None]
        new = Assigned(
            jnp.sum(-shares * jnp.sum(p * log_q, axis=-1), axis=1),
            jnp.sum(-shares * jnp.sum(p * log_p, axis=-1), axis=1),
            jnp.einsum("dt,dtk->dk", shares, teacher_logits),
        )
        return jax.tree.map(jnp.add, sums, new), None

    nothing = Assigned(*(split_rows(jnp.zeros((shards, *s), jnp.float32), mesh) for s in ((), (), (len(center),))))
    arrays = (chunks(student, views, features), chunks(teacher, features), chunks(shares))
    sums, _ = jax.lax.scan(step, nothing, arrays)
    return jax.tree.map(lambda x: jnp.sum(x, axis=0), sums)
