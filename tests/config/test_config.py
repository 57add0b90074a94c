"""A config is checked before anything heavy starts; every mistake is one line that names the key and the way out."""

import ast
import re
from pathlib import Path

import pytest

from clip_jax import config as configs
from clip_jax.config import (
    AUTO,
    check_lengths,
    defaults,
    differences,
    duration,
    from_json,
    later_settings,
    load,
    override,
    to_json,
)
from clip_jax.config.flat import flatten, siblings
from clip_jax.data.sources import open_source
from clip_jax.data.sources.mixture import open_mixture
from clip_jax.errors import UserError
from clip_jax.evaluation.protocols import PROTOCOLS
from clip_jax.objectives import contrastive
from clip_jax.settings import EVALUATION_CHOICES, choices, ranges

PACKAGE = Path(configs.__file__).parents[1]


def valid(**changes):
    config = defaults()
    config.steps = 10
    for key, value in changes.items():
        config[key] = value
    return config


def recipe(tmp_path, body: str) -> str:
    path = tmp_path / "recipe.py"
    head = "from clip_jax.config import defaults, evaluation\n"
    head += "def get_config():\n    config = defaults()\n    config.steps = 10\n"
    path.write_text(f"{head}{body}    return config\n")
    return str(path)


@pytest.mark.parametrize(
    ("body", "message"),
    [
        ("    config.model.patch_sise = 3\n", "model.patch_sise is not a setting (nearest: model.image.patch_size)"),
        ("    config.batchsize = 3\n", "batchsize is not a setting (nearest: batch_size)"),
        ("    config.batch_size = 'many'\n", "batch_size='many' must be a whole number"),
        ("    config.batch_size = 2.5\n", "batch_size=2.5 must be a whole number"),
        ("    config.model.scan = 1\n", "model.scan=1 must be true or false"),
        ("    config.optimizer.learning_rate = None\n", "optimizer.learning_rate=None must be a number"),
        ("    config.model.name = 'ViT-B/23'\n", "ViT-B/23: not a model (nearest: ViT-B/"),
        ("    config.model.dtype = 'float23'\n", "model.dtype='float23' is not one of float32, bfloat16"),
        ("    config.examples = 100\n", "are both given"),
        ("    config.steps = -1\n", "give one of steps, examples, epochs"),
        ("    config.data.crop_scale = (2.0, 1.0)\n", "data.crop_scale"),
        ("    config.data.train = (('tar:a', 1.0), 'tar:b')\n", "data.train: 'tar:b' is not a source with a weight"),
        ("    config.data.train = (('tar:a', 0.0),)\n", "with weights above 0"),
        ("    config.data.train = (('tar:a', 1.0, 3),)\n", "data.train: 3 of tar:a is not a caption setting"),
        ("    config.data.mixture = 'share'\n", "data.mixture has no effect with a single source"),
        ("    config.eval.a = evaluation(templates=('a photo',))\n", "write {} once, for the class name"),
        ("    config.eval.a = evaluation(protocol='probe', source='folder:x')\n", "eval.a.train is missing"),
        ("    config.eval.a = evaluation(train='folder:x')\n", "eval.a.train has no effect with protocol=retrieval"),
        ("    config.eval.a = 'folder:x'\n", "eval.a is a section: config.eval.a = evaluation(source='folder:x'"),
        ("    config.eval.a = evaluation()\n    config.eval.a.sorce = 'x'\n", "nearest: eval.a.source"),
        ("    config.loss.name = 'sigmoid'\n", "config.loss is config.objectives.contrastive now"),
        ("    config.objectives.contrastive.weight = 0.0\n", "nothing to train"),
        (
            "    config.tokenizer.train_captions = 7\n",
            "tokenizer.train_captions has no effect with tokenizer.kind=clip",
        ),
        ("    del config.data\n", "data.augment.flip is missing"),
        ("    config.checkpoint.every_steps = 0\n", "must be positive"),
        ("    raise KeyError('x')\n", "KeyError"),
        ("    return None\n", "get_config() returns NoneType, not a config"),
    ],
)
def test_a_mistake_in_a_recipe_is_one_line_with_its_place(tmp_path, body, message):
    path = recipe(tmp_path, body)
    with pytest.raises(UserError, match=re.escape(message)) as error:
        load(path)
    assert "\n" not in str(error.value)
    if "not a model" not in message:
        assert path in str(error.value)


