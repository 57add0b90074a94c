"""How far the losses on a mesh and their gradients are from float64 arithmetic, on every grid of 1, 2, 4 and 8 devices.

python benchmarks/loss_error.py [--batch=1024] [--dim=64] [--devices=1,2,4,8]

The devices are simulated on a CPU. Each line is the worst of its grids: relative errors, as norms, of the loss and its
gradients with respect to images, texts, scale (and bias). "trained" embeddings have pairs whose logits are far above
all others, so that the loss is a small difference of large numbers. bfloat16 is compared with float64 of the same
rounded numbers.
"""

import argparse
import functools
from collections.abc import Callable, Iterator

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh
from jaxtyping import Float64

from clip_jax.devices import simulated
from clip_jax.devices.sharding import batch_sharding, make_mesh
from clip_jax.losses.mesh_grid import Tiling
from clip_jax.losses.sigmoid import sigmoid
from clip_jax.losses.softmax import softmax

CASES = [
    # embeddings, dtype, cosine of a pair, scale, bound
    ("random", "float32", 0.0, 1.0, 1e-6),
    ("random", "float32", 0.0, 14.3, 1e-6),
    ("random", "float32", 0.0, 100.0, 1e-5),
    ("trained", "float32", 0.7, 100.0, 1e-5),
    ("random", "bfloat16", 0.0, 14.3, 2e-2),
    ("trained", "bfloat16", 0.7, 100.0, 2e-2),
]
BIAS = -10.0  # SigLIP's
CHUNK = 512


def embeddings(batch: int, dim: int, cosine: float) -> list[Float64[np.ndarray, "batch dim"]]:
    """Images and texts of unit length."""
    image, noise = np.random.default_rng(0).normal(size=(2, batch, dim))
    image /= np.linalg.norm(image, axis=1, keepdims=True)
    noise -= np.sum(noise * image, axis=1, keepdims=True) * image
    noise /= np.linalg.norm(noise, axis=1, keepdims=True)
    return [image, cosine * image + np.sqrt(1 - cosine**2) * noise] if cosine else [image, noise]


def float64_softmax(
    image: Float64[np.ndarray, "batch dim"], text: Float64[np.ndarray, "batch dim"], scale: float
) -> tuple[Float64[np.ndarray, "..."], ...]:
    """(loss, gradients), ``CHUNK`` rows at a time; positives are left out of the sums, so that nothing cancels."""
    size = len(image)
    positive = scale * np.sum(image * text, axis=1)
    row_sums, column_sums = np.empty(size), np.zeros(size)  # sums of exp(logit - positive) over j != i
    for rows, logits in _chunks(image, text, scale):
        row_sums[rows] = np.exp(logits - positive[rows, None]).sum(axis=1)
        column_sums += np.exp(logits - positive).sum(axis=0)
    image_gradient, text_gradient, scale_gradient = np.empty_like(image), np.zeros_like(text), 0.0
    for rows, logits in _chunks(image, text, scale):
        above_row, above_column = logits - positive[rows, None], logits - positive
        row = np.exp(above_row) / (1 + row_sums[rows, None])
        column = np.exp(above_column) / (1 + column_sums)
        p = (row + column) / (2 * size)
        dpositive = -(row_sums[rows] / (1 + row_sums[rows]) + column_sums[rows] / (1 + column_sums[rows]))
        image_gradient[rows] = scale * (p @ text + dpositive[:, None] / (2 * size) * text[rows])
        text_gradient += scale * p.T @ image[rows]
        text_gradient[rows] += scale * dpositive[:, None] / (2 * size) * image[rows]
        finite = np.isfinite(logits)
        scale_gradient += np.sum(row[finite] * above_row[finite] + column[finite] * above_column[finite])
    loss = np.mean(np.log1p(row_sums) + np.log1p(column_sums)) / 2
    return loss, image_gradient, text_gradient, scale_gradient / (2 * size * scale)


