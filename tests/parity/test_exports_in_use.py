"""A run of ours as other libraries' users use it: texts and images in, by their own tokenizers and processors.

Needs the environment of ``tests/peers/make_env.sh``.
"""

import json
import shutil

import numpy as np
import pytest
from PIL import Image

import clip_jax
from clip_jax import commands
from clip_jax.presets import OPENAI
from tests.interop import folders_of
from tests.interop.folders_of import PRESET
from tests.interop.test_tokenizer_files import TEXTS
from tests.parity import peers

pytestmark = peers.MARKS

LABELS = ["picture number 3", "“something” else, isn’t it?", "PICTURE 4 &amp; more"]

USE = """
import json, sys
from pathlib import Path
import torchvision_ops_stub  # before open_clip
import open_clip, torch, transformers
from PIL import Image

folder = Path(sys.argv[1])
job = json.loads((folder / "jobs.json").read_text())
pipe = transformers.pipeline("zero-shot-image-classification", model=str(folder / "huggingface"))
scores = pipe(Image.open(folder / "image.png"), candidate_labels=job["labels"], hypothesis_template="{}")
found = {"transformers": {score["label"]: score["score"] for score in scores}}

# Padded to the length of the context, as a fixed batch wants it.
padded = transformers.AutoTokenizer.from_pretrained(folder / "huggingface")(
    job["texts"], padding="max_length", truncation=True
)["input_ids"]

model, _, preprocess = open_clip.create_model_and_transforms(f"local-dir:{folder / 'openclip'}")
tokenizer = open_clip.get_tokenizer(f"local-dir:{folder / 'openclip'}")
with torch.no_grad():
    image = model.eval().encode_image(preprocess(Image.open(folder / "image.png"))[None], normalize=True)
    text = model.encode_text(tokenizer(job["labels"]), normalize=True)
    found["open_clip"] = (model.logit_scale.exp() * image @ text.T).softmax(-1)[0].tolist()
ids = {"transformers": padded, "open_clip": tokenizer(job["texts"]).tolist()}
(folder / "found.json").write_text(json.dumps({"probabilities": found, "ids": ids}))
"""


def test_the_peers_give_a_runs_texts_its_own_ids_and_its_probabilities(small_run, tmp_path):
    """One tokenizer trained on the run's captions, in Transformers' pipeline and in OpenCLIP."""
    for layout in ("huggingface", "openclip"):
        arguments = [f"--model={small_run}", f"--format={layout}", f"--to={tmp_path / layout}"]
        assert commands.main(["export", *arguments]) == 0
    pixels = np.random.default_rng(0).integers(0, 256, (32, 32, 3)).astype(np.uint8)  # nothing is resized
    Image.fromarray(pixels).save(tmp_path / "image.png")
    peers.run(USE, tmp_path, {"labels": LABELS, "texts": TEXTS})
    found = json.loads((tmp_path / "found.json").read_text())
    model = clip_jax.load(small_run)
    expected = model.classify(pixels, LABELS)[0]
    theirs = found["probabilities"]
    np.testing.assert_allclose([theirs["transformers"][label] for label in LABELS], expected, atol=1e-5)
    np.testing.assert_allclose(theirs["open_clip"], expected, atol=1e-5)
    for library, ids in found["ids"].items():
        for text, row, wanted in zip(TEXTS, ids, model.tokenize(TEXTS).tolist(), strict=True):
            assert row == wanted, (library, text)


SENTENCES = """
import json, sys
from pathlib import Path
import torchvision_ops_stub  # before transformers
import numpy as np
from PIL import Image
from sentence_transformers import SentenceTransformer

folder = Path(sys.argv[1])
for name, texts in json.loads((folder / "jobs.json").read_text()).items():
    model = SentenceTransformer(str(folder / name), device="cpu")
    np.savez(
        folder / f"{name}.npz",
        image=model.encode([Image.open(folder / "image.png")]),
        text=model.encode(texts),
        ids=model.preprocess(texts)["input_ids"],
    )
"""


