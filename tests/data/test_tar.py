"""Tar shards: every sample is found and read; faults of the files stop, faults of a sample are its own."""

import io
import tarfile

import pytest

from clip_jax.data.sources import BadSampleError, open_source
from clip_jax.data.sources.tar import open_tar
from clip_jax.errors import UserError
from tests.data.shards import jpeg, sample, write_shard, write_shards


def test_every_sample_of_every_shard_is_read_in_order(tmp_path):
    source = open_source(write_shards(tmp_path, 7, shards=3), image_size=32)
    assert len(source) == 7
    assert [s.captions for s in source] == [(f"picture number {i}",) for i in range(7)]
    assert [s.image for s in source] == [jpeg(i) for i in range(7)]
    assert source[4].key == "train-00001.tar/000000004"


def test_captions_may_come_from_a_path_in_the_json(tmp_path):
    where = write_shards(tmp_path, 2).removeprefix("tar:")
    assert open_tar(where, caption="captions.de")[1].captions == ("Bild 1",)
    assert open_tar(where, caption="tags")[1].captions == ("a", "b1")


def test_a_changed_shard_is_scanned_again_and_has_another_fingerprint(tmp_path):
    where = write_shards(tmp_path, 4).removeprefix("tar:")
    before = open_tar(where)
    write_shard(tmp_path / "train-00001.tar", [sample(i) for i in range(5)])
    after = open_tar(where)
    assert len(after) == 7 and after.fingerprint != before.fingerprint


def test_members_of_other_kinds_links_and_lone_images_are_no_samples(tmp_path):
    path = tmp_path / "odd.tar"
    with tarfile.open(path, "w") as archive:
        for name, data in (("a.jpg", jpeg(1)), ("a.txt", b"good"), ("a.pyd", b"pickle"), ("lone.jpg", jpeg(2))):
            member = tarfile.TarInfo(name)
            member.size = len(data)
            archive.addfile(member, io.BytesIO(data))
        link = tarfile.TarInfo("b.jpg")
        link.type, link.linkname = tarfile.SYMTYPE, "/etc/passwd"
        archive.addfile(link)
    source = open_tar(str(path))
    assert [s.captions for s in source] == [("good",)]


def test_labels_come_from_cls_members_and_classnames_txt(tmp_path):
    write_shard(tmp_path / "0.tar", [{"jpg": jpeg(i), "cls": str(i % 2).encode()} for i in range(4)])
    (tmp_path / "classnames.txt").write_text("cat\ndog\n")
    source = open_tar(str(tmp_path))
    assert source.class_names == ("cat", "dog")
    assert [(s.label, s.captions) for s in source] == [(0, ("cat",)), (1, ("dog",))] * 2


@pytest.mark.parametrize("caption", [b"", b"  \n", b"\xff\xfe"])
def test_an_empty_or_unreadable_caption_is_a_fault_of_its_sample(tmp_path, caption):
    path = write_shard(tmp_path / "0.tar", [{"jpg": jpeg(0), "txt": caption}, sample(1)])
    source = open_tar(str(path))
    with pytest.raises(BadSampleError, match="caption"):
        source[0]
    assert source[1].captions == ("picture number 1",)


def test_a_missing_shard_says_what_was_looked_for(tmp_path):
    with pytest.raises(UserError, match=r"nothing-\*.tar: no such shard"):
        open_tar(f"{tmp_path}/nothing-*.tar")
    with pytest.raises(UserError, match=r"no \.tar shards in this folder"):
        open_tar(str(tmp_path))


@pytest.mark.parametrize("keep", [0.2, 0.5, 0.8])
def test_a_truncated_shard_stops_the_run_or_gives_what_is_whole(tmp_path, keep):
    path = write_shard(tmp_path / "0.tar", [sample(i) for i in range(8)])
    whole = path.read_bytes()
    path.write_bytes(whole[: int(len(whole) * keep)])
    with pytest.raises(UserError, match="truncated"):
        open_tar(str(path))
    source = open_tar(str(path), truncated="keep")
    assert 0 < len(source) < 9
    assert [s.image for s in source] == [jpeg(i) for i in range(len(source))]


def test_a_shard_cut_between_two_members_is_noticed(tmp_path):
    path = write_shard(tmp_path / "0.tar", [sample(i) for i in range(3)])
    with tarfile.open(path) as archive:
        cut = archive.getmembers()[6].offset
    path.write_bytes(path.read_bytes()[:cut])
    with pytest.raises(UserError, match="truncated"):
        open_tar(str(path))


def test_a_file_that_is_no_tar_is_named(tmp_path):
    (tmp_path / "page.tar").write_bytes(b"<html>not found</html>" * 100)
    with pytest.raises(UserError, match=r"page.tar: not a tar file"):
        open_tar(str(tmp_path))


def test_an_option_that_no_kind_of_source_takes_is_an_error(tmp_path):
    with pytest.raises(TypeError, match="no kind of source takes captions"):
        open_source(write_shards(tmp_path, 1), image_size=32, captions="json")


def test_a_kind_takes_its_own_options_and_ignores_those_of_others(tmp_path):
    source = open_source(write_shards(tmp_path, 2), image_size=32, caption="captions.de", tfds_dir="/nowhere")
    assert source[1].captions == ("Bild 1",)


def test_an_unknown_kind_of_source_names_the_nearest():
    with pytest.raises(UserError, match=r"tarr:x: not a source \(nearest: tar\)"):
        open_source("tarr:x", image_size=32)
