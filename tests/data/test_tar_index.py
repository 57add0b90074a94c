"""The index of tar shards: small, made once, never used for a shard that changed; headers as ``tarfile`` reads them."""

import io
import json
import tarfile
import time
import tracemalloc

import numpy as np
import pytest

from clip_jax.data.order import Order
from clip_jax.data.sources import identity, tar_headers, tar_index
from clip_jax.data.sources.folder import open_folder
from clip_jax.data.sources.labels import Labels
from clip_jax.data.sources.left_out import LeftOut
from clip_jax.data.sources.tar import open_tar
from clip_jax.errors import UserError
from clip_jax.storage import ranges
from tests.data.shards import jpeg, sample, write_shard, write_shards


@pytest.fixture
def scanned(monkeypatch) -> list[str]:
    """The shards whose headers are read."""
    names, scan = [], tar_index._scan
    monkeypatch.setattr(tar_index, "_scan", lambda shard, *rest: names.append(shard) or scan(shard, *rest))
    return names


def test_the_index_is_made_once_and_has_24_bytes_per_sample(tmp_path, scanned):
    where = write_shards(tmp_path, 40).removeprefix("tar:")
    first = open_tar(where)
    assert len(scanned) == 2
    again = open_tar(where)
    assert len(scanned) == 2 and len(again) == 40 and again.fingerprint == first.fingerprint
    assert first.index.rows.nbytes == 24 * 40 and not first.index.rows.flags.owndata, "memory-mapped"


def test_only_a_shard_that_changed_is_read_again(tmp_path, scanned):
    where = write_shards(tmp_path, 9, shards=3).removeprefix("tar:")
    before = open_tar(where)
    scanned.clear()
    changed = write_shard(tmp_path / "train-00001.tar", [sample(i) for i in range(50, 54)])
    write_shard(tmp_path / "train-00003.tar", [sample(70)])
    after = open_tar(where)
    assert sorted(scanned) == [str(changed), str(tmp_path / "train-00003.tar")]
    assert [s.captions[0].split()[-1] for s in after] == ["0", "1", "2", "50", "51", "52", "53", "6", "7", "8", "70"]
    assert after.fingerprint != before.fingerprint


@pytest.mark.parametrize("change", ["captions", "pixels", "order", "keys"])
def test_the_fingerprint_is_of_what_is_in_the_shards(tmp_path, change):
    samples = [sample(i) for i in range(6)]
    where = write_shard(tmp_path / "0.tar", samples)
    before, size = open_tar(str(where)).fingerprint, where.stat().st_size
    copy = write_shard(tmp_path / "copy.tar", samples)
    assert open_tar(str(copy)).fingerprint == before, "a copy is the same data, whatever it is called"
    if change == "captions":
        samples[2]["txt"] = samples[2]["txt"][::-1]
    elif change == "pixels":
        middle = len(samples[2]["jpg"]) // 2
        samples[2]["jpg"] = samples[2]["jpg"][:middle] + b"#" + samples[2]["jpg"][middle + 1 :]
    elif change == "order":
        samples.reverse()
    write_shard(where, samples, first=100 if change == "keys" else 0)
    assert where.stat().st_size == size
    assert open_tar(str(where)).fingerprint != before


def test_a_shard_that_changes_under_a_run_is_not_read_through_its_index(tmp_path):
    path = write_shard(tmp_path / "0.tar", [sample(i) for i in range(6)])
    source = open_tar(str(path))
    assert source[3].captions == ("picture number 3",)
    content = path.read_bytes()
    time.sleep(0.02)  # longer than the file system's clock ticks
    with open(path, "r+b") as file:  # in place
        file.write(content[::-1])
    with pytest.raises(OSError, match="was changed while it was read"):
        source[3]


def test_the_index_lies_beside_the_shards_or_in_the_cache_folder(tmp_path, monkeypatch):
    monkeypatch.delenv("CLIP_JAX_CACHE")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    open_tar(write_shards(tmp_path / "open", 4).removeprefix("tar:"))
    assert len(list((tmp_path / "open" / tar_index.FOLDER).glob("*/rows"))) == 1
    assert not (tmp_path / "cache").exists()
    closed = write_shards(tmp_path / "closed", 4).removeprefix("tar:")
    (tmp_path / "closed").chmod(0o555)
    assert len(open_tar(closed)) == 4
    (tmp_path / "closed").chmod(0o755)
    assert len(list((identity.cache_folder() / "tar_index").glob("*/*/rows"))) == 1
    assert not (tmp_path / "closed" / tar_index.FOLDER).exists()


