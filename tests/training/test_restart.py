"""What a start in the folder of a run may change, and what it refuses."""

import json
import math
import os
import re
import shutil
from pathlib import Path

import pytest

from clip_jax.config import evaluation
from clip_jax.data.sources.tar import open_tar
from clip_jax.errors import UserError
from clip_jax.storage import lock, run_folder
from clip_jax.storage.checkpoints import latest_step
from clip_jax.training import budget, loop, restart
from tests.data.shards import jpeg, sample, write_shard
from tests.training import runs


def test_two_runs_in_one_folder_are_one_too_many(small_run, tmp_path):
    recipe, workdir = str(small_run.parent / "recipe.py"), tmp_path / "run"
    workdir.mkdir()
    message = rf"^{workdir} is in use by process {os.getpid()} on "
    with lock.locked("the first", workdir, None), pytest.raises(UserError, match=message):
        loop.run(workdir=str(workdir), recipe=recipe, overrides={})
    assert list(workdir.iterdir()) == []
    assert not (small_run / lock.FILE).exists()  # a run that ends releases its folder


def test_a_run_that_began_while_this_one_waited_is_not_overwritten(small_run, tmp_path):
    folder = run_folder.Folder(str(tmp_path))
    shutil.copy(small_run / "run.json", tmp_path)
    with pytest.raises(UserError, match="another run has just started or ended here"), restart.hold(folder, None, None):
        pass


def test_a_run_does_not_go_on_with_other_data(small_run, tmp_path):
    copy = tmp_path / "run"
    shutil.copytree(small_run, copy)
    run = json.loads((copy / "run.json").read_text())
    write_shard(tmp_path / "other.tar", [sample(i) for i in range(50)])
    run["config"]["data"]["train"] = f"tar:{tmp_path}/other.tar"
    (copy / "run.json").write_text(json.dumps(run))
    way_out = "if it was mended, continue with --config.data.changed=accept"
    with pytest.raises(UserError, match=f"is not the data this run began with.* {way_out}"):
        loop.run(workdir=str(copy), recipe=None, overrides={})
    assert loop.run(workdir=str(copy), recipe=None, overrides={"data.changed": "accept"}) == 0
    assert loop.run(workdir=str(copy), recipe=None, overrides={}) == 0  # the new one is known
    run = json.loads((copy / "run.json").read_text())
    run["data"]["train"]["fingerprint"] = "of a third one"  # which nobody has accepted
    (copy / "run.json").write_text(json.dumps(run))
    with pytest.raises(UserError, match=way_out):
        loop.run(workdir=str(copy), recipe=None, overrides={})


@pytest.mark.slow
def test_both_ways_out_of_bad_data_work(tmp_path, monkeypatch):
    """Every fifth image is a web page: the run keeps what it saved, and a higher bound or mended data continue it."""
    monkeypatch.setattr(budget, "JUDGED_AFTER", 3 * 16)
    recipe, photos = str(runs.write_recipe(tmp_path)), tmp_path / "photos"
    photos.mkdir()
    for i in range(40):
        (photos / f"{i}.jpg").write_bytes(b"<html>" if i % 5 == 0 else jpeg(i))
        (photos / f"{i}.txt").write_text(f"picture {i}")
    overrides = {"data.train": f"folder:{photos}", "data.workers": "1", "data.prefetch": "1", "steps": "4"}
    overrides |= {"checkpoint.every_steps": "1", "eval.held_out.source": ""}
    start = {"workdir": str(tmp_path / "run"), "recipe": recipe}
    with pytest.raises(UserError, match=r"repair the data, or raise config\.data\.max_bad_share"):
        loop.run(**start, overrides=overrides)
    assert latest_step(tmp_path / "run") == 2  # the save in flight too
    shutil.copytree(tmp_path / "run", tmp_path / "mended")
    assert loop.run(**start, overrides=overrides | {"data.max_bad_share": "0.5"}) == 0
    for i in range(0, 40, 5):
        (photos / f"{i}.jpg").write_bytes(jpeg(i))
    start["workdir"] = str(tmp_path / "mended")
    with pytest.raises(UserError, match=r"if it was mended, continue with --config\.data\.changed=accept"):
        loop.run(**start, overrides=overrides)
    assert loop.run(**start, overrides=overrides | {"data.changed": "accept"}) == 0
    for workdir in ("run", "mended"):
        assert [line["step"] for line in runs.metrics(tmp_path / workdir)] == [1, 2, 3, 4]


@pytest.mark.slow
def test_an_evaluation_is_another_one_by_every_field_but_its_schedule_and_batch_size():
    assert {*restart.RESULT} == {*evaluation()} - {"batch_size", "every_steps", "every_examples", "every_epochs"}


@pytest.mark.slow
def test_a_finished_run_is_evaluated_on_what_it_lacks(small_run, tmp_path):
    """A source in place of another, and one more; at the next start nothing is lacking."""
    copy = shutil.copytree(small_run, tmp_path / "run")
    (source,) = {run["config"]["eval"]["held_out"]["source"] for run in [json.loads((copy / "run.json").read_text())]}
    other = source.replace("held_out", "train")
    assert loop.run(workdir=str(copy), recipe=None, overrides={"eval.held_out.source": other}) == 0
    last = runs.metrics(copy)[-1]
    assert (last["step"], last["eval/held_out/images"]) == (12, 50)
    assert loop.run(workdir=str(copy), recipe=None, overrides={"eval.more.source": source}) == 0
    lines = runs.metrics(copy)
    assert lines[-1]["eval/more/images"] == 13 and "eval/held_out/images" not in lines[-1]
    assert lines[-1]["eval/more/loss"] == runs.metrics(small_run)[-1]["eval/held_out/loss"]
    assert loop.run(workdir=str(copy), recipe=None, overrides={}) == 0
    assert runs.metrics(copy) == lines


