"""``clip-jax push``: what would be uploaded, and what is not an export. Nothing here reaches the hub."""

import json

import pytest
from huggingface_hub import HfApi
from huggingface_hub.errors import LocalTokenNotFoundError

from clip_jax import commands
from clip_jax.interop.open_clip_config import to_preset


@pytest.fixture
def exported(small_run, tmp_path):
    folder = tmp_path / "exported"
    assert commands.main(["export", f"--model={small_run}", "--format=openclip", f"--to={folder}"]) == 0
    return folder


def tokenizer_name(folder):
    config = json.loads((folder / "open_clip_config.json").read_text())
    to_preset(config, "here")  # still a config that we read
    return config["model_cfg"]["text_cfg"]["hf_tokenizer_name"]


def test_a_dry_run_lists_the_files_and_uploads_nothing(exported, capsys, monkeypatch):
    monkeypatch.setattr(HfApi, "create_repo", None)  # a call would fail
    before = tokenizer_name(exported)
    assert commands.main(["push", str(exported), "--to=org/name", "--dry-run"]) == 0
    out = capsys.readouterr().out
    for path in exported.iterdir():
        assert path.name in out
    assert "README.md" in out and "would be uploaded to https://huggingface.co/org/name" in out
    assert tokenizer_name(exported) == before


def test_the_upload_is_the_folder_whose_tokenizer_open_clip_finds_there(exported, monkeypatch):
    calls = []
    monkeypatch.setattr(HfApi, "create_repo", lambda self, *names, **more: calls.append((names, more)))
    monkeypatch.setattr(HfApi, "upload_folder", lambda self, **more: calls.append(more) or "address")
    assert commands.main(["push", str(exported), "--to=hf://org/name", "--private"]) == 0
    assert calls[0] == (("org/name",), {"private": True, "exist_ok": True})
    assert calls[1]["repo_id"] == "org/name" and calls[1]["folder_path"] == exported
    assert tokenizer_name(exported) == "org/name"


def test_mistakes_are_one_line(exported, tmp_path, capsys, monkeypatch):
    def refused(*_, **__):
        raise LocalTokenNotFoundError("no token\nand more lines")

    monkeypatch.setattr(HfApi, "create_repo", refused)
    (tmp_path / "empty").mkdir()
    (tmp_path / "card").mkdir()
    (tmp_path / "card" / "README.md").write_text("a card")
    for folder, to, message in (
        (tmp_path / "empty", "org/name", "no model card"),
        (tmp_path / "card", "org/name", "has no weights"),
        (exported, "org/name/more", "not the name of a repository"),
        (exported, "org/name", "hf auth login"),
    ):
        capsys.readouterr()
        assert commands.main(["push", str(folder), f"--to={to}"]) == 2
        error = capsys.readouterr().err
        assert message in error and error.count("\n") == 1
