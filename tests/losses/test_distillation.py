"""Distillation on a mesh equals its definition, with all gradients."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from clip_jax.losses.distillation import Both, distillation
from tests.losses import cases


def definition(image, text, scale, teacher):
    """OpenCLIP's DistillClipLoss, without the contrastive loss that it adds."""
    student = scale * jnp.dot(image, text.T, precision="highest")
    losses = [
        -jnp.mean(jnp.sum(jax.nn.softmax(teacher, axis) * jax.nn.log_softmax(student, axis), axis)) for axis in (1, 0)
    ]
    return (losses[0] + losses[1]) / 2


def case():
    image, text = cases.embeddings(48, 16, 0.4)
    teacher_image, teacher_text = cases.embeddings(48, 24, 0.7)
    return image, text, 30 * teacher_image, teacher_text


@pytest.mark.parametrize(("shape", "rows", "block_logits"), cases.GRIDS)
def test_loss_and_gradients_are_those_of_the_definition_on_every_grid(shape, rows, block_logits):
    mesh, tiling = cases.grid(shape, rows, max(block_logits, 6))
    image, text, teacher_image, teacher_text = case()

    def ours(image, text, scale):
        return distillation(Both(image, teacher_image), Both(text, teacher_text), scale, mesh=mesh, tiling=tiling)

    arguments = (image, text, np.float32(14.3))
    value, gradients = jax.jit(jax.value_and_grad(ours, (0, 1, 2)))(*arguments)
    teacher = np.asarray(teacher_image, np.float64) @ teacher_text.T
    expected = jax.value_and_grad(definition, (0, 1, 2))(*arguments, teacher.astype(np.float32))
    assert float(value) == pytest.approx(float(expected[0]), rel=2e-6)
    for found, wanted in zip(gradients[:2], expected[1][:2], strict=True):
        assert cases.relative_error(found, np.asarray(wanted, np.float64)) < 5e-6
    # The difference of two averages of logits up to 14, in float32 on both sides.
    assert float(gradients[2]) == pytest.approx(float(expected[1][2]), abs=1e-6)


def test_a_student_that_equals_its_teacher_has_no_gradient():
    mesh, tiling = cases.grid((4, 2, 1), 2)
    image, text, *_ = case()
    scale = np.float32(14.3)

    def gradient(taught):
        both = Both(taught * scale, text)
        options = dict(mesh=mesh, tiling=tiling)
        run = jax.grad(lambda i, t: distillation(Both(i, both.student), Both(t, text), scale, **options), (0, 1))
        return max(float(jnp.abs(g).max()) for g in jax.jit(run)(image, text))

    assert gradient(image) < 1e-6 < 1e-3 < gradient(image[::-1])
