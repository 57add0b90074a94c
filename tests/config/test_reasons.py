"""The reason of a setting is the comment beside its default."""

from clip_jax.config.flat import known_settings
from clip_jax.config.reasons import automatic, reasons
from clip_jax.config.recipes import load


def test_every_reason_belongs_to_a_setting_and_most_settings_have_one():
    found, known = reasons(("held_out",)), known_settings(("held_out",))
    assert found.keys() <= known.keys()
    sizes = ("model.image.", "model.text.")
    assert len(found) > 0.75 * len([key for key in known if not key.startswith(sizes)])


def test_a_reason_of_several_lines_is_joined_and_one_above_its_setting_is_found():
    found = reasons()
    assert (
        found["tokenizer.vocab"].startswith("Path of clip's bpe_simple")
        and "sentencepiece: trained." in found["tokenizer.vocab"]
    )
    assert "in the middle of a run" in found["phases"]
    assert found["checkpoint.every_epochs"] == "none given: at the end only"
    assert "sigmoid" in found["objectives.contrastive.loss"]


def test_an_automatic_value_is_what_the_model_gets():
    found = automatic(load("clip_vit_b32", {"model.image.image_size": "256"}))
    assert "model.image.image_size" not in found and found["model.image.width"] == 768
    assert found["model.text.vocab_size"] == 49408 and found["tokenizer.kind"] == "clip"
    assert "model.text.vocab_size" not in automatic(load("demo"))  # decided by the captions
