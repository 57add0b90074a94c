"""ArrayRecord files are read as TFDS reads what it wrote, without TensorFlow."""

import pytest
from array_record.python.array_record_module import ArrayRecordWriter

from clip_jax.data.sources import BadSampleError, open_source
from clip_jax.errors import UserError
from tests.data.tfds_fixture import write_coco_captions


@pytest.fixture(scope="module")
def coco(tmp_path_factory):
    folder = tmp_path_factory.mktemp("coco")
    return folder, write_coco_captions(folder, splits={"train": 9}, shards=2)["train"]


def test_every_record_has_its_image_and_captions(coco):
    folder, written = coco
    source = open_source(f"array_record:{folder}/coco_captions/2014/1.1.0/*.array_record-0000?-of-00002")
    assert [s.image for s in source] == [e["image"] for e in written]
    assert [s.captions for s in source] == [tuple(c["text"] for c in e["captions"]) for e in written]
    tfds = open_source("tfds:coco_captions/train", tfds_dir=str(folder))
    assert [(s.image, s.captions) for s in source] == [(s.image, s.captions) for s in tfds]
    named = open_source(
        f"array_record:{folder}/coco_captions/2014/1.1.0/*of-00002", caption="image/filename,captions/text"
    )
    assert named[3].captions[0] == "COCO_val2014_000000000003.jpg" and named[3].shares == pytest.approx(
        (0.5, *[0.1] * 5)
    )
    assert named.fingerprint != source.fingerprint


def test_what_is_no_example_is_refused_or_a_fault_of_its_own(coco, tmp_path):
    folder, _ = coco
    with pytest.raises(
        UserError, match=r"no caption in its first record, which has captions/text.*config.data.caption"
    ):
        open_source(f"array_record:{folder}/coco_captions/2014/1.1.0/*of-00002", caption="caption")
    good = next((folder / "coco_captions/2014/1.1.0").glob("*of-00002"))
    record = open_source(f"array_record:{good}").records[0]
    path = tmp_path / "mixed.array_record"
    writer = ArrayRecordWriter(str(path), "group_size:1")
    for data in (record, b"\xff\xff no example", record[: len(record) // 2], b""):
        writer.write(data)
    writer.close()
    source = open_source(f"array_record:{path}")
    assert source[0].captions
    for index in (1, 2, 3):
        with pytest.raises(BadSampleError):
            source[index]
    (tmp_path / "page.array_record").write_bytes(b"<html>")
    with pytest.raises(UserError, match="array_record:"):
        open_source(f"array_record:{tmp_path}/page.array_record")
