"""scikit-learn's and CLIP_benchmark's own numbers: on the same embeddings, and from files to the end."""

import json

import numpy as np
import pytest

from clip_jax.commands import main
from clip_jax.data import tokenizers
from clip_jax.evaluation import multi_label, probe, zero_shot
from clip_jax.evaluation.composition import all_equal, true_caption_wins
from clip_jax.evaluation.retrieval import retrieval
from tests.data.shards import jpeg, write_shard
from tests.interop import folders_of
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
from sklearn.linear_model import LogisticRegression
features, labels = x["images"].numpy().astype(float), x["labels"].numpy()
found["probe"] = []
for c in (0.01, 1.0, 100.0):
    fitted = LogisticRegression(C=c, max_iter=5000, tol=1e-8).fit(features[:120], labels[:120])
    log_p = fitted.predict_log_proba(features[:120])[np.arange(120), np.searchsorted(fitted.classes_, labels[:120])]
    loss = (-log_p.sum() + (fitted.coef_**2).sum() / (2 * c)) / 120
    found["probe"].append([loss, fitted.score(features[120:], labels[120:])])
from open_clip_train.train import get_clip_metrics
first = [int(torch.nonzero(x["owner"] == i)[0]) for i in range(len(x["images"])) if (x["owner"] == i).any()]
found["described"] = sorted(set(x["owner"].tolist()))
found["first"] = first
theirs = get_clip_metrics(x["images"][found["described"]], x["texts"][first], torch.tensor(100.0))
found["open_clip"] = {name: float(value) for name, value in theirs.items()}
# A model whose embeddings are all equal.
from types import SimpleNamespace
from clip_benchmark.metrics import image_caption_selection
one = torch.ones(1, 16)
constant = SimpleNamespace(encode_image=lambda x: one.expand(len(x), 16), encode_text=lambda t: one.expand(len(t), 16))
batch = [(torch.zeros(5, 1, 3, 4, 4), [["true", "false"]] * 5)]
found["constant_selection"] = image_caption_selection.evaluate(
    constant, batch, lambda texts: torch.zeros(len(texts), 1), "cpu", amp=False)["text_acc"]
equal = torch.zeros(200, 12)
found["constant_top1"] = zeroshot_classification.accuracy(equal, x["labels"], topk=(1,))[0]
found["constant_recall"] = zeroshot_retrieval.recall_at_k(torch.zeros(12, 12), torch.eye(12).bool(), 1).mean().item()
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


def test_retrieval_of_pairs_is_open_clips(case):
    x, theirs = case
    pairs = len(theirs["first"])
    ours = retrieval(x["images"][theirs["described"]], x["texts"][theirs["first"]], np.arange(pairs))
    for direction, name in (("i2t", "image_to_text"), ("t2i", "text_to_image")):
        expected = {key: theirs["open_clip"][f"{name}_{key}"] for key in ("R@1", "R@5", "R@10", "mean_rank")}
        assert {key: ours[f"{direction}_{key}"] for key in expected} == pytest.approx(expected, abs=1e-6)
        # Theirs rounds the median of an even number of ranks down.
        assert int(ours[f"{direction}_median_rank"]) == theirs["open_clip"][f"{name}_median_rank"]


def test_a_constant_model_has_a_score_there_and_chance_here(case):
    """CLIP_benchmark takes the first of equal scores: its number depends on the order of candidates."""
    x, theirs = case
    assert theirs["constant_selection"] == 1  # Winoground and SugarCrepe: the true caption comes first
    same = np.ones(5)
    assert true_caption_wins(same, same).mean() == 0 and all_equal(same, same)
    assert theirs["constant_top1"] != pytest.approx(1 / 12, abs=0.01)  # of whichever class its topk names first
    one = np.full((200, 16), 0.25, np.float32)
    judged = zero_shot.judge(one, x["labels"], one[:12])
    assert judged.hits().mean() == pytest.approx(1 / 12) and judged.all_equal
    assert retrieval(one[:12], one[:12], np.arange(12))["i2t_R@1"] == 0 <= theirs["constant_recall"]


def test_multi_label_metrics_are_theirs_under_ties_too(case):
    x, theirs = case
    scores = multi_label.class_scores(x["images"], x["classes"])
    ours = [multi_label.average_precision(s, p) for s, p in zip(scores.T, x["positive"].T, strict=True)]
    assert ours == pytest.approx(theirs["ap"], abs=1e-6) and ours == pytest.approx(theirs["cb_ap"], abs=1e-6)
    pairs = list(zip(scores.round(1).T, x["positive"].T, strict=True))
    assert [multi_label.average_precision(s, p) for s, p in pairs] == pytest.approx(theirs["ap_ties"], abs=1e-6)
    assert [multi_label.roc_auc(s, p) for s, p in pairs] == pytest.approx(theirs["auc_ties"], abs=1e-6)


def test_the_linear_probe_is_scikit_learns(case):
    """Within 0.2 points of accuracy and 1e-4 of the loss; the same minimum has the same accuracy here."""
    x, theirs = case
    features, labels = x["images"], x["labels"]
    for c, (loss, accuracy) in zip((0.01, 1.0, 100.0), theirs["probe"], strict=True):
        head = probe.logistic_regression(features[:120], labels[:120], 11, c, iterations=5000, tolerance=1e-8)
        assert head.loss == pytest.approx(loss, abs=1e-4)
        assert head.accuracy(features[120:], labels[120:]) == pytest.approx(accuracy, abs=0.002)