def test_an_index_of_two_billion_samples_takes_no_memory_and_has_no_table_of_its_order(tmp_path):
    """benchmarks/index.py times it."""
    samples, shards = 2_400_000_000, 2_000  # more than 32 bits hold
    facts = [0] * 4, LeftOut().to_json(), Labels()
    table = [[f"{i:05d}.tar", 1, "0", samples // shards, "d", *facts] for i in range(shards)]
    (tmp_path / "shards.json").write_text(json.dumps(table))
    with open(tmp_path / "rows", "wb") as file:
        file.truncate(24 * samples)  # a sparse file
        file.seek(24 * (samples - 1))
        np.array([1, 2, 3, 4, 5, 6], "<u4").tofile(file)
    tracemalloc.start()
    index, order = tar_index.load(tmp_path), Order(samples, 128, seed=0)
    batches = [order.batch(step) for step in range(20)]
    assert [index.rows[batch].shape for batch in batches] == [(128, 6)] * 20
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert peak < 8e6, "the table of the shards, and nothing in proportion to samples"
    assert len(index) == samples and not index.rows.flags.owndata
    assert index.rows[samples - 1].tolist() == [1, 2, 3, 4, 5, 6] == list(index.row(samples - 1))
    assert index.row(-1) == index.row(samples - 1) and index.row(samples - 2) == (0,) * 6
    with pytest.raises(IndexError):
        index.row(samples)
    assert all(batch.dtype == np.int64 and batch.min() >= 0 for batch in batches)
    assert 2**31 < max(batch.max() for batch in batches) < samples
    late = order.positions(2**40)  # of a run that never ends
    assert late[0] == 2**47 and order.indices(late).max() < samples


NAMES = [
    "a.jpg",
    "./b c.txt",
    "x" * 96 + ".jpg",
    "folder/" * 20 + "deep.txt",
    "ünïcödé.jpg",
    "y" * 300 + ".json",
    "folder/" * 50 + "deep.txt",
]


@pytest.mark.parametrize("form", [tarfile.USTAR_FORMAT, tarfile.GNU_FORMAT, tarfile.PAX_FORMAT])
def test_headers_are_read_as_tarfile_reads_them(tmp_path, form):
    path = tmp_path / "0.tar"
    with tarfile.open(path, "w", format=form) as archive:
        for number, name in enumerate(NAMES[: 5 if form == tarfile.USTAR_FORMAT else None]):
            member = tarfile.TarInfo(name)
            member.size, member.mtime = 300 * number, 1.5  # webdataset writes fractions: a record for each member
            archive.addfile(member, io.BytesIO(bytes(member.size)))
        for kind in (tarfile.DIRTYPE, tarfile.SYMTYPE, tarfile.LNKTYPE, tarfile.FIFOTYPE):
            other = tarfile.TarInfo("other")
            other.type, other.linkname = kind, "z" * 150 if form != tarfile.USTAR_FORMAT else "z"
            archive.addfile(other)
        archive.addfile(tarfile.TarInfo("last.txt"))
    with tarfile.open(path) as archive:
        expected = [(m.name, m.isreg(), m.offset_data, m.size) for m in archive]
    found = list(tar_headers.members(ranges.reader(str(path))))
    assert [(m.name.rstrip("/"), m.regular, m.offset, m.size) for m in found] == expected
    assert [m.start for m in found[1:]] == [m.end for m in found[:-1]]


def test_members_of_a_sample_may_lie_far_apart(tmp_path, monkeypatch):
    path = tmp_path / "0.tar"
    with tarfile.open(path, "w") as archive:
        for extension in ("jpg", "txt"):
            for i in range(20):
                data = jpeg(i) if extension == "jpg" else f"picture {i}".encode()
                member = tarfile.TarInfo(f"{i}.{extension}")
                member.size = len(data)
                archive.addfile(member, io.BytesIO(data))
    source = open_tar(str(path))
    together = [(s.image, s.captions, s.key) for s in source]
    monkeypatch.setattr("clip_jax.data.sources.tar.AT_ONCE_BYTES", 1024)
    assert [(s.image, s.captions, s.key) for s in source] == together
    assert together[7] == (jpeg(7), ("picture 7",), "0.tar/7.jpg")


def test_bytes_in_the_middle_that_are_no_header_end_the_shard(tmp_path):
    path = write_shard(tmp_path / "0.tar", [sample(i) for i in range(6)])
    with tarfile.open(path) as archive:
        offset = archive.getmembers()[9].offset
    content = bytearray(path.read_bytes())
    content[offset : offset + 5] = b"?????"
    path.write_bytes(content)
    with pytest.raises(UserError, match="truncated"):
        open_tar(str(path))
    assert len(open_tar(str(path), truncated="keep")) == 3


def test_where_no_index_can_be_kept_is_one_line(tmp_path, monkeypatch):
    (tmp_path / "file").touch()
    monkeypatch.setenv("CLIP_JAX_CACHE", str(tmp_path / "file"))
    with pytest.raises(UserError, match=r"cannot be written there .* set CLIP_JAX_CACHE"):
        open_tar(write_shards(tmp_path / "shards", 2).removeprefix("tar:"))
    (tmp_path / "images").mkdir()
    for i in range(2):
        (tmp_path / "images" / f"{i}.jpg").write_bytes(jpeg(i))
        (tmp_path / "images" / f"{i}.txt").write_text("a picture")
    assert len(open_folder(str(tmp_path / "images"))) == 2, "images in a folder need none"


def test_a_header_with_a_checksum_of_signed_bytes_is_read(tmp_path):
    path = write_shard(tmp_path / "0.tar", [{"jpg": jpeg(1), "txt": b"one"}])
    content = bytearray(path.read_bytes())
    content[0:4] = "é0".encode() + b"0"
    signed = 8 * 32 + sum(b - 256 if b > 127 else b for b in content[:148] + content[156:512])
    content[148:156] = f"{signed:06o}\0 ".encode()
    path.write_bytes(content)
    first = next(tar_headers.members(ranges.reader(str(path))))
    assert first.name == bytes(content[:100]).rstrip(b"\0").decode() and first.name.startswith("é")