@pytest.mark.parametrize(
    ("key", "value", "message"),
    [
        ("batch_sise", "8", "batch_sise is not a setting (nearest: batch_size)"),
        ("learning_rate", "8", "nearest: optimizer.learning_rate"),
        ("lr", "8", "nearest: optimizer.learning_rate"),
        ("wd", "8", "nearest: optimizer.weight_decay"),
        ("batch_size", "1", "a pair is contrasted with the others of its batch"),
        ("batch_size", "eight", "batch_size='eight' must be a whole number"),
        ("optimizer.learning_rate", "fast", "must be a number"),
        ("mesh.cpu_devices", "0", "must be at least 1"),
    ],
)
def test_a_mistake_on_the_command_line_is_one_line(key, value, message):
    with pytest.raises(UserError, match=re.escape(message)):
        override(valid(), {key: value}, "recipe.py")


def test_a_batch_of_one_pair_is_for_captioning_alone():
    one = {"batch_size": "1", "objectives.contrastive.weight": "0"}
    with pytest.raises(UserError, match="a pair is contrasted"):
        override(valid(), one | {"objectives.distillation.weight": "1"}, "recipe.py")
    assert override(valid(), one | {"objectives.captioning.weight": "1"}, "recipe.py").batch_size == 1


def test_overrides_take_the_type_of_the_setting():
    config = override(
        valid(),
        {
            "optimizer.learning_rate": "1",
            "batch_size": "64",
            "model.scan": "false",
            "model.name": "ViT-L/14",
            "data.crop_scale": "(0.5, 1)",
        },
        "recipe.py",
    )
    assert config.optimizer.learning_rate == 1.0 and isinstance(config.optimizer.learning_rate, float)
    assert config.batch_size == 64 and config.model.scan is False and config.model.name == "ViT-L/14"
    assert config.data.crop_scale == (0.5, 1)


def test_of_several_durations_the_command_lines_wins():
    config = override(valid(), {"epochs": "2"}, "recipe.py")
    assert (config.steps, config.examples, config.epochs) == (AUTO, AUTO, 2.0)
    config = override(config, {"checkpoint.every_examples": "100"}, "recipe.py")
    assert config.checkpoint.every_steps == AUTO and config.epochs == 2.0


def test_a_unit_set_to_minus_one_leaves_the_others_as_they_are():
    both = {
        "checkpoint.every_steps": "7",
        "checkpoint.every_epochs": "-1",
        "eval.a.source": "x",
        "eval.a.every_steps": "3",
    }
    config = override(valid(), both | {"eval.a.every_examples": "-1", "epochs": "-1.0"}, "recipe.py")
    assert (config.steps, config.checkpoint.every_steps, config.eval.a.every_steps) == (10, 7, 3)
    assert override(config, {"checkpoint.every_steps": "-1"}, "recipe.py").checkpoint.every_steps == AUTO


def test_two_units_on_the_command_line_are_one_too_many():
    with pytest.raises(UserError, match=r"checkpoint.every_\w+ and checkpoint.every_\w+ are both given"):
        override(valid(), {"checkpoint.every_steps": "7", "checkpoint.every_epochs": "1"}, "recipe.py")


def test_an_evaluation_of_a_new_name_is_made_on_the_command_line():
    config = override(valid(), {"eval.coco.source": "tfds:coco", "eval.coco.every_steps": "5"}, "recipe.py")
    assert (config.eval.coco.source, config.eval.coco.protocol) == ("tfds:coco", "retrieval")
    assert duration(config, "eval.coco.every_", 100) == 5
    for key, message in (
        ("eval.coco.sorce", "nearest: eval.coco.source"),
        ("eval.coco", "--config.eval.coco.source="),
        ("eval.every_steps", "--config.eval.NAME.every_steps="),
    ):
        with pytest.raises(UserError, match=message):
            override(config, {key: "x"}, "recipe.py")


def test_settings_of_earlier_versions_are_read_under_todays_names():
    old = to_json(valid())
    del old["objectives"], old["phases"], old["model"]["frozen"]
    old["loss"] = {"name": "sigmoid", "max_logit_scale": 0.0}
    old["eval"] = {
        "heldout": "folder:a", "heldout_name": "coco", "zero_shot": "folder:b", "zero_shot_name": "pets",
        "templates": ["a {}"], "batch_size": 7, "every_steps": 5, "every_examples": -1, "every_epochs": -1.0,
    }  # fmt: skip
    config = from_json(old, "run.json")
    given = {"weight": 1.0, "loss": "sigmoid", "max_logit_scale": 0.0}
    assert config.objectives.contrastive.to_dict() == contrastive.SPEC.defaults | given
    assert (config.eval.coco.source, config.eval.coco.protocol) == ("folder:a", "retrieval")
    assert config.eval.coco.batch_size == 7
    assert (config.eval.pets.source, config.eval.pets.protocol) == ("folder:b", "zero_shot")
    assert config.eval.pets.train == ""  # which came later
    assert config.eval.pets.templates == ("a {}",) and duration(config, "eval.pets.every_", 100) == 5
    assert override(config, {"loss.name": "softmax"}, "x").objectives.contrastive.loss == "softmax"
    later = later_settings(old, config)
    assert {"model.frozen", "phases"} <= set(later)
    assert "objectives.contrastive.loss" not in later and "objectives.contrastive.positives" in later


