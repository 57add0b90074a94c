"""Adversarial images: pixels changed by the gradient of the zero-shot loss with respect to the image.

Under the maximum norm, with a radius of ``epsilon`` / 255 per channel:

- FGSM (Goodfellow et al. 2015): one step of the radius along the sign of the gradient.
- PGD (Madry et al. 2018): ``STEPS`` steps of a quarter of the radius from a random start, each projected onto the ball.

The loss is the cross-entropy of the right class, for an ensemble of its averaged probabilities. Attacked images are
rounded to 8 bits, as a file holds them, after the model's resizing: the attack is on what the model sees.

Traps. Accuracy under an attack is an upper bound: stronger ones (more steps, restarts) lower it further. A model whose
gradient vanishes looks robust and is not; FGSM above PGD by little, at every radius, is a sign of it. The random start
follows from an example's key, so that batches and devices change nothing.
"""

import zlib
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int, UInt8

from clip_jax.devices.sharding import process_rows, to_devices
from clip_jax.evaluation import prompts
from clip_jax.evaluation.embed import decode_batch, readable
from clip_jax.evaluation.subject import Ensemble, Result, Task, judge, judge_probabilities, labeled

EPSILONS = (1, 2, 4, 8)
"""Radii in 255ths, of the published evaluations of CLIP (1 to 4) and of ImageNet (4, 8)."""
STEPS = 10


def fgsm(
    log_probability: Callable[[Array], Float[Array, " batch"]],
    pixels: UInt8[Array, "batch height width 3"],
    epsilon: Float[Array, ""],
) -> Float[Array, "batch height width 3"]:
    """Pixels in 0..255 at most ``epsilon`` away that lower the log-probability of each image's right class."""
    x = pixels.astype(jnp.float32)
    return jnp.clip(x - epsilon * jnp.sign(_gradient(log_probability, x)), 0, 255)


def pgd(
    log_probability: Callable[[Array], Float[Array, " batch"]],
    pixels: UInt8[Array, "batch height width 3"],
    epsilon: Float[Array, ""],
    seeds: Int[Array, " batch"],
    steps: int = STEPS,
) -> Float[Array, "batch height width 3"]:
    """Like ``fgsm``; ``seeds`` give each image's random start."""
    x = pixels.astype(jnp.float32)
    low, high = jnp.maximum(x - epsilon, 0), jnp.minimum(x + epsilon, 255)
    start = jax.vmap(lambda seed: jax.random.uniform(jax.random.key(seed), x.shape[1:], minval=-1.0, maxval=1.0))(seeds)

    def step(_, y):
        moved = y - epsilon * 2.5 / steps * jnp.sign(_gradient(log_probability, y))
        return jnp.clip(moved, low, high)

    return jax.lax.fori_loop(0, steps, step, jnp.clip(x + epsilon * start, low, high))


def _gradient(log_probability: Callable, x: Array) -> Array:
    """Rows are independent of each other: the gradient of the sum has every image's own."""
    return jax.grad(lambda y: jnp.sum(log_probability(y)))(x)


def protocol(task: Task, models: Ensemble) -> Result:
    """Accuracy by attack and radius; ``mean`` is None for an ensemble whose models do not see the same pixels."""
    embedded, judged = labeled(task.source, models), [judge(task, models)]
    clean = judged[0].hits()
    wanted = prompts.for_model(task.prompts, models[0][0].tokenizer).fingerprint
    skipped = embedded.skipped.total()
    if len({(model.embedder.image_size, model.embedder.preprocess) for model, _ in models}) > 1:
        metrics, details = {"mean": None, "clean": float(clean.mean())}, {"all_equal": judged[0].all_equal}
        return Result(metrics, "mean", len(clean), skipped, wanted, {"clean": clean}, {}, details)
    attack, embedder = make_attack(task, models), models[0][0].embedder
    found: dict[tuple[str, int], list[np.ndarray]] = {(kind, e): [] for kind in ("fgsm", "pgd") for e in EPSILONS}
    rows = process_rows(embedder.mesh, embedder.batch_size)
    with ThreadPoolExecutor(embedder.workers) as pool:
        for start in range(0, len(task.source), embedder.batch_size):
            samples, _, _ = readable(task.source, start, min(start + embedder.batch_size, len(task.source)))
            if not samples:
                continue
            batch, _ = decode_batch(embedder, samples, pool)
            labels = _padded([s.label for s in samples], embedder.batch_size)[rows]
            seeds = _padded([zlib.crc32(s.key.encode()) >> 1 for s in samples], embedder.batch_size)[rows]
            batch |= to_devices({"label": labels, "seed": seeds}, embedder.mesh, embedder.batch_size)
            for kind, epsilon in found:
                probabilities, valid = map(np.asarray, attack(kind, batch, float(epsilon)))
                found[kind, epsilon].append(probabilities[: len(samples)][valid[: len(samples)]])
    metrics, curves = {}, {}
    for kind in ("fgsm", "pgd"):
        attacked = [
            judge_probabilities(np.concatenate(found[kind, e]).astype(np.float64), embedded.labels, models)
            for e in EPSILONS
        ]
        right = [each.hits() for each in attacked]
        metrics |= {kind: float(np.mean(right))}
        metrics |= {f"{kind}_{e}": float(v.mean()) for e, v in zip(EPSILONS, right, strict=True)}
        points = [[e, float(v.mean())] for e, v in zip(EPSILONS, right, strict=True)]
        curves[f"{kind}, by radius in 255ths"] = [[0, float(clean.mean())], *points]
        judged += attacked
    metrics = {"mean": (metrics["fgsm"] + metrics["pgd"]) / 2, "clean": float(clean.mean())} | metrics
    hits = {"mean": np.concatenate([each.hits() for each in judged[1:]])}
    details = {"all_equal": all(each.all_equal for each in judged)}
    return Result(metrics, "mean", len(clean), skipped, wanted, hits, curves, details)


def make_attack(task: Task, models: Ensemble) -> Callable:
    """(kind, batch, epsilon) -> (the probabilities of the attacked images, which are valid)."""
    models = [(model, share) for model, share in models if share > 0]
    classes = [jnp.asarray(model.classifier(task.prompts)) for model, _ in models]

    def probabilities(weights: Sequence, x: Array, valid: Array) -> tuple[Array, Array]:
        logs = []
        for (model, share), params, vectors in zip(models, weights, classes, strict=True):
            embeddings, valid = model.embedder.encoders.image(params, x, valid)
            logits = model.scale * jnp.dot(embeddings, vectors.T, precision=jax.lax.Precision.HIGHEST)
            logs.append(jnp.log(share) + jax.nn.log_softmax(logits))
        return jax.nn.logsumexp(jnp.stack(logs), axis=0), valid

    def attacked(kind, weights, batch, epsilon):
        def log_probability(x):
            return jnp.take_along_axis(probabilities(weights, x, batch["valid"])[0], batch["label"][:, None], 1)[:, 0]

        if kind == "fgsm":
            x = fgsm(log_probability, batch["image"], epsilon)
        else:
            x = pgd(log_probability, batch["image"], epsilon, batch["seed"])
        logs, valid = probabilities(weights, jnp.round(x).astype(jnp.uint8), batch["valid"])
        return jnp.exp(logs), valid

    compiled = jax.jit(attacked, static_argnums=0)
    weights = [model.weights for model, _ in models]
    return lambda kind, batch, epsilon: compiled(kind, weights, batch, epsilon)


def _padded(values: Sequence[int], size: int) -> Int[np.ndarray, " size"]:
    return np.pad(np.array(values, np.int32), (0, size - len(values)))
