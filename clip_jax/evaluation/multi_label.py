"""Multi-label classification: average precision and ROC AUC per class, from scores (Pascal VOC 2007, for example).

- Average precision: the sum of precision times gain in recall over all thresholds (scikit-learn's
  ``average_precision_score``). Equal scores are one threshold, so that a constant model has the share of positives,
  which is chance. CLIP_benchmark sorts ties by index; without ties the two are equal. The CLIP paper reports VOC's
  interpolated variant (``points=11``), which is a few points higher.
- ROC AUC: the probability that a positive scores above a negative; equal scores count one half.

A class without a positive (for AUC, or without a negative) has no value: it is left out of the mean and counted.
CLIP_benchmark counts it as 0.
"""

import numpy as np
from jaxtyping import Bool, Float

from clip_jax.evaluation import prompts
from clip_jax.evaluation.ranking import TIE
from clip_jax.evaluation.subject import Ensemble, Result, Task


def class_scores(
    images: Float[np.ndarray, "images dim"], classes: Float[np.ndarray, "classes dim"]
) -> Float[np.ndarray, "images classes"]:
    """Cosines, by float64 products: equal images then have equal scores, wherever they are in the matrix."""
    return (images.astype(np.float64) @ classes.astype(np.float64).T).astype(np.float32)


def average_precision(
    scores: Float[np.ndarray, " images"], positive: Bool[np.ndarray, " images"], points: int = 0
) -> float | None:
    """AP of one class; None without positives. ``points``: instead, the mean of this many interpolated precisions."""
    if not positive.any():
        return None
    _check(scores)
    order = np.argsort(-scores, kind="stable")
    threshold = np.append(np.flatnonzero(np.diff(scores[order])), len(scores) - 1)  # the last of equal scores
    found = np.cumsum(positive[order])[threshold]
    precision, recall = found / (threshold + 1), found / found[-1]
    if not points:
        return float(np.sum(np.diff(recall, prepend=0) * precision))
    return float(np.mean([precision[recall >= r - 1e-12].max() for r in np.linspace(0, 1, points)]))


def roc_auc(scores: Float[np.ndarray, " images"], positive: Bool[np.ndarray, " images"]) -> float | None:
    """ROC AUC of one class; None without positives or without negatives."""
    count = int(positive.sum())
    if not 0 < count < len(positive):
        return None
    _check(scores)
    from scipy.stats import rankdata  # here, because a process needs half a second to import it

    above = rankdata(scores)[positive].sum() - count * (count + 1) / 2
    return float(above / (count * (len(positive) - count)))


def multi_label(
    scores: Float[np.ndarray, "images classes"], positive: Bool[np.ndarray, "images classes"], points: int = 0
) -> dict[str, float | int | None]:
    """``{"mAP": ..., "roc_auc": ..., "classes_left_out": ...}``: means over the classes that have a value."""
    precisions = [average_precision(s, p, points) for s, p in zip(scores.T, positive.T, strict=True)]
    areas = [roc_auc(s, p) for s, p in zip(scores.T, positive.T, strict=True)]
    return {"mAP": _mean(precisions), "roc_auc": _mean(areas), "classes_left_out": areas.count(None)}


def protocol(task: Task, models: Ensemble) -> Result:
    """On a source with the classes of each image in ``rows``; scores are cosines, averaged over an ensemble's models.

    ``mAP_11`` is VOC 2007's interpolated variant, which the CLIP paper reports.
    """
    found = models[0][0].embed(task.source, texts=False)
    positive = task.source.rows[found.indices]
    scores = sum(
        share * class_scores(model.embed(task.source, texts=False).images, model.classifier(task.prompts))
        for model, share in models
    )
    metrics = multi_label(scores, positive)
    metrics |= {"mAP_11": multi_label(scores, positive, points=11)["mAP"]}
    wanted = prompts.for_model(task.prompts, models[0][0].tokenizer).fingerprint
    # Per image, for paired comparisons: the average precision of its own classes among all.
    by_image = np.array([average_precision(s, p) or 0.0 for s, p in zip(scores, positive, strict=True)])
    details = {"all_equal": bool(np.ptp(scores) <= TIE)}
    return Result(metrics, "mAP", len(scores), found.skipped.total(), wanted, {"by_image": by_image}, {}, details)


def _mean(values: list[float | None]) -> float | None:
    values = [value for value in values if value is not None]
    return float(np.mean(values)) if values else None


def _check(scores: np.ndarray) -> None:
    if not np.isfinite(scores).all():
        raise ValueError("scores are not finite")
