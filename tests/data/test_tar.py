"""Tar shards: every sample is found and read; faults of the files stop, faults of a sample are its own."""

import io
import json
import tarfile
from pathlib import Path

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
    assert source[4].key == "train-00001.tar/000000004.jpg"


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


def write_members(path: Path, *members: tuple[str, bytes], links: tuple[str, ...] = (), **options) -> str:
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, "w", **options) as archive:
        for name, data in members:
            member = tarfile.TarInfo(name)
            member.size = len(data)
            archive.addfile(member, io.BytesIO(data))
        for name in links:
            link = tarfile.TarInfo(name)
            link.type, link.linkname = tarfile.SYMTYPE, "/etc/passwd"
            archive.addfile(link)
    return str(path)


def pair(key: str, ending: str = "jpg") -> list[tuple[str, bytes]]:
    return [(f"{key}.{ending}", jpeg(1)), (f"{key}.txt", f"about {key}".encode(errors="replace"))]


def captions_of(where: str) -> list[str]:
    return [sample.captions[0] for sample in open_tar(where)]


@pytest.mark.parametrize(
    "key",
    [
        "dr. who",
        "a.b.c",
        "no. 7/v1.2",
        "./cat",
        "image 3.5 mm",
        "snow\u2603man",
        "w" * 150,
        "f" * 90 + "/" + "x" * 60,
    ],
)
@pytest.mark.parametrize("format_", [tarfile.PAX_FORMAT, tarfile.GNU_FORMAT])
def test_a_key_ends_at_the_last_dot_that_leaves_a_known_ending_and_messages_have_all_of_the_name(
    tmp_path, key, format_
):
    source = open_tar(write_members(tmp_path / "a.tar", *pair("first"), *pair(key), format=format_))
    assert [s.captions for s in source] == [("about first",), (f"about {key}",)]
    assert source[1].key == f"a.tar/{key.removeprefix('./')}.jpg"
    assert source.notes == ()


def test_a_name_that_is_not_utf8_is_shown_in_full_and_valid(tmp_path):
    for format_ in (tarfile.PAX_FORMAT, tarfile.GNU_FORMAT):
        name = b"caf\xe9".decode("utf-8", "surrogateescape")
        source = open_tar(
            write_members(tmp_path / f"{format_}.tar", *pair(name), format=format_, errors="surrogateescape")
        )
        assert source[0].key == f"{format_}.tar/caf\\xe9.jpg"
        source[0].key.encode()


@pytest.mark.parametrize("ending", ["jpg", "JPEG", "jfif", "png", "webp", "gif", "bmp", "tif", "tiff", "avif"])
def test_images_of_all_usual_endings_are_read(tmp_path, ending):
    assert captions_of(write_members(tmp_path / "a.tar", *pair("x", ending))) == ["about x"]


def test_what_makes_no_pair_is_counted_by_reason_with_its_first_name(tmp_path):
    where = write_members(
        tmp_path / "odd.tar",
        *(m for i in range(9) for m in pair(str(i))),
        *(("alone.jpg", b""), ("also.png", b""), ("b.txt", b"no image"), ("x.heic", b""), ("x.pyd", b"pickle")),
        *(("0.jpeg", b"a second image"), ("0.seg.png", b"a mask"), ("._0.jpg", b"of a Mac"), ("README", b"")),
        links=("c.jpg",),
    )
    source = open_tar(where)
    assert [s.captions for s in source] == [(f"about {i}",) for i in range(9)]
    notes = "\n".join(source.notes)
    for line in (
        "2 images without a .txt, .json or .cls (first: odd.tar/alone.jpg)",
        "1 captions or labels without an image (images end in jpg, jpeg, jfif",
        "1 further image files of the same key (first: odd.tar/0.jpeg)",
        "1 further files of a pair (first: odd.tar/0.seg.png)",
        "1 hidden files (first: odd.tar/._0.jpg)",
        "1 links (tar --dereference --hard-dereference stores what they lead to) (first: odd.tar/c.jpg)",
    ):
        assert f"left out: {line}" in notes
    assert open_tar(where).notes == source.notes, "the same from the index"


def test_a_reason_names_the_ending_that_is_not_read(tmp_path):
    source = open_tar(write_members(tmp_path / "a.tar", *pair("0"), ("x.heic", b""), ("y.heic", b""), ("README", b"")))
    assert "left out: 2 files that are not read, ending in .heic (first: a.tar/x.heic)" in source.notes
    assert "left out: 1 files that are not read, without a usual ending (first: a.tar/README)" in source.notes


