"""ArrayRecord files read by range: record for record what the array_record library reads."""

import contextlib

import numpy as np
import pytest
from array_record.python.array_record_data_source import ArrayRecordDataSource
from array_record.python.array_record_module import ArrayRecordWriter

from clip_jax.data.sources import array_record_ranges, open_source
from clip_jax.data.sources.array_record_ranges import open_ranges, varints
from clip_jax.errors import UserError
from clip_jax.storage import remote
from tests import emulators
from tests.data.faulty_server import serve
from tests.data.tfds_fixture import write_coco_captions


@pytest.fixture
def server(tmp_path, monkeypatch):
    monkeypatch.setattr(remote, "PAUSES_SECONDS", (0.001,) * 6)
    (tmp_path / "data").mkdir()
    with serve(tmp_path / "data") as running:
        yield running


def write(path, records, options) -> None:
    writer = ArrayRecordWriter(str(path), options)
    for record in records:
        writer.write(record)
    writer.close()


def some_records(seed: int) -> list[bytes]:
    """Empty ones, small ones, ones around the block size of 64 KiB, and one of several blocks."""
    rng = np.random.default_rng(seed)
    sizes = [0, 1, 0, 20, 65_407, 65_408, 65_472, 65_536, 3, *rng.integers(0, 3000, 60), 300_000, *[7] * 9]
    return [rng.bytes(size // 2) + bytes(size - size // 2) for size in sizes]


@pytest.mark.parametrize("group", [1, 7, 1000])
@pytest.mark.parametrize("codec", ["uncompressed", "zstd:3", "brotli:1", "snappy"])
def test_every_record_is_that_of_the_library(tmp_path, codec, group):
    paths = [tmp_path / f"{i}.array_record" for i in range(3)]
    for i, path in enumerate(paths):
        write(path, some_records(i) if i != 1 else [b"alone"], f"group_size:{group},{codec}")
    files = [str(path) for path in paths]
    ours, theirs = open_ranges(files), ArrayRecordDataSource(files)
    assert len(ours) == len(theirs)
    assert all(ours[i] == theirs[i] for i in range(len(theirs)))
    assert bool(ours.notes) == (group > 1)
    assert len(open_ranges(files).rows) == sum(-(-n // group) for n in (len(some_records(0)), 1, len(some_records(2))))


def test_chunks_that_end_at_a_block_are_found(tmp_path):
    path = tmp_path / "a.array_record"
    for options in ("group_size:2,uncompressed,pad_to_block_boundary:true", "group_size:1,pad_to_block_boundary:true"):
        write(path, some_records(5), options)
        assert [open_ranges([str(path)])[i] for i in range(len(some_records(5)))] == some_records(5)


def test_damage_is_a_bad_record_or_a_refused_file(tmp_path):
    path, records = tmp_path / "a.array_record", [bytes([i]) * 500 for i in range(20)]
    write(path, records, "group_size:5,zstd")
    content, source = path.read_bytes(), open_ranges([str(path)])
    offset = int(source.rows[1, 0])
    for damaged in (b"\xff" * 8, bytes(8)):  # the size of the data
        raw = bytearray(content[offset : offset + 200])
        raw[8:16] = damaged
        with pytest.raises(array_record_ranges.CorruptedError, match=f"Corrupted chunk at byte {offset}"):
            array_record_ranges.decode(bytes(raw), offset)
    for name, text, said in (
        ("short", content[:-100], "not a number of blocks"),
        ("page", b"<html>" + bytes(2 * 65536 - 6), "Corrupted chunk|no postscript"),
        ("half", content[:65536], "not a number of blocks"),
        ("twice", content[:-65536] + content[:65536], "Corrupted chunk|no postscript"),
    ):
        other = tmp_path / f"{name}.array_record"
        other.write_bytes(text)
        with pytest.raises(UserError, match=rf"{name}.array_record: not an ArrayRecord file .*({said})"):
            open_ranges([str(other)])
    transposed = tmp_path / "t.array_record"
    write(transposed, records, "group_size:5,transpose:true")
    with pytest.raises(UserError, match="write it with transpose:false"):
        open_ranges([str(transposed)])


def test_random_damage_ends_in_the_same_two_ways(tmp_path):
    path, rng = tmp_path / "a.array_record", np.random.default_rng(0)
    write(path, some_records(1)[:20], "group_size:3,zstd")
    content = path.read_bytes()
    for number in range(60):
        damaged, other = bytearray(content), tmp_path / f"{number}.array_record"
        start = rng.choice([0, len(content) - 65536])
        for offset in rng.integers(start, start + 400, 6):
            damaged[offset] = rng.integers(256)
        other.write_bytes(damaged)
        try:
            source = open_ranges([str(other)])
            for i in range(len(source)):
                with contextlib.suppress(array_record_ranges.CorruptedError):
                    source[i]
        except UserError as error:
            assert "\n" not in str(error)


def test_numbers_of_base_128():
    assert varints(b"\x00\x7f\x80\x01\xff\xff\xff\xff\xff\xff\xff\xff\xff\x01").tolist() == [0, 127, 128, 2**64 - 1]
    assert varints(b"").tolist() == []
    for wrong in (b"\x80", b"\x80" * 10 + b"\x01"):
        with pytest.raises(ValueError):
            varints(wrong)


@pytest.fixture(scope="module")
def coco(tmp_path_factory):
    folder = tmp_path_factory.mktemp("coco")
    write_coco_captions(folder / "tfds", splits={"train": 9}, shards=2)
    return folder / "tfds"


def pairs(source) -> list:
    return [(sample.image, sample.captions) for sample in map(source.__getitem__, range(len(source)))]


def test_a_source_on_a_failing_server_is_the_local_one(server, coco):
    local = open_source(f"array_record:{coco}/coco_captions/2014/1.1.0")
    for path in (coco / "coco_captions/2014/1.1.0").iterdir():
        (server.folder / path.name).write_bytes(path.read_bytes())
    server.every = 5
    where = f"array_record:{server.url}/coco_captions-train.array_record-{{00000..00001}}-of-00002"
    distant = open_source(where)
    assert pairs(distant) == pairs(local) and distant.fingerprint == local.fingerprint and len(distant) == 9
    server.every = 0
    server.requests.clear()
    distant[3]
    assert len(server.requests) == 1
    assert pairs(open_source(where, long_reads=True)) == pairs(local)
    server.down = True
    with pytest.raises(UserError, match="cannot be read after 7 attempts"):
        distant[4]


@pytest.mark.parametrize("scheme", ["gs", pytest.param("s3", marks=pytest.mark.slow)])
def test_tfds_in_a_bucket_is_the_local_dataset(scheme, coco, monkeypatch):
    with emulators.filled(scheme, coco, monkeypatch) as (files, folder):
        local = open_source(f"array_record:{coco}/coco_captions/2014/1.1.0")
        assert pairs(open_source(f"array_record:{folder}/coco_captions/2014/1.1.0")) == pairs(local)
        monkeypatch.setenv("TFDS_DATA_DIR", folder)
        for where in (
            "coco_captions/train",
            "coco_captions/2014:1.1.0/train[2:7]",
            "coco_captions/train[6:]+train[:2]",
        ):
            here, there = open_source(f"tfds:{where}", tfds_dir=str(coco)), open_source(f"tfds:{where}")
            assert pairs(there) == pairs(here) and there.fingerprint == here.fingerprint
            assert there[1].key == here[1].key
        with pytest.raises(UserError, match=rf"tfds:mine: mine is neither in {folder} nor in the TFDS catalog"):
            open_source("tfds:mine/train")
        (name,) = {name for name in files.ls(f"{folder}/coco_captions/2014/1.1.0") if "00001-of" in name}
        files.rm(name)
        with pytest.raises(UserError, match=r"1 of 2 shards of split 'train' are not in .*copy them there"):
            open_source("tfds:coco_captions/train")


def test_files_of_other_records_are_refused(server):
    write(server.folder / "a.array_record", [b"\xff\xff"], "group_size:1")
    with pytest.raises(UserError, match=r"first record is not a tf\.train\.Example"):
        open_source(f"array_record:{server.url}/a.array_record")
