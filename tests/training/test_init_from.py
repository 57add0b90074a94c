"""Training starts from anybody's weights: ``main.py`` on a Transformers folder, at another size, with a new width."""

import jax
import numpy as np
import pytest

import clip_jax
from tests.data.shards import jpeg
from tests.interop import folders_of
from tests.training import runs


@pytest.fixture
def start(tmp_path, shared_data):
    """The command of a run of one step on a model like ``folders_of.PRESET``, that learns nothing."""
    theirs = folders_of.hugging_face_folder(tmp_path / "theirs")
    photos = tmp_path / "photos"
    photos.mkdir()
    for i in range(8):
        (photos / f"{i}.jpg").write_bytes(jpeg(i))
        (photos / f"{i}.txt").write_text(f"picture number {i}")
    sizes = {
        "image": {"image_size": 64, "patch_size": 16, "width": 64, "layers": 2, "heads": 2, "mlp_width": 256},
        "text": {"context_length": 20, "vocab_size": -1, "width": 32, "layers": 2, "heads": 4, "mlp_width": 128},
    }
    return [
        f"--config={runs.ROOT / 'configs' / 'own_images.py'}:folder:{photos}",
        "--config.model.name=ViT-B/32-quickgelu",
        *(f"--config.model.{tower}.{name}={n}" for tower, given in sizes.items() for name, n in given.items()),
        f"--config.model.init_from={theirs}",
        "--config.tokenizer.kind=clip",
        f"--config.tokenizer.vocab={shared_data / 'clip_bpe' / 'bpe_simple_vocab_16e6.txt.gz'}",
        "--config.steps=1",
        "--config.batch_size=8",
        "--config.optimizer.warmup_steps=0",
        "--config.optimizer.learning_rate=0",
    ]


@pytest.mark.slow
def test_a_run_starts_from_transformers_weights_and_reports_every_tensor(start, tmp_path):
    workdir, loaded = tmp_path / "run", folders_of.parameters()
    refused = runs.main(tmp_path, *start, f"--workdir={tmp_path / 'refused'}", "--config.model.embed_dim=40")
    assert refused.returncode == 2 and refused.stderr.count("\n") == 1
    assert "do not fit the model: image/projection ([64, 24] in the weights, [64, 40] in the model)" in refused.stderr

    allowed = "--config.model.init_from_allow=('*/projection',)"
    done = runs.main(tmp_path, *start, f"--workdir={workdir}", "--config.model.embed_dim=40", allowed)
    assert done.returncode == 0, done.stderr
    positions, projections = ({f"{t}/{n}" for t in ("image", "text")} for n in ("position_embedding", "projection"))
    said = next(line for line in done.stdout.splitlines() if "tensors loaded" in line)
    assert all(f"resized {name}" in said for name in positions)
    assert all(f"initialized {name}" in said for name in projections)
    report = dict(reversed(line.split()) for line in (workdir / "init_from.txt").read_text().splitlines()[1:])
    assert {name for name, kind in report.items() if kind == "resized"} == positions
    assert {name for name, kind in report.items() if kind == "initialized"} == projections
    assert len(report) == len(jax.tree.leaves(loaded)) and set(report.values()) == {"loaded", "resized", "initialized"}

    model = clip_jax.load(workdir)  # the learning rate was 0
    for tower in ("image", "text"):
        ours, theirs = model.params[tower]["transformer"], loaded[tower]["transformer"]
        jax.tree.map(np.testing.assert_array_equal, ours, theirs)
    assert model.params["image"]["position_embedding"].shape == (17, 64)
