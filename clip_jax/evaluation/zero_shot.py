"""Zero-shot classification with prompt templates, from embeddings (Radford et al. 2021, section 3.1.4).

Per class: fill the templates, encode, normalize each, average, normalize again. An image belongs to the class whose
vector is nearest; of equally near ones, to the first.
"""

from collections.abc import Callable, Sequence

import numpy as np
from jaxtyping import Float, Int

from clip_jax.data.templates import check, fill


def classifier(
    class_names: Sequence[str],
    templates: Sequence[str],
    encode: Callable[[Sequence[str]], Float[np.ndarray, "prompts dim"]],
) -> Float[np.ndarray, "classes dim"]:
    """One unit vector per class; ``encode`` gives unit embeddings of texts. Raises UserError for a template."""
    check("templates", templates)
    prompts = [fill(template, name) for name in class_names for template in templates]
    embeddings = np.asarray(encode(prompts)).reshape(len(class_names), len(templates), -1)
    mean = embeddings.mean(axis=1)
    return mean / np.linalg.norm(mean, axis=1, keepdims=True)


def accuracy(
    images: Float[np.ndarray, "images dim"],
    labels: Int[np.ndarray, " images"],
    classes: Float[np.ndarray, "classes dim"],
) -> dict[str, float]:
    """``{"zero_shot_top1": ..., "zero_shot_top5": ...}``; top 5 only where there are more than five classes."""
    order = np.argsort(-(images @ classes.T), axis=1, kind="stable")
    hit = order == labels[:, None]
    result = {"zero_shot_top1": float(np.mean(hit[:, 0]))}
    if len(classes) > 5:
        result["zero_shot_top5"] = float(np.mean(hit[:, :5].any(axis=1)))
    return result
