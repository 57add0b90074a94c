"""How far the losses on a mesh and their gradients are from float64 arithmetic, on every grid of 1, 2, 4 and 8 devices.

python benchmarks/loss_error.py [--batch=1024] [--dim=64] [--devices=1,2,4,8]

The devices are simulated on a CPU. Each line is the worst of its grids: relative errors of the loss and gradients by
images, texts, scale (and bias), as norms. "trained" embeddings have their pairs far above all other logits, so that
the loss is a small difference of large ones. bfloat16 is compared with float64 of the same rounded numbers.
"""

import argparse
import functools

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from clip_jax.losses import grid, tile
from clip_jax.sharding import batch_sharding, make_mesh

CASES = [
    # embeddings, type, cosine of a pair beside noise, scale, bound
    ("random", "float32", 0.0, 1.0, 1e-6),
    ("random", "float32", 0.0, 14.3, 1e-6),
    ("random", "float32", 0.0, 100.0, 1e-5),
    ("trained", "float32", 0.7, 100.0, 1e-5),
    ("random", "bfloat16", 0.0, 14.3, 2e-2),
    ("trained", "bfloat16", 0.7, 100.0, 2e-2),
]
BIAS = -10.0  # SigLIP's
CHUNK = 512


def embeddings(batch: int, dim: int, cosine: float) -> list[np.ndarray]:
    """float64[batch, dim] of images and texts, of unit length."""
    image, noise = np.random.default_rng(0).normal(size=(2, batch, dim))
    image /= np.linalg.norm(image, axis=1, keepdims=True)
    noise -= np.sum(noise * image, axis=1, keepdims=True) * image
    noise /= np.linalg.norm(noise, axis=1, keepdims=True)
    return [image, cosine * image + np.sqrt(1 - cosine**2) * noise] if cosine else [image, noise]


def softmax(image: np.ndarray, text: np.ndarray, scale: float) -> tuple[np.ndarray, ...]:
    """(loss, gradients) in float64, some rows at a time; positives are left out of the sums: nothing cancels."""
    size = len(image)
    positive = scale * np.sum(image * text, axis=1)
    others_of_row, others_of_column = np.empty(size), np.zeros(size)  # sums of exp(logit - positive) over j != i
    for rows, logits in _chunks(image, text, scale):
        others_of_row[rows] = np.exp(logits - positive[rows, None]).sum(axis=1)
        others_of_column += np.exp(logits - positive).sum(axis=0)
    by_image, by_text, by_scale = np.empty_like(image), np.zeros_like(text), 0.0
    for rows, logits in _chunks(image, text, scale):
        above_row, above_column = logits - positive[rows, None], logits - positive
        row = np.exp(above_row) / (1 + others_of_row[rows, None])
        column = np.exp(above_column) / (1 + others_of_column)
        p = (row + column) / (2 * size)
        own = -(others_of_row[rows] / (1 + others_of_row[rows]) + others_of_column[rows] / (1 + others_of_column[rows]))
        by_image[rows] = scale * (p @ text + own[:, None] / (2 * size) * text[rows])
        by_text += scale * p.T @ image[rows]
        by_text[rows] += scale * own[:, None] / (2 * size) * image[rows]
        finite = np.isfinite(logits)
        by_scale += np.sum(row[finite] * above_row[finite] + column[finite] * above_column[finite])
    loss = np.mean(np.log1p(others_of_row) + np.log1p(others_of_column)) / 2
    return loss, by_image, by_text, by_scale / (2 * size * scale)