END_TO_END = """
import json, sys
import types
sys.modules["requests"] = types.ModuleType("requests")  # of downloads, which there are none of
import torchvision_ops_stub, numpy as np, open_clip, torch
from types import SimpleNamespace
from clip_benchmark.datasets.builder import build_wds_dataset
from clip_benchmark.metrics import zeroshot_classification, zeroshot_retrieval
zeroshot_classification.float = lambda a: np.asarray(a).item()
folder = sys.argv[1]
model, _, transform = open_clip.create_model_and_transforms(f"local-dir:{folder}/model")
tokenizer = open_clip.get_tokenizer("ViT-B-32")
model.eval()

class Loader(list):
    dataset = SimpleNamespace(classes=range(6))

def margin(scores):
    "The smallest distance between the first and the second, and between the fifth and the sixth."
    ordered = scores.sort(dim=1, descending=True).values
    return min((ordered[:, k - 1] - ordered[:, k]).min().item() for k in (1, 5))

data = build_wds_dataset("pets", transform, data_dir=f"{folder}/sets/pets")
samples = list(data)
loader = Loader([(torch.stack([s[0] for s in samples]), torch.tensor([s[1] for s in samples]))])
found = {"pets": zeroshot_classification.evaluate(
    model, loader, tokenizer, data.classes, data.templates, "cpu", amp=False)}
with torch.no_grad():
    images = torch.nn.functional.normalize(model.encode_image(loader[0][0]), dim=-1)
    classes = zeroshot_classification.zero_shot_classifier(model, tokenizer, data.classes, data.templates, "cpu", False)
found["pets_margin"] = margin(images @ classes)  # top-5 of six
data = build_wds_dataset("coco", transform, data_dir=f"{folder}/sets/coco")
samples = list(data)
loader = [(torch.stack([s[0] for s in samples]), [s[1] for s in samples])]
found["coco"] = zeroshot_retrieval.evaluate(model, loader, tokenizer, "cpu", amp=False, recall_k_list=[1, 5])
with torch.no_grad():
    images = torch.nn.functional.normalize(model.encode_image(loader[0][0]), dim=-1)
    texts = torch.nn.functional.normalize(model.encode_text(tokenizer([t for s in samples for t in s[1]])), dim=-1)
found["coco_margin"] = min(margin(texts @ images.T), margin(images @ texts.T))
json.dump(found, open(f"{folder}/found.json", "w"))
"""


@pytest.mark.parametrize("kind", ["open_clip", pytest.param("hugging_face", marks=pytest.mark.exhaustive)])
def test_a_folder_of_weights_on_webdataset_folders_has_clip_benchmarks_numbers(kind, tmp_path, shared_data):
    """From the files to the metrics: OpenCLIP preprocesses, tokenizes, encodes and averages, and so do we."""
    preset = folders_of.PRESET
    if kind == "hugging_face":  # has one way of resizing, and the same weights
        preset = preset._replace(preprocess=folders_of.OPENAI)
    folders_of.open_clip_folder(tmp_path / "model", preset)
    own = tmp_path / "model"
    if kind == "hugging_face":
        own = folders_of.hugging_face_folder(tmp_path / "hf", preset)
    merges = tokenizers.clip(shared_data / "clip_bpe" / "bpe_simple_vocab_16e6.txt.gz").codec.merges
    (own / "merges.txt").write_text("\n".join(["#version: 0.2", *(" ".join(pair) for pair in merges)]) + "\n")
    pets, coco = tmp_path / "sets" / "pets", tmp_path / "sets" / "coco"
    words = ("cat", "dog", "bird", "old ship", "tree", "red car", "house", "river", "stone")
    for folder in (pets, coco):
        (folder / "test").mkdir(parents=True)
        (folder / "test" / "nshards.txt").write_text("1")
    write_shard(pets / "test" / "0.tar", [{"jpg": jpeg(i), "cls": str(i % 6).encode()} for i in range(12)])
    (pets / "classnames.txt").write_text("\n".join(words[:6]))
    (pets / "zeroshot_classification_templates.txt").write_text("a photo of a {c}.\na bad drawing of the {c}.")
    captions = ["\n".join(f"{words[i]} and {words[(i + j + 1) % 9]}" for j in range(2)) for i in range(6)]
    write_shard(coco / "test" / "0.tar", [{"jpg": jpeg(i), "txt": c.encode()} for i, c in enumerate(captions)])
    (coco / "dataset_type.txt").write_text("retrieval")
    theirs = json.loads((run(END_TO_END, tmp_path) / "found.json").read_text())
    out = tmp_path / "out"
    assert main(["evaluate", f"--model={own}", f"--data={tmp_path / 'sets'}", f"--output={out}"]) == 0
    assert min(theirs["pets_margin"], theirs["coco_margin"]) > 1e-4
    for name in ("pets", "coco"):
        ours = json.loads(next(out.glob(f"*/{name}.json")).read_text())["metrics"]
        for metric, value in theirs[name].items():
            assert ours[metric] == pytest.approx(value, abs=1e-6), metric