NUMBERS = [k for k, v in flatten(defaults()).items() if isinstance(v, int | float) and not isinstance(v, bool)]


def test_the_protocols_of_the_settings_are_those_that_there_are():
    assert set(EVALUATION_CHOICES["protocol"]) == set(PROTOCOLS)


def test_every_number_has_a_range():
    with_units = [key for key in NUMBERS if siblings(key, flatten(defaults()))]
    assert set(NUMBERS) == set(ranges()) | set(with_units)


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("model.patch_dropout", "1.5"),
        ("model.patch_dropout", "-1"),
        ("optimizer.beta2", "98"),
        ("data.crop_ratio", "(2.0, 1.0)"),
        ("data.crop_ratio", "(-1.0, 1.0)"),
        ("data.max_bad_share", "3"),
        ("model.image.layers", "0"),
        ("micro_batch", "0"),
        ("ema_decay", "1"),
        ("seed", "-1"),
        ("objectives.contrastive.weight", "-1"),
        ("model.std", "(0.5, 0.0, 0.5)"),
        ("model.std", "('a', 1, 2)"),
        ("model.frozen", "(1,)"),
        ("optimizer.rate_factors", "({'image/*': -1.0},)"),
        ("optimizer.layer_decay", "0"),
        ("data.crop_scale", "('a', 'b')"),
        ("data.crop_scale", "(0.1, 0.2, 0.3)"),
        ("eval.pets.templates", "()"),
        ("eval.pets.templates", "('{} {}',)"),
        ("eval.pets.templates", "('a {} {c}',)"),
        ("eval.warmup.every_steps", "0"),
        ("steps", "1e999"),
    ],
)
def test_a_value_out_of_range_is_one_line(key, value):
    with pytest.raises(UserError, match=re.escape(key)):
        override(valid(), {key: value}, "recipe.py")


@pytest.mark.parametrize(
    ("phases", "message"),
    [
        (({"model.patch_dropout": 0.5},), "a phase is"),
        (({"start": 5}, {"start": 5}), "must be after"),
        (({"start": 5, "batch_size": 3},), "cannot change in the middle of a run"),
        (({"start": 5, "model.image.image_sice": 3},), "nearest: model.image.image_size"),
        (({"start": 5, "model.image.image_size": "large"},), "must be a whole number"),
        (({"start": 5, "optimizer.schedule": "wsd"},), r"phases\[0\]: .* give optimizer.cooldown_steps"),
        (({"start": 5, "model.patch_dropout": 1.5},), r"phases\[0\]: model.patch_dropout=1.5 must be"),
    ],
)
def test_a_phase_that_cannot_be_is_one_line(phases, message):
    with pytest.raises(UserError, match=message):
        configs.check(valid(phases=phases), "recipe.py")


def test_a_phase_keeps_the_settings_of_the_one_before_it():
    first, second, third = configs.phases(
        valid(phases=({"start": 3, "model.image.image_size": 64}, {"start": 6, "model.patch_dropout": 0.5}))
    )
    assert (first.start, second.start, third.start) == (0, 3, 6)
    assert third.config.model.image.image_size == 64 and third.config.model.patch_dropout == 0.5
    assert first.config.model.image.image_size == AUTO


@pytest.mark.parametrize(
    ("key", "value", "expected"),
    [
        ("steps", 7, 7),
        ("examples", 100, 12),
        ("epochs", 1.0, 12),
        ("epochs", 12.0, 150),
        ("epochs", 0.05, 0),
    ],
)
def test_durations_are_steps_examples_or_epochs(key, value, expected):
    config = defaults()
    config.batch_size = 8
    config[key] = value
    assert duration(config, "", samples=100) == expected


def test_intervals_are_at_least_one_step_and_none_where_not_given():
    config = valid()
    assert duration(config, "checkpoint.every_", 100) is None
    config.checkpoint.every_epochs = 0.001
    assert duration(config, "checkpoint.every_", 100) == 1


def test_warmup_longer_than_the_run_and_a_run_without_steps_are_refused():
    with pytest.raises(UserError, match="20 steps of warm-up in a run of 10"):
        check_lengths(override(valid(), {"optimizer.warmup_steps": "20"}, "here"), 10, 100)
    with pytest.raises(UserError, match="the run has no step"):
        check_lengths(valid(), 0, 100)


def test_a_saved_config_comes_back_the_same_with_automatic_sizes_automatic():
    config = valid()
    saved = to_json(config)
    assert saved["mesh"]["data"] == AUTO and saved["model"]["image"]["width"] == AUTO
    assert to_json(from_json(saved, "run.json")) == saved
    assert differences(saved, to_json(config)) == []


