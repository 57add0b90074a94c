"""``clip-jax classify`` prints probabilities, the highest first; a user's mistake is one line and exit code 2."""

import shutil
from pathlib import Path

import pytest

from clip_jax.commands import main
from tests.data.shards import jpeg

OLD_RUNS = Path(__file__).parents[1] / "data" / "old_runs"


def test_it_prints_every_label_with_its_probability(tmp_path, capsys):
    run = shutil.copytree(OLD_RUNS / "vit", tmp_path / "run")
    shutil.copytree(OLD_RUNS / "tokenizer", run / "tokenizer")
    (tmp_path / "x.jpg").write_bytes(jpeg(1))
    assert main(["classify", f"--model={run}", f"--image={tmp_path}/x.jpg", "--labels=a cat, a dog,"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == f"{tmp_path}/x.jpg"
    probabilities = [float(line.split("%")[0]) for line in lines[1:]]
    assert sorted(line.split("%")[1].strip() for line in lines[1:]) == ["a cat", "a dog"]
    assert probabilities == sorted(probabilities, reverse=True) and sum(probabilities) == pytest.approx(100, abs=0.2)


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
