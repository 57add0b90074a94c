"""``clip-jax train``: ``main.py`` installed, with the shipped recipes by name."""

import re
import sys
from pathlib import Path

import pytest

from clip_jax import config as configs
from clip_jax.commands import main
from clip_jax.errors import UserError
from tests.training import runs

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture(autouse=True)
def installed(monkeypatch):
    """The program that pip installs is running."""
    monkeypatch.setattr(sys, "argv", ["bin/clip-jax"])


def test_a_shipped_recipe_is_found_by_its_name_from_anywhere(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "demo.py").write_text("get_config = None")  # not what the name means
    assert configs.to_json(configs.load("demo")) == configs.to_json(configs.load(str(ROOT / "configs/demo.py")))
    assert configs.load("own_images:folder:x", {"batch_size": "8"}).data.train == "folder:x"
    with pytest.raises(UserError, match=r"^dem0: no such recipe \(nearest: demo\).*a name of clip_bigg14, .*, emoji, "):
        configs.load("dem0")


@pytest.mark.slow
def test_it_trains_and_resumes_like_main(tmp_path, capsys):
    recipe = runs.write_recipe(tmp_path)
    command = ["train", f"--config={recipe}", f"--workdir={tmp_path}/run", "--config.steps", "2"]
    assert main([*command, "--config.optimizer.warmup_steps=0"]) == 0
    assert main(["train", f"--workdir={tmp_path}/run"]) == 0
    printed = capsys.readouterr().out
    assert "main.py" not in printed
    assert re.search(r"attention +xla \(auto, on cpu\)", printed)  # the implementation, and why it was selected
    assert (tmp_path / "run/report.html").exists()


@pytest.mark.parametrize(
    ("flags", "line"),
    [
        (["--config=demo"], "clip-jax train: --workdir is missing"),
        (["--config=demo", "--workdir=x", "--config.batch_size=0"], "clip-jax train: demo: batch_size=0 must be"),
        (["--print"], "clip-jax train: --print: give a recipe"),
    ],
)
def test_a_mistake_is_one_line_with_the_commands_name(flags, line, capsys):
    assert main(["train", *flags]) == 2
    said = capsys.readouterr().err
    assert said.startswith(line) and said.count("\n") == 1


@pytest.mark.parametrize("flag", ["--worker=x", "--work=x", "--num_processes=many"])
def test_a_mistyped_flag_is_named(flag, tmp_path, capsys):
    with pytest.raises(SystemExit) as end:
        main(["train", "--config=demo", flag])
    assert end.value.code == 2
    assert flag.partition("=")[0] in capsys.readouterr().err.splitlines()[-1]
    done = runs.main(tmp_path, "--config=demo", flag)
    assert done.returncode == 2 and done.stderr.splitlines()[-1].startswith("main.py: error: ")


def test_the_resolved_config_is_printed_with_reasons_and_nothing_is_trained(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert main(["train", "--config=demo", "--config.seed=7", "--print"]) == 0
    lines = capsys.readouterr().out.splitlines()
    found = {line[2:].partition(" = ")[0]: line for line in lines}
    assert re.fullmatch(r"\* seed = 7 +# order, crops and initialization", found["seed"])
    assert re.fullmatch(r"  optimizer\.beta1 = 0\.9", found["optimizer.beta1"])
    assert found["model.image.image_size"] == "  model.image.image_size = -1  (64)"
    assert found["eval.zero_shot.protocol"].startswith("* eval.zero_shot.protocol = 'zero_shot'")
    assert "# CLIP's; or sigmoid" in found["objectives.contrastive.loss"]
    assert found.keys() > configs.flatten(configs.load("demo")).keys()
    assert list(tmp_path.iterdir()) == []


def test_the_config_of_a_run_is_printed(small_run, capsys):
    assert main(["train", f"--workdir={small_run}", "--print"]) == 0
    assert re.search(r"^\* batch_size = 16 ", capsys.readouterr().out, re.MULTILINE)
