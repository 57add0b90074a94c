"""``clip-jax caption`` prints one caption per image; a mistake is one line and exit code 2."""

import shutil
from pathlib import Path

import pytest

from clip_jax import load
from clip_jax.commands import main
from clip_jax.models.clip import CLIP
from clip_jax.objectives import captioning
from tests.data.shards import jpeg
from tests.models.test_clip import params_of

OLD_RUNS = Path(__file__).parents[1] / "data" / "old_runs"


@pytest.mark.slow
def test_a_caption_per_image_from_a_model_with_a_decoder(tmp_path, monkeypatch, capsys):
    shutil.copytree(OLD_RUNS / "vit", tmp_path / "run")
    shutil.copytree(OLD_RUNS / "tokenizer", tmp_path / "run" / "tokenizer")
    for i in range(2):
        (tmp_path / f"{i}.jpg").write_bytes(jpeg(i))
    command = ["caption", f"--model={tmp_path / 'run'}", f"--image={tmp_path}/*.jpg", "--max-tokens=4", "--beams=2"]
    assert main(command) == 2
    assert "has no decoder; models trained with objectives.captioning" in capsys.readouterr().err

    model = load(tmp_path / "run")
    architecture = captioning.adapt(captioning.SPEC.defaults, model.preset.architecture)
    with_decoder = CLIP(architecture)
    preset = model.preset._replace(architecture=architecture)
    params = model.params | {"decoder": params_of(with_decoder)["decoder"]}
    captioner = type(model)("made", preset, with_decoder, params, model.open_tokenizer, step=1)
    monkeypatch.setattr("clip_jax.model.load", lambda name: captioner)
    assert main(command) == 0
    lines = [line.split("\t") for line in capsys.readouterr().out.splitlines()]
    assert [line[0] for line in lines] == [f"{tmp_path}/{i}.jpg" for i in range(2)]
    assert [line[1] for line in lines] == captioner.generate([line[0] for line in lines], max_tokens=4, beams=2)
    for wrong, message in (
        ("--beams=0", "beams=0 must be at least 1"),
        ("--max-tokens=0", "max_tokens=0 must be at least 1"),
        ("--top-p=0", "above 0, and top_p at most 1"),
    ):
        assert main([*command, wrong]) == 2
        assert message in capsys.readouterr().err