def test_how_a_run_is_computed_evaluated_kept_and_logged_may_change_on_a_restart_and_nothing_else():
    config = valid()
    computed = {"mesh.fsdp": "2", "micro_batch": "64", "model.remat": "full", "model.scan": "False"}
    computed |= {"data.max_bad_share": "0.1", "data.workers": "7", "data.prefetch": "9", "data.train": "tar:moved"}
    others = {"log.every_steps": "3", "seed": "5", "optimizer.beta1": "0.8"}
    changed = override(config, computed | others, "recipe.py")
    assert differences(to_json(config), to_json(changed)) == ["optimizer.beta1", "seed"]


def test_how_a_phase_is_computed_may_change_on_a_restart_and_nothing_else_of_it():
    def other(*phases):
        changed = valid()
        changed.phases = phases
        return differences(to_json(config), to_json(changed))

    config = valid()
    config.phases = ({"start": 10, "micro_batch": 16, "optimizer.learning_rate": 1e-4},)
    assert other({"start": 10, "micro_batch": 8, "optimizer.learning_rate": 1e-4, "model.remat": "full"}) == []
    assert other({"start": 5, "micro_batch": 64}, {"start": 10, "optimizer.learning_rate": 1e-4}) == []
    assert other({"start": 11, "micro_batch": 16, "optimizer.learning_rate": 1e-4}) == ["phases"]
    assert other({"start": 10, "micro_batch": 16, "optimizer.learning_rate": 2e-4}) == ["phases"]
    assert other() == ["phases"]


def test_what_a_message_to_a_run_that_stopped_advises_may_change_on_a_restart():
    """The settings are read out of the messages, so that new advice is tried too."""
    files = ("training/stop", "training/restart", "training/budget", "data/sources/folder_files")
    files += ("data/sources/tar_index", "data/sources/left_out")
    advised, config = set(), valid()
    for file in files:
        tree = ast.parse((PACKAGE / f"{file}.py").read_text())
        texts = [
            node.value for node in ast.walk(tree) if isinstance(node, ast.Constant) and isinstance(node.value, str)
        ]
        found = {key for text in texts for key in re.findall(r"config\.([a-z_]+(?:\.[a-z_]+)*)", text)}
        assert found, file
        advised |= found
    known = flatten(defaults())
    assert advised <= known.keys() and len(advised) >= 10
    for key in advised:
        values = [v for v in choices().get(key, ("elsewhere", 3, 0.5)) if type(v) is type(known[key])]
        other = next(value for value in values if value != known[key])
        changed = override(config, {key: str(other)}, "recipe.py")
        assert flatten(changed)[key] != flatten(config)[key]
        assert differences(to_json(config), to_json(changed)) == [], key


def test_sizes_of_the_model_can_be_overridden_and_must_go_together():
    config = override(valid(), {"model.image.layers": "2", "model.activation": "quick_gelu"}, "recipe.py")
    architecture = configs.resolve_preset(config, vocab_size=500).architecture
    assert (architecture.image.layers, architecture.text.layers, architecture.text.vocab_size) == (2, 12, 500)
    assert architecture.image.activation == architecture.text.activation == "quick_gelu"
    with pytest.raises(UserError, match="image_size=100 is not a multiple of patch_size=32"):
        configs.resolve_preset(override(valid(), {"model.image.image_size": "100"}, "recipe.py"))
    with pytest.raises(UserError, match="width=770 does not divide into heads=12"):
        configs.resolve_preset(override(valid(), {"model.image.width": "770"}, "recipe.py"))


def test_a_missing_recipe_names_the_nearest():
    with pytest.raises(UserError, match=re.escape("configs/emojy.py: no such recipe (nearest: configs/emoji.py)")):
        load("configs/emojy.py")


def test_a_mixture_is_given_on_the_command_line_and_survives_run_json():
    text = '(("tar:a,b", 1), ["tar:c", 4.0, "captions.de"])'
    config = override(valid(), {"data.train": text, "data.mixture": "share"}, "here")
    assert config.data.train == (("tar:a,b", 1), ("tar:c", 4.0, "captions.de"))
    again = from_json(to_json(config), "run.json")
    assert tuple(again.data.train) == config.data.train and differences(to_json(again), to_json(config)) == []
    other = override(config, {"data.train": text.replace("4.0", "5.0")}, "here")
    # The data may be elsewhere at a restart, with the same content and weights, which are in the fingerprint.
    assert differences(to_json(config), to_json(other)) == []
    parts = [open_source("shapes:heldout")] * 2
    assert open_mixture(parts, (1, 4.0)).fingerprint != open_mixture(parts, (1, 5.0)).fingerprint
