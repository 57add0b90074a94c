"""The distillation loss, with the contrastive one that OpenCLIP adds, equals OpenCLIP's DistillClipLoss."""

import jax
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from clip_jax.devices.sharding import make_mesh
from clip_jax.losses.distillation import Both, distillation
from clip_jax.losses.softmax import softmax
from tests.losses import cases
from tests.parity import peers

pytestmark = peers.MARKS

LOSS = """
import sys
from pathlib import Path
import torchvision_ops_stub  # before open_clip
import torch
from open_clip.loss import DistillClipLoss
from safetensors.torch import load_file, save_file

folder = Path(sys.argv[1])
given = load_file(folder / "given")
leaves = [given[name].requires_grad_() for name in ("image", "text", "scale")]
losses = DistillClipLoss()(*leaves, given["teacher_image"], given["teacher_text"], given["teacher_scale"])
sum(losses).backward()
gradients = {name: leaf.grad for name, leaf in zip(("image", "text", "scale"), leaves)}
save_file({"loss": sum(losses).detach(), **gradients}, folder / "out")
"""


def test_loss_and_gradients_equal_open_clips(tmp_path):
    image, text = cases.embeddings(48, 16, 0.4)
    teacher_image, teacher_text = cases.embeddings(48, 24, 0.7)
    scale, teacher_scale = np.float32(14.3), np.float32(30)
    given = {"image": image, "text": text, "teacher_image": teacher_image, "teacher_text": teacher_text}
    scales = {"scale": np.asarray(scale), "teacher_scale": np.asarray(teacher_scale)}
    save_file(given | scales, tmp_path / "given")
    expected = load_file(peers.run(LOSS, tmp_path) / "out")
    mesh = make_mesh(4, 2)

    def ours(image, text, scale):
        taught = Both(image, teacher_scale * teacher_image), Both(text, teacher_text)
        return softmax(image, text, scale, mesh=mesh)[0] + distillation(*taught, scale, mesh=mesh)

    loss, gradients = jax.jit(jax.value_and_grad(ours, (0, 1, 2)))(image, text, scale)
    assert float(loss) == pytest.approx(float(expected["loss"]), rel=1e-5)
    for name, gradient in zip(("image", "text", "scale"), gradients, strict=True):
        assert cases.relative_error(gradient, expected[name].astype(np.float64)) < (1e-5 if gradient.ndim else 1e-3)