def sigmoid(image: np.ndarray, text: np.ndarray, scale: float, bias: float) -> tuple[np.ndarray, ...]:
    """(loss, gradients) in float64, some rows at a time."""
    size, positive = len(image), scale * np.sum(image * text, axis=1) + bias
    pull = -1 / (1 + np.exp(positive)) / size
    loss, by_bias = np.sum(np.logaddexp(0, -positive)) / size, np.sum(pull)
    by_scale = np.sum(pull * (positive - bias)) / scale
    by_image, by_text = scale * pull[:, None] * text, scale * pull[:, None] * image
    for rows, logits in _chunks(image, text, scale):
        p = 1 / (1 + np.exp(-logits - bias)) / size
        loss += np.sum(np.logaddexp(0, logits + bias)) / size
        by_image[rows] += scale * p @ text
        by_text += scale * p.T @ image[rows]
        finite = np.isfinite(logits)
        by_scale += np.sum(p[finite] * logits[finite]) / scale
        by_bias += np.sum(p)
    return loss, by_image, by_text, by_scale, by_bias


def _chunks(image: np.ndarray, text: np.ndarray, scale: float):
    """(rows, their logits, -inf where image and text are a pair)"""
    for start in range(0, len(image), CHUNK):
        rows = np.arange(start, min(start + CHUNK, len(image)))
        logits = scale * image[rows] @ text.T
        logits[np.arange(len(rows)), rows] = -np.inf
        yield rows, logits


LOSSES = {"softmax": (grid.softmax, softmax), "sigmoid": (grid.sigmoid, sigmoid)}


@functools.lru_cache
def compiled(name: str, mesh: Mesh, rows: int):
    """The loss with all its gradients; ``rows`` of the grid are what ``tile.GATHERED_BYTES`` makes them."""
    loss, arguments = LOSSES[name][0], tuple(range(3 if name == "softmax" else 4))
    return jax.jit(jax.value_and_grad(lambda *x: loss(*x, mesh=mesh)[0], arguments))


def worst(name: str, given: list[jax.Array], scalars: list[float], expected: tuple, devices: list[int]) -> np.ndarray:
    """Relative errors of the loss and its gradients, the largest of all grids."""
    found = []
    for count in devices:
        for gathered_bytes in (2**30, 0):  # as square as can be, and a plain ring
            tile.GATHERED_BYTES = gathered_bytes
            mesh = make_mesh(count, devices=jax.devices()[:count])
            arguments = [jax.device_put(x, batch_sharding(mesh)) for x in given] + [jnp.float32(s) for s in scalars]
            run = compiled(name, mesh, tile.grid_of(mesh, given[0]).shape[tile.ROWS])
            loss, gradients = run(*arguments)
            pairs = zip((loss, *gradients), expected, strict=True)
            found.append([np.linalg.norm(np.asarray(a, np.float64) - b) / np.linalg.norm(b) for a, b in pairs])
    return np.max(found, axis=0)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--batch", type=int, default=1024)
    parser.add_argument("--dim", type=int, default=64)
    parser.add_argument("--devices", type=lambda text: [int(n) for n in text.split(",")], default=[1, 2, 4, 8])
    args = parser.parse_args()
    jax.config.update("jax_platforms", "cpu")
    jax.config.update("jax_num_cpu_devices", 8)
    print(f"batch {args.batch:,}, width {args.dim}, on {', '.join(map(str, args.devices))} devices")
    names = ("loss", "by image", "by text", "by scale", "by bias")
    print("".join(f"{title:>10}" for title in ("", "", "", "scale", "its value", *names, "bound")))
    for name in LOSSES:
        for kind, dtype, cosine, scale, bound in CASES:
            given = [jnp.asarray(x, dtype) for x in embeddings(args.batch, args.dim, cosine)]
            exact = [np.asarray(x, np.float64) for x in given]
            scalars = [float(np.float32(s)) for s in (scale, *[BIAS] * (name == "sigmoid"))]
            expected = LOSSES[name][1](*exact, *scalars)
            errors = worst(name, given, scalars, expected, args.devices)
            told = [f"{error:>10.1e}" for error in errors] + [" " * 10] * (5 - len(errors))
            verdict = "" if max(errors) <= bound else "  EXCEEDED"
            print(
                f"{name:>10}{kind:>10}{dtype:>10}{scale:>10}{expected[0]:>10.2g}{''.join(told)}{bound:>10.0e}{verdict}"
            )


if __name__ == "__main__":
    main()