def test_a_pair_whose_name_is_repeated_is_another_pair(tmp_path):
    members = [("a.jpg", jpeg(1)), ("a.txt", b"one"), ("a.jpg", jpeg(2)), ("a.txt", b"two")]
    source = open_tar(write_members(tmp_path / "a.tar", *members))
    assert [(s.image, s.captions) for s in source] == [(jpeg(1), ("one",)), (jpeg(2), ("two",))]


@pytest.mark.parametrize(("pairs", "alone", "max_bad_share"), [(5, 5, 0.01), (12, 12, 0.2), (1200, 20, 0.01)])
def test_too_many_incomplete_pairs_are_refused_with_the_reasons(tmp_path, pairs, alone, max_bad_share):
    members = [m for i in range(pairs) for m in ((f"{i}.jpg", b""), (f"{i}.txt", b"x"))]
    where = write_members(tmp_path / "a.tar", *members, *((f"lone{i}.jpg", b"") for i in range(alone)))
    with pytest.raises(
        UserError, match=rf"{alone} of {pairs + alone} pairs are incomplete: .*first: a.tar/lone0.jpg.*max_bad_share"
    ):
        open_tar(where, max_bad_share=max_bad_share)
    assert len(open_tar(where, max_bad_share=0.6)) == pairs


def test_labels_come_from_cls_members_and_classnames_txt(tmp_path):
    write_shard(tmp_path / "0.tar", [{"jpg": jpeg(i), "cls": str(i % 2).encode()} for i in range(4)])
    (tmp_path / "classnames.txt").write_text("cat\ndog\n")
    source = open_tar(str(tmp_path))
    assert source.class_names == ("cat", "dog")
    assert [(s.label, s.captions) for s in source] == [(0, ("cat",)), (1, ("dog",))] * 2


def write_labels(folder: Path, labels: list[bytes | None], classes: str = "cat\ndog\nowl\nfox\n") -> str:
    texts = [{} if label is None else {"cls": label} for label in labels]
    write_shard(folder / "0.tar", [{"jpg": jpeg(i), "txt": b"words"} | more for i, more in enumerate(texts)])
    (folder / "classnames.txt").write_text(classes)
    return str(folder)


@pytest.mark.parametrize(
    ("labels", "said"),
    [
        (
            [b"1", b"2", b"3", b"4"],
            r"the label of 0.tar/000000003.cls is 4 and none is 0: they count from 1, subtract 1",
        ),
        ([b"0", b"-1", b"2"], r"1 of 3 labels are no numbers from 0 \(first: 0.tar/000000001.cls\)"),
        ([b"0", b"dog"], r"1 of 2 labels are no numbers from 0 \(first: 0.tar/000000001.cls\)"),
        ([b"0", b"1", b"", b"2"], r"1 of 4 labels are no numbers from 0 \(first: 0.tar/000000002.cls\)"),
        ([b"7"], r"the label of 0.tar/000000000.cls is 7; labels are 0\.\.3, the lines of .*classnames.txt"),
    ],
)
def test_a_label_that_is_no_line_of_the_class_names_is_refused(tmp_path, labels, said):
    with pytest.raises(UserError, match=said):
        open_tar(write_labels(tmp_path, labels))


def test_labels_of_some_samples_alone_are_not_used_and_this_is_reported(tmp_path):
    source = open_tar(write_labels(tmp_path, [b"0", None, b"2"]))
    assert source.class_names == () and source[0].label == -1
    assert "labels are not used: only 2 of 3 samples have a .cls" in source.notes


def test_class_names_that_are_given_are_checked_as_those_of_the_file(tmp_path):
    where = write_labels(tmp_path, [b"0", b"2"], "one\n")
    assert open_tar(where, class_names=["a", "b", "c"]).class_names == ("a", "b", "c")
    with pytest.raises(UserError, match=r"the label of 0.tar/000000001.cls is 2; labels are 0\.\.1: name the classes"):
        open_tar(where, class_names=["a", "b"])
    with pytest.raises(UserError, match="only 1 of 2 samples have a label"):
        open_tar(write_labels(tmp_path, [b"0", None]), class_names=["a", "b"])


