"""Metrics on the same embeddings as scikit-learn's, CLIP_benchmark's and OpenCLIP's own functions give them."""

import json

import numpy as np
import pytest

from clip_jax.evaluation import multi_label, zero_shot
from clip_jax.evaluation.retrieval import retrieval
from tests.parity.peers import MARKS, run

pytestmark = MARKS

SCRIPT = """
import json, sys
import torchvision_ops_stub, numpy as np, torch, sklearn.metrics
from clip_benchmark.metrics import zeroshot_classification, zeroshot_retrieval
# Its function calls float() with an array of one element, which NumPy no longer converts.
zeroshot_classification.float = lambda a: np.asarray(a).item()
folder = sys.argv[1]
x = {k: torch.from_numpy(v) for k, v in np.load(f"{folder}/inputs.npz").items()}
found = {}
logits = 100 * x["images"] @ x["classes"].T
found["top1"], found["top5"] = zeroshot_classification.accuracy(logits, x["labels"], topk=(1, 5))
found["mean_per_class"] = sklearn.metrics.balanced_accuracy_score(x["labels"], logits.argmax(1))
scores = logits / 100
found["cb_ap"] = zeroshot_classification.average_precision_per_class(scores, x["positive"]).tolist()
s, p = scores.numpy(), x["positive"].numpy()
found["ap"] = [sklearn.metrics.average_precision_score(p[:, c], s[:, c]) for c in range(s.shape[1])]
found["ap_ties"] = [sklearn.metrics.average_precision_score(p[:, c], s[:, c].round(1)) for c in range(s.shape[1])]
found["auc_ties"] = [sklearn.metrics.roc_auc_score(p[:, c], s[:, c].round(1)) for c in range(s.shape[1])]
scores = x["texts"] @ x["images"].T
positives = torch.zeros_like(scores, dtype=bool)
positives[torch.arange(len(scores)), x["owner"]] = True
described = positives.any(0)
for k in (1, 5, 10):
    hits = zeroshot_retrieval.recall_at_k(scores, positives, k) > 0
    found[f"t2i_R@{k}"] = hits.double().mean().item()
    hits = zeroshot_retrieval.recall_at_k(scores.T[described], positives.T[described], k) > 0
    found[f"i2t_R@{k}"] = hits.double().mean().item()
json.dump(found, open(f"{folder}/found.json", "w"))
"""


@pytest.fixture(scope="module")
def case(tmp_path_factory):
    """Embeddings with classes, several labels, and captions of which images have none to many."""
    folder, rng = tmp_path_factory.mktemp("metrics"), np.random.default_rng(0)

    def unit(n):
        x = rng.normal(size=(n, 16))
        return (x / np.linalg.norm(x, axis=1, keepdims=True)).astype(np.float32)

    classes, owner = unit(12), rng.integers(0, 200, 700)
    labels = rng.integers(0, 11, 200)
    images = classes[labels] + 1.5 * unit(200)
    images /= np.linalg.norm(images, axis=1, keepdims=True)
    texts = images[owner] + 1.5 * unit(700)
    texts /= np.linalg.norm(texts, axis=1, keepdims=True)
    inputs = {"images": images, "texts": texts, "classes": classes, "labels": labels, "owner": owner}
    inputs["positive"] = rng.random((200, 12)) < 0.2
    np.savez(folder / "inputs.npz", **inputs)
    return inputs, json.loads((run(SCRIPT, folder) / "found.json").read_text())


def test_classification_is_theirs(case):
    x, theirs = case
    ours = zero_shot.scores(zero_shot.judge(x["images"], x["labels"], x["classes"]), x["labels"], 12)
    assert 0.2 < ours["top1"] < 0.9
    assert ours == pytest.approx({name: theirs[name] for name in ours}, abs=1e-6)


def test_retrieval_is_theirs_with_any_number_of_captions(case):
    x, theirs = case
    ours = retrieval(x["images"], x["texts"], x["owner"])
    names = [name for name in ours if "R@" in name]
    assert len(names) == 6 and 0.1 < ours["i2t_R@1"] < 0.9
    assert {name: ours[name] for name in names} == pytest.approx({name: theirs[name] for name in names}, abs=1e-6)


def test_multi_label_metrics_are_theirs_under_ties_too(case):
    x, theirs = case
    scores = multi_label.class_scores(x["images"], x["classes"])
    ours = [multi_label.average_precision(s, p) for s, p in zip(scores.T, x["positive"].T, strict=True)]
    assert ours == pytest.approx(theirs["ap"], abs=1e-6) and ours == pytest.approx(theirs["cb_ap"], abs=1e-6)
    pairs = list(zip(scores.round(1).T, x["positive"].T, strict=True))
    assert [multi_label.average_precision(s, p) for s, p in pairs] == pytest.approx(theirs["ap_ties"], abs=1e-6)
    assert [multi_label.roc_auc(s, p) for s, p in pairs] == pytest.approx(theirs["auc_ties"], abs=1e-6)
