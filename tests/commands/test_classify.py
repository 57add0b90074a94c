"""``clip-jax classify`` prints probabilities, the highest first; a user's mistake is one line and exit code 2."""

import shutil
from pathlib import Path

import pytest

from clip_jax.commands import main
from clip_jax.commands.paths import find_images
from clip_jax.errors import UserError
from tests.data.shards import jpeg

OLD_RUNS = Path(__file__).parents[1] / "data" / "old_runs"


@pytest.fixture
def run(tmp_path):
    folder = shutil.copytree(OLD_RUNS / "vit", tmp_path / "run")
    shutil.copytree(OLD_RUNS / "tokenizer", folder / "tokenizer")
    return folder


def test_it_prints_every_label_with_its_probability(run, tmp_path, capsys):
    (tmp_path / "x.jpg").write_bytes(jpeg(1))
    assert main(["classify", f"--model={run}", f"--image={tmp_path}/x.jpg", "--labels=a cat, a dog,"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == f"{tmp_path}/x.jpg"
    probabilities = [float(line.split("%")[0]) for line in lines[1:]]
    assert sorted(line.split("%")[1].strip() for line in lines[1:]) == ["a cat", "a dog"]
    assert probabilities == sorted(probabilities, reverse=True) and sum(probabilities) == pytest.approx(100, abs=0.2)


def test_labels_with_commas_come_from_the_lines_of_a_file(run, tmp_path, capsys):
    (tmp_path / "x.jpg").write_bytes(jpeg(1))
    (tmp_path / "labels.txt").write_text("a cat, asleep\n\n  a dog\n")
    command = ["classify", f"--model={run}", f"--image={tmp_path}/x.jpg", f"--labels-file={tmp_path}/labels.txt"]
    assert main(command) == 0
    lines = capsys.readouterr().out.splitlines()
    assert sorted(line.split("%")[1].strip() for line in lines[1:]) == ["a cat, asleep", "a dog"]
    assert main([*command, "--labels=a bird,a fish", "--top=1"]) == 0
    assert len(capsys.readouterr().out.splitlines()) == 2
    for wrong in ([], [f"--labels-file={tmp_path}/nowhere.txt"], [f"--labels-file={tmp_path}/x.jpg"]):
        assert main(["classify", f"--model={run}", f"--image={tmp_path}/x.jpg", *wrong]) == 2
        assert "labels" in capsys.readouterr().err


def test_images_are_files_folders_and_patterns(tmp_path, monkeypatch):
    for name in ("b.jpg", "a.JPG", "deep/er/c.png", "notes.txt", "[1], 2.jpg"):
        (tmp_path / "p" / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "p" / name).write_bytes(jpeg(0))

    def names(*given):
        return [str(path.relative_to(tmp_path / "p")) for path in find_images(given)]

    assert names(f"{tmp_path}/p") == ["[1], 2.jpg", "a.JPG", "b.jpg", "deep/er/c.png"]
    assert names(f"{tmp_path}/p/*.jpg") == ["[1], 2.jpg", "b.jpg"]
    assert names(f"{tmp_path}/p/**/*.png", f"{tmp_path}/p/b.jpg") == ["deep/er/c.png", "b.jpg"]
    assert names(f"{tmp_path}/p/[1], 2.jpg") == ["[1], 2.jpg"]  # a path that exists is a path
    monkeypatch.setenv("HOME", str(tmp_path))
    assert names("~/p/deep") == ["deep/er/c.png"]
    (tmp_path / "empty").mkdir()
    for wrong in (f"{tmp_path}/empty", f"{tmp_path}/p/*.gif"):
        with pytest.raises(UserError, match=r"no image|no file"):
            find_images([wrong])


def test_a_folder_that_is_no_run_is_an_error_of_one_line(tmp_path, capsys):
    assert main(["classify", f"--model={tmp_path}", "--image=x.jpg", "--labels=a"]) == 2
    captured = capsys.readouterr()
    assert (
        captured.out == ""
        and captured.err.count("\n") == 1
        and "neither a run folder nor one of weights" in captured.err
    )


def test_a_missing_argument_is_named(capsys):
    with pytest.raises(SystemExit) as end:
        main(["classify", "--model=x"])
    assert end.value.code == 2
    assert "--image" in capsys.readouterr().err
