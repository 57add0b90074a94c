"""The names of shards that people write; captions of several fields with their shares."""

import numpy as np
import pytest

from clip_jax.data.sources import captions, patterns
from clip_jax.data.sources.tar import open_tar
from clip_jax.data.views import pair_views
from clip_jax.errors import UserError
from tests.data.shards import sample, write_shard, write_shards


def touch(folder, *names):
    for name in names:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).touch()
    return folder


@pytest.mark.parametrize(
    ("where", "expected"),
    [
        ("{0000..0002}.tar", ["0000.tar", "0001.tar", "0002.tar"]),
        ("{0002..0000}.tar", ["0002.tar", "0001.tar", "0000.tar"]),
        ("{a,b}-{8..10}.tar", [f"{x}-{n}.tar" for x in "ab" for n in (8, 9, 10)]),
        ("{0000..0001}.tar::b-*.tar", ["0000.tar", "0001.tar", "b-10.tar", "b-8.tar", "b-9.tar"]),
        ("a-{8,9}.tar,0000.tar", ["a-8.tar", "a-9.tar", "0000.tar"]),
        ("odd [1], {2..3}.tar", ["odd [1], {2..3}.tar"]),
        ("d", ["d/x.tar", "d/y.tar"]),
    ],
)
def test_shards_are_named_by_ranges_globs_folders_and_lists(tmp_path, monkeypatch, where, expected):
    names = [f"{x}-{n}.tar" for x in "ab" for n in (8, 9, 10)]
    touch(tmp_path, "0000.tar", "0001.tar", "0002.tar", "odd [1], {2..3}.tar", "d/y.tar", "d/x.tar", "d/z.txt", *names)
    monkeypatch.chdir(tmp_path)
    assert patterns.files(where, (".tar",)) == expected


def test_a_shard_that_is_missing_in_a_range_is_named(tmp_path):
    touch(tmp_path, "0.tar", "2.tar")
    with pytest.raises(UserError, match=r"/\{0\.\.2\}\.tar: 1 of 3 are not there, the first is 1\.tar"):
        patterns.files(f"{tmp_path}/{{0..2}}.tar", (".tar",))
    with pytest.raises(UserError, match="more than 10000000 files"):
        patterns.files("{0..99999999999}.tar", (".tar",))


@pytest.mark.parametrize("folder", ["photos [2019]", "a,b", "x[!y],[z]", "what?", "{0..1}"])
def test_a_path_that_exists_is_a_path_whatever_is_in_its_name(tmp_path, folder):
    write_shards(tmp_path / folder, 4), write_shards(tmp_path / "other", 2, shards=1)
    inside = tmp_path / folder
    for where in (inside, inside / "train-*.tar", f"{inside}/train-00000.tar,{inside}/train-00001.tar"):
        assert len(open_tar(str(where))) == 4
    assert len(open_tar(f"{inside},{tmp_path}/other,{inside}/train-*.tar")) == 10


def test_a_range_of_shards_in_braces_is_that_of_webdataset(tmp_path):
    write_shards(tmp_path, 6, shards=3)
    assert len(open_tar(f"{tmp_path}/train-{{00000..00001}}.tar")) == 4
    with pytest.raises(UserError, match=r"1 of 4 are not there, the first is train-00003\.tar"):
        open_tar(f"{tmp_path}/train-{{00000..00003}}.tar")


def test_urls_stand_between_local_shards(tmp_path, monkeypatch):
    touch(tmp_path, "a,b.tar")
    monkeypatch.chdir(tmp_path)
    url = "https://host/x.tar?key=1"
    assert patterns.files(f"a,b.tar,{url},a,b.tar", (".tar",)) == ["a,b.tar", url, "a,b.tar"]
    numbered = [f"https://host/{n}.tar" for n in range(2)]
    assert patterns.files("https://host/{0..1}.tar::a,b.tar", (".tar",)) == [*numbered, "a,b.tar"]


def test_captions_of_several_fields_have_their_shares(tmp_path):
    path = write_shard(tmp_path / "0.tar", [sample(0, "one\ntwo\n\n")])
    assert open_tar(str(path))[0].captions == ("one\ntwo",)
    assert open_tar(str(path), caption="txt_lines")[0].captions == ("one", "two")
    found = open_tar(str(path), caption="txt_lines=3, captions.de=1,captions.fr")[0]
    assert found.captions == ("one", "two", "Bild 0") and found.shares == (0.375, 0.375, 0.25)
    assert open_tar(str(path), caption="captions.fr,captions.de=5")[0].shares == ()
    # Of fields that no sample has, one among others may be rare; all of them are a mistake.
    notes = open_tar(str(path), caption="captions.fr,captions.de").notes
    assert any("captions.fr: no .json that was tried has text in this field" in note for note in notes)
    with pytest.raises(UserError, match=r"captions.fr: no .json .*with text there are .*captions.de"):
        open_tar(str(path), caption="captions.fr,captions.it=2")
    for wrong in ("captions.de=0", "a=b", "a,,b", "=2"):
        with pytest.raises(UserError, match="is not a field with a share"):
            captions.fields(wrong)


def test_training_takes_captions_as_often_as_their_shares_say(tmp_path):
    path = write_shard(tmp_path / "0.tar", [sample(0, "one\ntwo")])
    found = open_tar(str(path), caption="txt_lines=3,captions.de=1")[0]
    drawn = []

    def tokenizer(texts):
        drawn.extend(texts)
        return np.zeros((1, 4), np.int32)

    view = pair_views(
        image_size=8,
        context_length=4,
        tokenizer=tokenizer,
        crop_scale=(1, 1),
        crop_ratio=(1, 1),
        interpolation="bicubic",
    )["text"]
    rng = np.random.default_rng(0)
    for _ in range(4000):
        view.fill(found, rng, {"text": np.zeros(4, np.int32)})
    counts = [drawn.count(text) / 4000 for text in ("one", "two", "Bild 0")]
    np.testing.assert_allclose(counts, [0.375, 0.375, 0.25], atol=0.03)
