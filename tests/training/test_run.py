"""What a run leaves behind, and what it refuses before it starts."""

import json
import os
import re
from types import SimpleNamespace

import pytest

from clip_jax import __version__
from clip_jax.data.order import mix
from clip_jax.data.sources.mixture import open_mixture
from clip_jax.data.sources.shapes import open_shapes
from clip_jax.data.tokenizers import train_sentencepiece
from clip_jax.devices.sharding import make_mesh
from clip_jax.errors import UserError
from clip_jax.training import console, loop
from clip_jax.training.metrics import Writer, evaluated, forget, truncate
from tests.data.shards import jpeg, write_shard
from tests.training import runs


def test_a_run_leaves_its_config_metrics_checkpoints_tokenizer_and_report(small_run):
    run = json.loads((small_run / "run.json").read_text())
    assert run["clip_jax_version"] == __version__
    assert run["config"]["optimizer"]["warmup_steps"] == 3 and run["config"]["mesh"]["data"] == -1
    assert run["data"]["train"]["samples"] == 50 and run["model"]["parameters"]["total"] > 10_000
    assert (small_run / "tokenizer" / "sentencepiece.model").exists()
    assert (small_run / "report.html").read_text().count("data:image/") >= 10
    assert sorted(int(p.name) for p in (small_run / "checkpoints").iterdir()) == [9, 12]  # the last two
    assert any((small_run / "tensorboard").iterdir())


def test_metrics_have_a_line_a_step_and_one_an_evaluation(small_run):
    lines = [json.loads(line) for line in (small_run / "metrics.jsonl").read_text().splitlines()]
    train = [line for line in lines if "train/loss" in line]
    assert [line["step"] for line in train] == list(range(1, 13))
    assert [line["step"] for line in lines if "eval/held_out/loss" in line] == [5, 10, 12]
    assert train[-1]["train/pairs"] == 12 * 16
    wanted = {
        "loss",
        "accuracy",
        "grad_norm",
        "param_norm",
        "update_norm",
        "logit_scale",
        "learning_rate",
        "pairs",
        "flops",
    }
    assert wanted | {"pairs_per_second", "data_wait_share"} <= {name.removeprefix("train/") for name in train[-1]}
    last = lines[-1]
    assert (
        last["eval/held_out/images"] == 13 and 0 <= last["eval/held_out/i2t_R@1"] <= last["eval/held_out/i2t_R@10"] <= 1
    )


def test_the_first_loss_is_about_the_logarithm_of_the_batch(small_run):
    assert runs.metrics(small_run)[0]["train/loss"] == pytest.approx(2.77, abs=1.0)


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (
            {"batch_size": "12"},
            "config.batch_size=12 does not divide over 8 devices (data x fsdp); the nearest that does is",
        ),
        ({"optimizer.warmup_steps": "13"}, "13 steps of warm-up in a run of 12"),
        ({"epochs": "0.1"}, "the run has no step: 50 samples at batch_size=16"),
        ({"mesh.fsdp": "3"}, "does not divide over 8 devices"),
        ({"data.train": "tar:nowhere"}, "nowhere: no such shard"),
        ({"data.train": "tfds:coco_captions", "data.tfds_dir": "nowhere"}, "coco_captions is not in nowhere"),
        (
            {"eval.pets.source": "shapes:train", "eval.pets.protocol": "zero_shot"},
            "its examples have no labels to classify",
        ),
        (
            {"eval.p.protocol": "probe", "eval.p.source": "shapes:zero_shot", "eval.p.train": "shapes:train"},
            "config.eval.p.train=shapes:train: its classes are not those of shapes:zero_shot",
        ),
        ({"data.caption": "captoin"}, "captoin: no .json that was tried has text in this field (nearest: caption)"),
        ({"data.caption": "tag", "eval.held_out.caption": "tags"}, "with text there are caption, captions.de, tags"),
        ({"model.text.vocab_size": "40"}, "vocab_size=40 is too small"),
        ({"tokenizer.kind": "clip", "tokenizer.vocab": "nowhere.gz"}, "nowhere.gz: no such file"),
    ],
)
def test_what_cannot_work_is_refused_before_anything_heavy(tmp_path, overrides, message):
    with pytest.raises(UserError, match=re.escape(message)):
        loop.run(workdir=str(tmp_path / "run"), recipe=str(runs.write_recipe(tmp_path)), overrides=overrides)
    assert not (tmp_path / "run" / "run.json").exists()