@pytest.mark.skipif(
    not any(peers.PEERS.glob("lib/python*/site-packages/sentence_transformers")),
    reason=f"no sentence-transformers in {peers.PEERS}: build it anew with tests/peers/make_env.sh",
)
def test_sentence_transformers_loads_an_export_and_gives_its_embeddings(small_run, shared_data, tmp_path):
    """A tokenizer of the run's own, and CLIP's."""
    clip = folders_of.open_clip_folder(tmp_path / "source", PRESET._replace(preprocess=OPENAI))
    shutil.copy(shared_data / "clip_bpe" / "bpe_simple_vocab_16e6.txt.gz", clip)
    pixels = np.random.default_rng(0).integers(0, 256, (32, 32, 3)).astype(np.uint8)
    Image.fromarray(pixels).save(tmp_path / "image.png")
    for name, source in (("own", small_run), ("clip", clip)):
        arguments = [f"--model={source}", "--format=huggingface", f"--to={tmp_path / name}"]
        assert commands.main(["export", *arguments]) == 0
    peers.run(SENTENCES, tmp_path, {"own": TEXTS, "clip": TEXTS})
    for name in ("own", "clip"):
        model, found = clip_jax.load(tmp_path / name), np.load(tmp_path / f"{name}.npz")
        image, text = model.encode_image([pixels], normalize=False), model.encode_text(TEXTS, normalize=False)
        assert peers.relative(image, found["image"]) < 1e-5
        assert peers.relative(text, found["text"]) < 1e-5
        for ours, theirs in zip(model.tokenize(TEXTS).tolist(), found["ids"].tolist(), strict=True):
            end = model.tokenizer.end_id  # after it, Transformers pads CLIP's texts with the end token
            assert theirs[: theirs.index(end)] == ours[: ours.index(end)]


SAVE = """
import json, sys
from pathlib import Path
import numpy as np
import torchvision_ops_stub  # before transformers
import transformers
from PIL import Image

folder = Path(sys.argv[1])
for name, (kind, settings) in json.loads((folder / "jobs.json").read_text()).items():
    processor = getattr(transformers, kind)(**settings)
    processor.save_pretrained(folder / name)
    if name == "nested":
        (folder / name / "processor_config.json").write_text(json.dumps({"image_processor": processor.to_dict()}))
        (folder / name / "preprocessor_config.json").unlink()
    pixels = processor(Image.open(folder / "image.png"), return_tensors="np")["pixel_values"]
    np.save(folder / name / "pixels.npy", pixels.transpose(0, 2, 3, 1))
"""

SIZES = {"size": {"shortest_edge": 32}, "crop_size": {"height": 32, "width": 32}}
HALVES = {"image_mean": [0.5] * 3, "image_std": [0.5] * 3}
PROCESSORS = {
    "usual": ("CLIPImageProcessor", SIZES),
    "nested": ("CLIPImageProcessor", SIZES | HALVES),
    "not_normalized": ("CLIPImageProcessor", SIZES | {"do_normalize": False}),
    "not_rescaled": ("CLIPImageProcessor", SIZES | {"do_rescale": False}),
    "other_factor": ("CLIPImageProcessor", SIZES | {"rescale_factor": 1 / 127.5}),
    "siglip": ("SiglipImageProcessor", {"size": {"height": 32, "width": 32}}),
}


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    folder = tmp_path_factory.mktemp("saved")
    pixels = np.random.default_rng(0).integers(0, 256, (32, 32, 3)).astype(np.uint8)
    Image.fromarray(pixels).save(folder / "image.png")
    for name in PROCESSORS:
        folders_of.hugging_face_folder(folder / name, PRESET._replace(preprocess=OPENAI))
        (folder / name / "preprocessor_config.json").unlink()
    return peers.run(SAVE, folder, PROCESSORS)


@pytest.mark.parametrize("name", PROCESSORS)
def test_a_processor_that_transformers_saved_gives_transformers_pixels(saved, name):
    ours = clip_jax.load(saved / name).preprocess(saved / "image.png")
    expected = np.load(saved / name / "pixels.npy")
    np.testing.assert_allclose(ours, expected, rtol=1e-5, atol=1e-5)
