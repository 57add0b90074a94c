"""Two processes resume a run over a switch of objectives, with every objective in it, and train as one process does."""

import shutil

import numpy as np
import pytest

import clip_jax
from clip_jax.training import loop
from tests.objectives.test_distillation import written
from tests.training import runs
from tests.training.test_resume import run_together

SWITCH, STEPS = 2, 4


@pytest.mark.slow
def test_two_processes_killed_before_a_switch_of_objectives_train_as_one_that_was_not(small_run, tmp_path):
    _, stored = written(small_run, tmp_path)
    added = {
        "start": SWITCH,
        "objectives.captioning.weight": 0.5,
        "objectives.captioning.layers": 1,
        "objectives.distillation.weight": 0.5,
        "objectives.distillation.stored": str(stored),
        "objectives.distillation.features": 1.0,
    }
    overrides = {
        "steps": str(STEPS),
        "objectives.contrastive.positives": "captions",
        "objectives.contrastive.negatives": "1",
        "objectives.contrastive.label_smoothing": "0.1",
        "phases": repr((added,)),
        "mesh.fsdp": "2",
        "eval.held_out.source": "",
        "checkpoint.every_steps": "1",
        "checkpoint.keep_last": str(STEPS),
        "log.tensorboard": "False",
    }
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    assert loop.run(workdir=str(whole), recipe=str(small_run.parent / "recipe.py"), overrides=overrides) == 0
    shutil.copytree(whole, killed)
    for step in range(SWITCH, STEPS + 1):
        shutil.rmtree(killed / "checkpoints" / str(step))
    run_together(tmp_path, 2, f"--workdir={killed}", "--config.mesh.cpu_devices=4")
    expected, found = runs.metrics(whole), runs.metrics(killed)
    assert [line["step"] for line in found] == [line["step"] for line in expected] == list(range(1, STEPS + 1))
    for ours, theirs in zip(found, expected, strict=True):
        names = {"captioning/loss", "distillation/loss", "distillation/features"}
        assert all((f"train/{name}" in ours) == (ours["step"] > SWITCH) for name in names)
        assert ours == pytest.approx(theirs, rel=1e-4, abs=1e-5)
    model = clip_jax.load(killed)
    assert "objectives" not in model.params and len(model.generate(np.zeros((2, 64, 64, 3), np.uint8))) == 2
    assert "decoder" not in clip_jax.load(killed, step=SWITCH - 1).params