def test_a_folder_and_its_run_belong_together(small_run, tmp_path):
    recipe = str(small_run.parent / "recipe.py")
    with pytest.raises(UserError, match=r"holds a run with other settings \(seed\)"):
        loop.run(workdir=str(small_run), recipe=recipe, overrides={"seed": "4"})
    with pytest.raises(UserError, match="holds no run yet"):
        loop.run(workdir=str(tmp_path), recipe=None, overrides={})
    with pytest.raises(UserError, match="--workdir is missing"):
        loop.run(workdir=None, recipe=recipe, overrides={})
    with pytest.raises(UserError, match="is a file"):
        loop.run(workdir=recipe, recipe=recipe, overrides={})


def test_a_folder_that_cannot_be_used_is_one_line(tmp_path):
    recipe = runs.write_recipe(tmp_path)
    for workdir in ("/sys/clip_jax_run", f"{recipe}/run"):
        with pytest.raises(UserError, match=rf"^{workdir}: .*: change the permissions or name another folder"):
            loop.run(workdir=workdir, recipe=str(recipe), overrides={})


def test_the_users_home_is_meant_by_a_tilde(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    runs.write_recipe(tmp_path)
    overrides = {"data.train": "tar:~/train", "tokenizer.vocab": "~/a.model", "eval.a.source": "folder:~/x"}
    overrides |= {"eval.a.protocol": "probe", "eval.a.train": "folder:~/y"}
    folder, config, _ = loop.read_config("~/run", "~/recipe.py", overrides)
    assert folder.path == tmp_path / "run" and str(folder) == str(tmp_path / "run")
    assert (config.data.train, config.tokenizer.vocab) == (f"tar:{tmp_path}/train", f"{tmp_path}/a.model")
    assert (config.eval.a.source, config.eval.a.train) == (f"folder:{tmp_path}/x", f"folder:{tmp_path}/y")


@pytest.mark.exhaustive  # test_resume.py has a mixture that is killed
def test_a_run_over_a_mixture_learns_from_all_its_sources(tmp_path, capsys):
    recipe = runs.write_recipe(tmp_path)
    train = f'(("tar:{tmp_path}/train", 1.0), ("tar:{tmp_path}/held_out", 2.0, "captions.de"), ("shapes:heldout", 0.1))'
    overrides = {"data.train": train, "epochs": "2.0", "eval.held_out.source": "", "log.tensorboard": "False"}
    assert loop.run(workdir=str(tmp_path / "run"), recipe=str(recipe), overrides=overrides) == 0
    lines = [json.loads(line) for line in (tmp_path / "run" / "samples.0.jsonl").read_text().splitlines()]
    used = [index for line in lines for index in line["samples"]]
    assert len(lines) == (50 + 2 * 13 + 51) * 2 // 16  # an epoch is the sum of weight * samples
    counts = [sum(first <= i < last for i in used) for first, last in ((0, 50), (50, 63), (63, 575))]
    assert [round(count / len(used), 1) for count in counts] == [0.4, 0.2, 0.4]
    assert f"tar:{tmp_path}/held_out x 2" in (tmp_path / "run" / "run.json").read_text()


@pytest.mark.parametrize(
    ("pairs", "said"),
    [
        (256, None),
        (12, "only 12 pairs: each is up to 22 times in a batch, as its own negative; set config.batch_size=8"),
        (3, "train on fewer devices, or on 8 pairs or more"),
    ],
)
def test_a_batch_larger_than_the_data_is_warned_of_with_the_batch_to_take(pairs, said):
    run = SimpleNamespace(config=SimpleNamespace(batch_size=256), train=range(pairs), mesh=make_mesh())
    warnings = console.repeated_pairs(run)
    assert warnings == () if said is None else said in warnings[0]


def test_a_small_source_of_a_mixture_that_fills_too_much_of_a_batch_is_warned_of():
    parts = [open_shapes("heldout", examples=4), open_shapes("train", examples=1000)]

    def warnings(weight: float) -> tuple[str, ...]:
        batches = SimpleNamespace(order=mix([4, 1000], [weight, 1.0], 64, seed=0))
        run = {
            "config": SimpleNamespace(batch_size=64),
            "mesh": make_mesh(),
            "phases": [SimpleNamespace(batches=batches)],
        }
        return console.repeated_pairs(SimpleNamespace(**run, train=open_mixture(parts, (weight, 1.0))))

    assert warnings(1.0) == ()
    (said,) = warnings(50.0)
    assert said.startswith("WARNING: 10 pairs of a batch are from the 4 of shapes:heldout")


@pytest.mark.slow
def test_a_run_reports_what_it_leaves_out_and_evaluates_on_labels_alone(tmp_path, capsys):
    """Captions for training are in the .json, the classes have none; a name is Latin-1, an image broken."""
    recipe, photos = str(runs.write_recipe(tmp_path)), tmp_path / "photos"
    photos.mkdir()
    for i in range(20):
        (photos / f"{i}.jpg").write_bytes(jpeg(i))
        (photos / f"{i}.json").write_text(json.dumps({"caption": f"picture number {i}"}))
    broken = os.fsdecode(b"caf\xe9")
    (photos / f"{broken}.jpg").write_bytes(b"<html>")
    (photos / f"{broken}.json").write_text('{"caption": "not an image"}')
    (photos / "alone.gif").write_bytes(b"")
    (tmp_path / "pets").mkdir()
    write_shard(tmp_path / "pets" / "0.tar", [{"jpg": jpeg(i), "cls": str(i % 2).encode()} for i in range(4)])
    (tmp_path / "pets" / "classnames.txt").write_text("cat\ndog\n")
    overrides = {
        **{"steps": "2", "optimizer.warmup_steps": "0", "batch_size": "24", "data.caption": "caption"},
        **{"data.train": f"folder:{photos}", "eval.held_out.source": "", "checkpoint.every_steps": "-1"},
        **{"eval.pets.source": f"tar:{tmp_path}/pets", "eval.pets.protocol": "zero_shot"},
    }
    assert loop.run(workdir=str(tmp_path / "run"), recipe=recipe, overrides=overrides) == 0
    printed = capsys.readouterr().out
    assert "left out: 1 images without a caption (first: alone.gif)" in " ".join(printed.split())
    assert "set config.batch_size=16" in " ".join(printed.split())
    assert "caf\\xe9.jpg: undecodable image" in (tmp_path / "run" / "bad_samples.txt").read_text()
    assert 0 <= runs.metrics(tmp_path / "run")[-1]["eval/pets/zero_shot_top1"] <= 1


def test_an_evaluation_without_a_usable_example_is_one_line_before_the_first_step(tmp_path):
    recipe = str(runs.write_recipe(tmp_path))
    write_shard(tmp_path / "held_out" / "train-00000.tar", [{"jpg": b"no picture", "txt": b"a"}] * 5)
    with pytest.raises(UserError, match=r"none of 5 examples can be used \(5 undecodable"):
        loop.run(workdir=str(tmp_path / "run"), recipe=recipe, overrides={})
    assert not (tmp_path / "run" / "metrics.jsonl").exists()


@pytest.mark.slow
def test_main_answers_a_mistake_with_one_line_and_code_2(tmp_path):
    recipe = runs.write_recipe(tmp_path)
    done = runs.main(tmp_path, f"--config={recipe}", "--workdir=run", "--config.optimizer.learnin_rate=1")
    assert done.returncode == 2
    assert done.stderr.strip() == (
        "main.py: --config.optimizer.learnin_rate=1: optimizer.learnin_rate is not a setting "
        "(nearest: optimizer.learning_rate)"
    )


@pytest.mark.slow
def test_a_loss_that_is_not_finite_ends_with_code_43_and_no_checkpoint(tmp_path, capsys):
    start = {"workdir": str(tmp_path / "run"), "recipe": str(runs.write_recipe(tmp_path))}
    assert loop.run(**start, overrides={"optimizer.learning_rate": "1e30"}) == 43
    said = capsys.readouterr().out
    assert "is not finite; lower config.optimizer.learning_rate" in said and "and repeat the command" in said
    assert list((tmp_path / "run" / "checkpoints").glob("[0-9]*")) == []
    assert loop.run(**start, overrides={"steps": "3"}) == 0  # what the line says; nothing was saved yet
    assert "begins anew with the changed settings (optimizer.learning_rate)" in capsys.readouterr().out
    # Once a step is saved, its weights are the way out, in another folder (test_a_run_may_start_from_another...).
    with pytest.raises(UserError, match="with other settings"):
        loop.run(**start, overrides={"optimizer.learning_rate": "1e-4"})


@pytest.mark.slow
def test_a_state_that_is_not_finite_is_found_before_an_evaluation(tmp_path, capsys):
    overrides = {"optimizer.learning_rate": "1e30", "log.every_steps": "1000", "eval.held_out.every_steps": "3"}
    recipe = str(runs.write_recipe(tmp_path))
    assert loop.run(workdir=str(tmp_path / "run"), recipe=recipe, overrides=overrides) == 43
    assert "is not finite" in capsys.readouterr().out


def test_metrics_are_cut_to_the_restored_step_and_half_a_line_is_dropped(tmp_path):
    file = tmp_path / "metrics.jsonl"
    writer = Writer(tmp_path, enabled=True, tensorboard=False, first_step=0)
    for step in (1, 2, 3):
        writer.write(step, {"train/loss": float(step)})
    writer.close()
    with open(file, "a") as handle:
        handle.write('{"step": 4, "tr')
    truncate(file, 2)
    assert file.read_text() == '{"step": 1, "train/loss": 1.0}\n{"step": 2, "train/loss": 2.0}\n'


def test_an_evaluation_is_forgotten_also_where_a_kill_left_half_a_line(tmp_path):
    """A restart with another evaluation looks at the file before it is cut to the checkpoint."""
    file, results = tmp_path / "metrics.jsonl", {"eval/a/loss": 1.0, "eval/b/loss": 2.0}
    file.write_text(
        json.dumps({"step": 1, **results}) + "\n" + json.dumps({"step": 2, **results}) + '\n{"step": 2, "ev'
    )
    assert evaluated(file, 2) == {"a", "b"} and evaluated(tmp_path / "none", 2) == set()
    forget(file, 2, ["a"])
    assert evaluated(file, 2) == {"b"} and evaluated(file, 1) == {"a", "b"}


def test_a_value_that_is_not_finite_is_null_in_valid_json(tmp_path):
    writer = Writer(tmp_path, enabled=True, tensorboard=False, first_step=0)
    writer.write(1, {"train/loss": float("nan")})
    assert json.loads((tmp_path / "metrics.jsonl").read_text()) == {"step": 1, "train/loss": None}


@pytest.mark.slow
def test_a_run_with_the_sigmoid_loss_has_a_bias_and_evaluates_with_it(tmp_path):
    overrides = {"objectives.contrastive.loss": "sigmoid", "steps": "4", "model.patch_dropout": "0.5"}
    recipe = str(runs.write_recipe(tmp_path))
    assert loop.run(workdir=str(tmp_path / "run"), recipe=recipe, overrides=overrides) == 0
    lines = runs.metrics(tmp_path / "run")
    assert lines[0]["train/logit_scale"] == pytest.approx(10, rel=1e-5)
    assert lines[0]["train/logit_bias"] == pytest.approx(-10, rel=1e-5)
    # At the start every pair costs about 10 - 10 cos and all else next to nothing.
    assert lines[0]["train/loss"] == pytest.approx(10, abs=6)
    assert "eval/held_out/loss" in lines[-1]


@pytest.mark.slow
def test_a_run_may_start_from_another_runs_weights(small_run, tmp_path, capsys):
    """Its first step has the loss of the trained model, not of a fresh one; what does not fit is refused by name."""
    recipe = str(small_run.parent / "recipe.py")
    start = {"model.init_from": str(small_run), "steps": "1", "optimizer.warmup_steps": "0"}
    assert loop.run(workdir=str(tmp_path / "run"), recipe=recipe, overrides=start) == 0
    printed = capsys.readouterr().out
    assert "tensors loaded" in printed and "no preset for cpu" in printed
    trained = runs.metrics(small_run)[-2]
    first = runs.metrics(tmp_path / "run")[0]
    assert first["train/logit_scale"] == pytest.approx(trained["train/logit_scale"], rel=1e-3)
    assert first["train/logit_scale"] != pytest.approx(1 / 0.07, rel=1e-3)  # where a fresh model starts
    lines = (tmp_path / "run" / "init_from.txt").read_text().splitlines()
    assert lines[0] == str(small_run) and len(lines) > 30 and all(line.startswith("loaded ") for line in lines[1:])
    other = start | {"model.embed_dim": "20"}
    with pytest.raises(UserError, match="weights that do not fit the model: image/projection"):
        loop.run(workdir=str(tmp_path / "other"), recipe=recipe, overrides=other)


@pytest.mark.slow
def test_a_run_that_starts_from_another_takes_its_vocabulary_or_is_refused(small_run, tmp_path):
    """Each run learns its own pieces: the same ids would be other words."""
    folder = tmp_path / "photos"
    folder.mkdir()
    for i in range(16):
        (folder / f"{i}.jpg").write_bytes(jpeg(i))
        (folder / f"{i}.txt").write_text(f"something else, {i} of them")
    recipe, workdir = str(small_run.parent / "recipe.py"), tmp_path / "run"
    start = {"model.init_from": str(small_run), "steps": "1", "optimizer.warmup_steps": "0"}
    start |= {"data.train": f"folder:{folder}", "eval.held_out.source": f"folder:{folder}"}
    other = tmp_path / "other.model"
    train_sentencepiece([f"something else, {i} of them" for i in range(16)], 320, other)
    with pytest.raises(UserError, match=r"tokenizer \(another vocabulary than.*empty --config\.tokenizer\.vocab= "):
        overrides = start | {"tokenizer.vocab": str(other), "model.init_from_allow": "('text/token_embedding',)"}
        loop.run(workdir=str(tmp_path / "refused"), recipe=recipe, overrides=overrides)
    assert loop.run(workdir=str(workdir), recipe=recipe, overrides=start | {"tokenizer.vocab": ""}) == 0
    ours, theirs = (folder / "tokenizer" / "sentencepiece.model" for folder in (workdir, small_run))
    assert ours.read_bytes() == theirs.read_bytes()