def float64_sigmoid(
    image: Float64[np.ndarray, "batch dim"], text: Float64[np.ndarray, "batch dim"], scale: float, bias: float
) -> tuple[Float64[np.ndarray, "..."], ...]:
    """(loss, gradients), ``CHUNK`` rows at a time."""
    size, positive = len(image), scale * np.sum(image * text, axis=1) + bias
    dpositive = -1 / (1 + np.exp(positive)) / size
    loss, bias_gradient = np.sum(np.logaddexp(0, -positive)) / size, np.sum(dpositive)
    scale_gradient = np.sum(dpositive * (positive - bias)) / scale
    image_gradient, text_gradient = (
        scale * dpositive[:, None] * text,
        scale * dpositive[:, None] * image,
    )
    for rows, logits in _chunks(image, text, scale):
        p = 1 / (1 + np.exp(-logits - bias)) / size
        loss += np.sum(np.logaddexp(0, logits + bias)) / size
        image_gradient[rows] += scale * p @ text
        text_gradient += scale * p.T @ image[rows]
        finite = np.isfinite(logits)
        scale_gradient += np.sum(p[finite] * logits[finite]) / scale
        bias_gradient += np.sum(p)
    return loss, image_gradient, text_gradient, scale_gradient, bias_gradient


def _chunks(
    image: Float64[np.ndarray, "batch dim"], text: Float64[np.ndarray, "batch dim"], scale: float
) -> Iterator[tuple[np.ndarray, Float64[np.ndarray, "rows batch"]]]:
    """Yields rows and their logits, -inf where image and text are a pair."""
    for start in range(0, len(image), CHUNK):
        rows = np.arange(start, min(start + CHUNK, len(image)))
        logits = scale * image[rows] @ text.T
        logits[np.arange(len(rows)), rows] = -np.inf
        yield rows, logits


LOSSES = {"softmax": (softmax, float64_softmax), "sigmoid": (sigmoid, float64_sigmoid)}
TILINGS = (Tiling(), Tiling(gathered_bytes=0))  # the most square grid, and a plain ring


@functools.lru_cache
def compiled(name: str, mesh: Mesh, tiling: Tiling) -> Callable:
    """The loss with all its gradients."""
    loss, arguments = LOSSES[name][0], tuple(range(3 if name == "softmax" else 4))
    return jax.jit(jax.value_and_grad(lambda *x: loss(*x, mesh=mesh, tiling=tiling)[0], arguments))


def worst(name: str, given: list[jax.Array], scalars: list[float], expected: tuple, devices: list[int]) -> np.ndarray:
    """The largest relative errors of the loss and its gradients over all grids."""
    found = []
    for count in devices:
        mesh = make_mesh(count, devices=jax.devices()[:count])
        arguments = [jax.device_put(x, batch_sharding(mesh)) for x in given] + [jnp.float32(s) for s in scalars]
        for tiling in TILINGS:
            loss, gradients = compiled(name, mesh, tiling)(*arguments)
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
    simulated.use_cpus(8)
    print(f"batch {args.batch:,}, width {args.dim}, on {', '.join(map(str, args.devices))} devices")
    names = ("loss", "d image", "d text", "d scale", "d bias")
    print("".join(f"{title:>10}" for title in ("", "", "", "scale", "its value", *names, "bound")))
    for name in LOSSES:
        for kind, dtype, cosine, scale, bound in CASES:
            given = [jnp.asarray(x, dtype) for x in embeddings(args.batch, args.dim, cosine)]
            exact = [np.asarray(x, np.float64) for x in given]
            scalars = [float(np.float32(s)) for s in (scale, *[BIAS] * (name == "sigmoid"))]
            expected = LOSSES[name][1](*exact, *scalars)
            errors = worst(name, given, scalars, expected, args.devices)
            columns = [f"{error:>10.1e}" for error in errors] + [" " * 10] * (5 - len(errors))
            verdict = "" if max(errors) <= bound else "  EXCEEDED"
            print(
                f"{name:>10}{kind:>10}{dtype:>10}{scale:>10}{expected[0]:>10.2g}{''.join(columns)}{bound:>10.0e}{verdict}"
            )


if __name__ == "__main__":
    main()