def test_class_names_of_two_folders_must_be_the_same(tmp_path):
    (tmp_path / "a").mkdir(), (tmp_path / "b").mkdir()
    a, b = write_labels(tmp_path / "a", [b"0"]), write_labels(tmp_path / "b", [b"0"], "dog\ncat\nowl\nfox\n")
    with pytest.raises(UserError, match="have other classes"):
        open_tar(f"{a},{b}")
    (tmp_path / "b" / "classnames.txt").write_bytes(b"\xef\xbb\xbfcat\r\ndog\r\nowl\r\nfox\r\n\r\n")  # Windows
    assert open_tar(f"{a},{b}").class_names == ("cat", "dog", "owl", "fox")


@pytest.mark.parametrize(("classes", "said"), [(b"cat\n\ndog", "line 2: empty"), (b"caf\xe9", "not UTF-8")])
def test_class_names_that_cannot_be_read_are_refused(tmp_path, classes, said):
    where = write_labels(tmp_path, [b"0"])
    (tmp_path / "classnames.txt").write_bytes(classes)
    with pytest.raises(UserError, match=said):
        open_tar(where)


def test_samples_with_labels_alone_take_the_class_name_whatever_field_another_source_has(tmp_path):
    write_shard(tmp_path / "0.tar", [{"jpg": jpeg(i), "cls": str(i).encode()} for i in range(2)])
    with pytest.raises(UserError, match=r"samples have labels: write .*classnames.txt"):
        open_tar(str(tmp_path))
    (tmp_path / "classnames.txt").write_text("cat\ndog\n")
    source = open_tar(str(tmp_path), caption="caption")
    assert [s.captions for s in source] == [("cat",), ("dog",)]
    assert source.notes == ("captions are the names of the 2 classes",)


def test_a_field_that_is_not_in_the_json_is_refused_with_those_that_are(tmp_path):
    where = write_shards(tmp_path, 3).removeprefix("tar:")
    with pytest.raises(UserError, match=r"captoin: no \.json .*\(nearest: caption\); .* caption, captions\.de, tags"):
        open_tar(where, caption="captoin")
    with pytest.raises(UserError, match=r"caption=caption, and no sample has a \.json"):
        open_tar(write_members(tmp_path / "txt" / "a.tar", *pair("x")), caption="caption")
    only_json = write_members(tmp_path / "json" / "a.tar", ("x.jpg", jpeg(0)), ("x.json", b'{"alt": "an x", "id": 3}'))
    with pytest.raises(
        UserError, match=r"no sample has a \.txt caption; set config.data.caption to a path in the \.json \(alt\)"
    ):
        open_tar(only_json)


def test_captions_are_valid_unicode(tmp_path):
    about = json.dumps({"caption": "half \ud83d, whole \ud83d\ude00"}).encode()
    assert rb"\ud83d" in about
    where = write_members(tmp_path / "a.tar", ("x.jpg", jpeg(0)), ("x.json", about), ("x.txt", "\ufeffmarked".encode()))
    assert open_tar(where, caption="caption")[0].captions == ("half \ufffd, whole \U0001f600",)
    assert open_tar(where)[0].captions == ("marked",)


def test_a_text_may_have_a_caption_per_line(tmp_path):
    where = write_members(tmp_path / "a.tar", ("x.jpg", jpeg(0)), ("x.txt", b"an x\n\n a cross \n"))
    assert open_tar(where, caption="txt_lines")[0].captions == ("an x", "a cross")
    assert open_tar(where)[0].captions == ("an x\n\n a cross",)


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


@pytest.mark.parametrize("bad", [b"", b"<html>not found</html>" * 100, None])
def test_one_bad_shard_among_good_ones_is_skipped_counted_and_named(tmp_path, bad):
    write_shards(tmp_path, 8, shards=4)
    broken = tmp_path / "train-00001.tar"
    broken.write_bytes(broken.read_bytes()[:-9000] if bad is None else bad)
    with pytest.raises(UserError, match=r"train-00001.tar: .*config.data.truncated=keep"):
        open_tar(str(tmp_path))
    source = open_tar(str(tmp_path), truncated="keep")
    numbers = [int(s.captions[0].split()[-1]) for s in source]
    assert set(numbers) >= {0, 1, 4, 5, 6, 7} and len(numbers) < 8
    assert any("1 shards that are truncated or no tar files" in n and "train-00001.tar" in n for n in source.notes)


def test_a_compressed_shard_is_called_that(tmp_path):
    with tarfile.open(tmp_path / "a.tar", "w:gz"):
        pass
    with pytest.raises(UserError, match="it is compressed: decompress it"):
        open_tar(str(tmp_path / "a.tar"))


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
