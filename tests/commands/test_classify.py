"""``clip-jax classify`` prints probabilities, the highest first; a mistake is one line and code 2."""

import pytest

from clip_jax.commands import main
from tests.data.shards import jpeg


def test_it_prints_every_label_with_its_probability(small_run, tmp_path, capsys):
    (tmp_path / "x.jpg").write_bytes(jpeg(1))
    assert main(["classify", f"--model={small_run}", f"--image={tmp_path}/x.jpg", "--labels=a cat, a dog,"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == f"{tmp_path}/x.jpg"
    shares = [float(line.split("%")[0]) for line in lines[1:]]
    assert sorted(line.split("%")[1].strip() for line in lines[1:]) == ["a cat", "a dog"]
    assert shares == sorted(shares, reverse=True) and sum(shares) == pytest.approx(100, abs=0.2)


def test_a_mistake_is_one_line(tmp_path, capsys):
    assert main(["classify", f"--model={tmp_path}", "--image=x.jpg", "--labels=a"]) == 2
    captured = capsys.readouterr()
    assert captured.out == "" and captured.err.count("\n") == 1 and "not a run folder" in captured.err


def test_a_missing_argument_is_explained(capsys):
    with pytest.raises(SystemExit) as end:
        main(["classify", "--model=x"])
    assert end.value.code == 2
    assert "--image" in capsys.readouterr().err
