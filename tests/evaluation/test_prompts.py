"""Published prompts, their fingerprint, and the canonical form that SigLIP wants."""

import pytest

from clip_jax.data.templates import fill
from clip_jax.errors import UserError
from clip_jax.evaluation import prompts
from clip_jax.evaluation.prompts import Prompts


def test_the_published_sets_have_the_published_sizes():
    assert len(prompts.templates("imagenet1k")) == 80 and len(prompts.class_names("imagenet1k")) == 1000
    assert len(prompts.templates("imagenet_7")) == 7 and len(set(prompts.templates("imagenet_7"))) == 7
    assert len(prompts.templates("caltech101")) == 34 and len(prompts.class_names("flowers")) == 102
    sets = [*prompts.published("templates").items(), *prompts.published("class_names").items()]
    # CLIP_benchmark's name of one of CLEVR's distances is empty, and its numbers are made with it.
    assert {name for name, entries in sets if not all(map(str.strip, entries))} == {"clevr_closest_object_distance"}


def test_every_published_template_takes_a_class_name():
    for name in prompts.published("templates"):
        assert all("a, {b} c" in fill(t, "a, {b} c") for t in prompts.templates(name))


def test_a_domain_has_the_templates_of_its_published_sets():
    assert prompts.templates("satellite")[0] == "a centered satellite photo of {}."
    assert [len(prompts.templates(name)) for name in prompts.DOMAINS] == [7, 3, 8]
    assert not set(prompts.DOMAINS) & set(prompts.published("templates"))


def test_own_lists_are_files_of_lines(tmp_path):
    (tmp_path / "names.txt").write_text("a cat\n\n dog \n")
    assert prompts.class_names(str(tmp_path / "names.txt")) == ("a cat", "dog")
    (tmp_path / "empty.txt").write_text("\n")
    for wrong in (str(tmp_path / "empty.txt"), "imagenet2k"):
        with pytest.raises(UserError, match=r"empty|nearest: imagenet1k"):
            prompts.class_names(wrong)
    (tmp_path / "templates.txt").write_text("a {c}\na photo\n")
    with pytest.raises(UserError, match=r"templates.txt: 'a photo': write \{\} once"):
        prompts.templates(str(tmp_path / "templates.txt"))


def test_the_fingerprint_depends_on_every_word_and_on_the_order():
    base = Prompts(("cat", "dog"), ("a {}",))
    others = [
        Prompts(("dog", "cat"), ("a {}",)),
        Prompts(("cat", "dog"), ("a {}.",)),
        Prompts(("cat", "dogs"), ("a {}",)),
    ]
    assert len({p.fingerprint for p in (base, *others)}) == 4
    assert base.fingerprint == Prompts(("cat", "dog"), ("a {}",)).fingerprint


def test_siglip_gets_canonical_prompts_and_clip_the_published_ones():
    """big_vision's rule: lower case, underscores are spaces, no punctuation, single spaces."""
    raw = Prompts(("St. Bernard_dog", "Jack-o'-lantern"), ("A photo of a {}.", 'itap of: "{}"!'))
    assert prompts.for_model(raw, "siglip") == prompts.for_model(raw, "siglip2")
    assert prompts.for_model(raw, "siglip") == Prompts(
        ("st bernard dog", "jackolantern"), ("a photo of a {}", "itap of {}")
    )
    assert prompts.for_model(raw, "clip") is raw
