"""Every block of docs/models.md runs, in its order, against small models under the names of the published ones."""

import dataclasses
import re
import shlex
from pathlib import Path

import numpy as np
import pytest
from huggingface_hub import constants

from clip_jax import commands, presets
from clip_jax.command_line import split_overrides
from clip_jax.data import tokenizers
from clip_jax.interop import files, open_clip
from clip_jax.models.clip import Architecture
from clip_jax.models.text import TextTower
from clip_jax.models.vit import ImageTower
from clip_jax.presets import OPENAI, Preset
from clip_jax.training import loop
from tests import hub
from tests.data.shards import jpeg
from tests.interop import folders_of, pickles, test_big_vision

ROOT = Path(__file__).resolve().parents[1]

IMAGE = ImageTower(224, 32, 64, 2, 1, 128)  # OpenAI's heads have 64 features: by that an archive is recognised
TEXT = TextTower(77, 49408, 64, 2, 1, 128)
GELU = Preset(Architecture(IMAGE, TEXT, 24), OPENAI, "clip")
QUICK = GELU._replace(
    architecture=Architecture(*(dataclasses.replace(tower, activation="quick_gelu") for tower in (IMAGE, TEXT)), 24)
)
SHORT = {"steps": "2", "batch_size": "8", "optimizer.warmup_steps": "0"}


@pytest.fixture
def here(tmp_path, monkeypatch, shared_data):
    """A folder with the weights, photos and the Hugging Face cache that the document speaks of."""
    monkeypatch.chdir(tmp_path)
    for name, preset in {
        "ViT-B/32": GELU,
        "ViT-B/32-quickgelu": QUICK,
        "ViT-B/16-SigLIP": test_big_vision.PRESET,
    }.items():
        monkeypatch.setitem(presets.PRESETS, name, preset)
    for name in ("docs", "configs"):
        Path(name).symlink_to(ROOT / name, target_is_directory=True)
    Path("photos/train").mkdir(parents=True)
    for i in range(8):
        Path(f"photos/train/{i}.jpg").write_bytes(jpeg(i))
        Path(f"photos/train/{i}.txt").write_text(f"picture number {i}")

    vocabulary = tokenizers.clip(shared_data / "clip_bpe" / "bpe_simple_vocab_16e6.txt.gz")
    merges = "\n".join(["#version: 0.2", *(" ".join(pair) for pair in vocabulary.codec.merges)]) + "\n"
    made = Path("made")
    folders_of.open_clip_folder(made / "laion", QUICK)
    folders_of.hugging_face_folder(made / "l_14", QUICK)
    for folder in made.iterdir():
        (folder / "merges.txt").write_text(merges)
    pickled = made / "l_14_336"
    folders_of.hugging_face_folder(pickled, QUICK)
    state = dict(files.read(pickled / "model.safetensors"))
    pickles.write(pickled / "pytorch_model.bin", {name: pickles.tensor(x) for name, x in state.items()})
    (pickled / "model.safetensors").unlink()
    only_vocabulary = made / "b_32"
    only_vocabulary.mkdir()
    (only_vocabulary / "merges.txt").write_text(merges)

    cache = tmp_path / "cache"
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(cache))
    hub.publish(cache, "laion/CLIP-ViT-B-32-laion2B-s34B-b79K", made / "laion")
    hub.publish(cache, "openai/clip-vit-large-patch14-336", pickled)
    hub.publish(cache, "openai/clip-vit-base-patch32", only_vocabulary)
    weights = Path("weights")
    (made / "l_14").rename(weights.mkdir() or weights / "clip-vit-large-patch14")
    siglip = folders_of.hugging_face_folder(made / "siglip", test_big_vision.PRESET)
    assert commands.main(["export", f"--model={siglip}", "--format=bigvision", f"--to={made / 'npz'}"]) == 0
    (made / "npz" / "model.npz").rename(weights / "siglip_b16.npz")
    arrays = open_clip.from_params(folders_of.parameters(QUICK), QUICK.architecture)
    pickles.write(weights / "epoch_32.pt", {"state_dict": {name: pickles.tensor(x) for name, x in arrays.items()}})
    pickles.write_torchscript(weights / "ViT-B-32.pt", arrays)
    return tmp_path


def bash(block: str) -> None:
    for line in block.splitlines():
        program, *arguments = shlex.split(line)
        if program.endswith("clip-jax"):
            assert commands.main(arguments) == 0
            continue
        main, overrides = split_overrides(arguments)
        recipe, workdir = (
            next(a for a in main if a.startswith(f"--{name}=")).split("=")[1] for name in ("config", "workdir")
        )
        assert main[0] == "main.py" and loop.run(workdir=workdir, recipe=recipe, overrides=overrides | SHORT) == 0


@pytest.mark.slow
def test_every_block_of_the_document_runs(here, capsys, caplog):
    names, shown = {}, []
    for language, block in re.findall(r"```(\w+)\n(.*?)```", (ROOT / "docs/models.md").read_text(), re.DOTALL):
        if language == "bash":
            bash(block)
        elif language == "python":
            exec(compile(block, "docs/models.md", "exec"), names)
        else:  # what the block before it says; the sizes are those of this test's model too
            assert all(line in caplog.text for line in block.splitlines())
        shown.append(capsys.readouterr().out)
    assert names["patches"].shape == (1, 49, 64)
    assert names["last_but_one"].shape == names["last"].shape == (2, 77, 64)
    assert (names["tokens"][0, 10:] == 49407).all()
    cosines = [float(found) for found in re.findall(r"cosine ([-\d.]+)", "".join(shown))]
    assert cosines[1] > cosines[0] + 0.02
    assert "tensors loaded" in "".join(shown)
    report = Path("runs/tuned/init_from.txt").read_text().splitlines()
    assert report[0] == "weights/vit_b_32" and "loaded image/patch_embedding" in report
    assert {path.name for path in Path("exports/tuned").iterdir()} >= {"open_clip_model.safetensors", "README.md"}
    assert np.isfinite(names["pixels"]).all()