@pytest.mark.slow
def test_a_finished_run_is_made_longer_and_says_what_becomes_of_its_schedule(small_run, tmp_path, capsys):
    copy = shutil.copytree(small_run, tmp_path / "run")
    assert loop.run(workdir=str(copy), recipe=None, overrides={"steps": "15"}) == 0
    said = re.search(
        r"now 15 steps in place of 12. .* \(cosine\): at step 12 it was to be (\S+) and", capsys.readouterr().out
    )
    lines = runs.metrics(copy)
    rates = {line["step"]: line["train/learning_rate"] for line in lines if "train/loss" in line}
    assert list(rates) == list(range(1, 16)) and lines[-1]["step"] == 15 and "eval/held_out/loss" in lines[-1]
    assert float(said[1]) == pytest.approx(rates[12], rel=1e-2)
    peak = 5e-4
    assert rates[13] == pytest.approx(peak / 2 * (1 + math.cos(math.pi * (12 - 3) / (15 - 3))), rel=1e-4)
    with pytest.raises(UserError, match="a run of 15 steps, and this would make it 12; it can be made longer"):
        loop.run(workdir=str(copy), recipe=None, overrides={"steps": "12"})


@pytest.mark.slow
def test_a_cooldown_starts_from_a_finished_run_of_a_constant_rate(small_run, tmp_path):
    """Warm-up, stable, decay: as many short runs as wanted from one long one (Hägele et al. 2024, section 3)."""
    recipe, workdir = str(small_run.parent / "recipe.py"), str(tmp_path / "run")
    constant = {"optimizer.schedule": "constant", "steps": "5", "eval.held_out.source": ""}
    assert loop.run(workdir=workdir, recipe=recipe, overrides=constant) == 0
    cooldown = {"optimizer.schedule": "wsd", "optimizer.cooldown_steps": "4", "optimizer.cooldown_form": "1-sqrt"}
    with pytest.raises(UserError, match=r"other settings .*optimizer\.cooldown_steps.*optimizer\.schedule"):
        loop.run(workdir=workdir, recipe=None, overrides=cooldown)  # of the five steps, it would change the last three
    assert loop.run(workdir=workdir, recipe=None, overrides=cooldown | {"steps": "9"}) == 0
    rates = [line["train/learning_rate"] / 5e-4 for line in runs.metrics(tmp_path / "run")]
    expected = [1 / 3, 2 / 3, 1, 1, 1, *(1 - math.sqrt(k / 4) for k in range(4))]
    assert rates == pytest.approx(expected, rel=1e-5)
    assert loop.run(workdir=workdir, recipe=None, overrides={}) == 0  # it is now the run's own schedule


def copy_with_data(small_run, tmp_path) -> tuple[Path, Path]:
    """A finished run and its training shards, of which the copy knows only the copy."""
    data, workdir = tmp_path / "train", tmp_path / "run"
    shutil.copytree(small_run.parent / "train", data)
    shutil.copytree(small_run, workdir)
    run = json.loads((workdir / "run.json").read_text())
    run["config"]["data"]["train"] = f"tar:{data}"
    (workdir / "run.json").write_text(json.dumps(run))
    return workdir, data


def test_a_shard_with_other_pairs_and_the_same_size_is_other_data(small_run, tmp_path):
    workdir, data = copy_with_data(small_run, tmp_path)
    shard, before = data / "train-00000.tar", (data / "train-00000.tar").stat().st_size
    write_shard(shard, [sample(i, f"picture numer  {i}") for i in reversed(range(25))])
    assert shard.stat().st_size == before
    with pytest.raises(UserError, match="is not the data this run began with"):
        loop.run(workdir=str(workdir), recipe=None, overrides={})


def test_a_run_that_recorded_names_and_sizes_goes_on_and_records_content(small_run, tmp_path, capsys):
    workdir, data = copy_with_data(small_run, tmp_path)
    run = json.loads((workdir / "run.json").read_text())
    new = run["data"]["train"]["fingerprint"]
    run["data"]["train"]["fingerprint"] = open_tar(str(data)).former_fingerprint
    (workdir / "run.json").write_text(json.dumps(run))
    assert loop.run(workdir=str(workdir), recipe=None, overrides={}) == 0
    assert "also records its content" in capsys.readouterr().out
    assert json.loads((workdir / "run.json").read_text())["data"]["train"]["fingerprint"] == new
    assert loop.run(workdir=str(workdir), recipe=None, overrides={}) == 0
    assert "also records its content" not in capsys.readouterr().out


@pytest.mark.parametrize("with_recipe", [False, True])
def test_a_run_that_older_code_began_goes_on(small_run, tmp_path, capsys, with_recipe):
    copy = tmp_path / "run"
    shutil.copytree(small_run, copy)
    run = json.loads((copy / "run.json").read_text())
    del run["config"]["ema_decay"], run["config"]["mesh"]["slices"]  # settings that came later
    (copy / "run.json").write_text(json.dumps(run))
    recipe = str(small_run.parent / "recipe.py") if with_recipe else None
    assert loop.run(workdir=str(copy), recipe=recipe, overrides={}) == 0
    assert "begun by older code, which had no ema_decay, mesh.slices" in capsys.readouterr().out
