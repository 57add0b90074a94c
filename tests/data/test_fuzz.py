"""Damaged and hostile shards: one line or a replaced example, never a crash, and the same batch each time."""

import io
import pickle
import tarfile
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from clip_jax.data.sources import BadSampleError, open_source
from clip_jax.data.sources.tar import open_tar
from clip_jax.errors import UserError
from tests.data.shards import jpeg, sample, write_shard
from tests.data.test_stream import batches, equal

BLOCK = 512


def with_checksum(header: bytearray) -> bytearray:
    header[148:156] = b" " * 8
    header[148:156] = f"{sum(header):06o}\0 ".encode()
    return header


def damaged(content: bytes, rng: np.random.Generator) -> bytes:
    """Random bytes in members, in headers with and without a right checksum, in lengths; cuts, holes, repetitions."""
    data = bytearray(content)
    with tarfile.open(fileobj=io.BytesIO(content)) as archive:
        members = archive.getmembers()
    for _ in range(rng.integers(1, 4)):
        member = members[rng.integers(len(members))]
        header = slice(member.offset, member.offset + BLOCK)
        match rng.integers(8):
            case 0:  # the content of a member
                for offset in rng.integers(member.offset_data, member.offset_data + max(1, member.size), 8):
                    data[offset % len(data)] = rng.integers(256)
            case 1:  # a header
                data[(member.offset + rng.integers(BLOCK)) % len(data)] = rng.integers(256)
            case 2 | 3:  # a header that is right by its own account
                changed = bytearray(data[header])
                for offset in rng.integers(0, 345, rng.integers(1, 4)):
                    changed[offset] = rng.integers(256)
                data[header] = with_checksum(changed)
            case 4:  # a length: octal, or binary of any size
                changed = bytearray(data[header])
                digits = f"{rng.integers(0, 2**33):011o}\0".encode()
                changed[124:136] = digits if rng.integers(2) else b"\x80" + rng.bytes(11)
                data[header] = with_checksum(changed)
            case 5:
                del data[rng.integers(len(data)) :]
                break
            case 6:
                start = rng.integers(len(data)) // BLOCK * BLOCK
                data[start : start + BLOCK * 4] = bytes(len(data[start : start + BLOCK * 4]))
            case 7:
                data[member.offset : member.offset] = data[member.offset : member.offset_data + member.size]
    return bytes(data)


def test_random_damage_ends_in_one_line_or_in_the_same_batch_twice(tmp_path):
    content = write_shard(tmp_path / "whole.tar", [sample(i) for i in range(6)]).read_bytes()
    rng, trained = np.random.default_rng(0), 0
    for number in range(150):
        path = tmp_path / str(number) / "0.tar"
        path.parent.mkdir()
        path.write_bytes(damaged(content, rng))
        try:
            twice = []
            for _ in range(2):
                make = batches(open_tar(str(path), truncated="keep", max_bad_share=1.0), batch_size=4, seed=number)
                twice.append([make(step, np.arange(4)) for step in range(2)])
            assert all(equal(a, b) for a, b in zip(*twice, strict=True))
            trained += 1
        except UserError as error:
            assert "\n" not in str(error)
    assert 50 < trained < 145


class Bomb:
    """What a pickle that is read would do."""

    def __init__(self, path: Path):
        self.path = path

    def __reduce__(self):
        return Path.touch, (self.path,)


def test_nothing_is_extracted_or_unpickled_and_links_and_outside_names_are_left_out(tmp_path):
    path, outside = tmp_path / "shards" / "0.tar", tmp_path / "pickled"
    path.parent.mkdir()
    with tarfile.open(path, "w") as archive:

        def add(name: str, data: bytes = b"", kind: bytes = tarfile.REGTYPE, link: str = "") -> None:
            member = tarfile.TarInfo(name)
            member.size, member.type, member.linkname = len(data), kind, link
            archive.addfile(member, io.BytesIO(data))

        add("1.jpg", jpeg(1))
        add("1.txt", b"one")
        add("1.pkl", pickle.dumps(Bomb(outside)))
        add("1.pyd", pickle.dumps(Bomb(outside)))
        for name in ("../evil", "a/../../evil", "/absolute"):
            add(f"{name}.jpg", jpeg(2))
            add(f"{name}.txt", b"two")
        add("3.jpg", kind=tarfile.SYMTYPE, link="/etc/passwd")
        add("3.txt", kind=tarfile.LNKTYPE, link="../../secret.txt")
        add("4.jpg", kind=tarfile.CHRTYPE)
    before = set(tmp_path.rglob("*"))
    source = open_tar(str(path))
    assert [s.captions for s in source] == [("one",), ("two",)] and source[1].key == "0.tar//absolute.jpg"
    batches(source, batch_size=2)(0, np.arange(2))
    notes = "; ".join(source.notes)
    for said in ("4 names with .. in them (first: 0.tar/../evil.jpg)", "1 files that are not read, ending in .pkl"):
        assert said in notes
    assert "3 links" in notes
    after = {file for file in tmp_path.rglob("*") if ".clip_jax_index" not in file.parts}
    assert after == before and not outside.exists()


def test_odd_json_and_text_are_faults_of_their_examples(tmp_path):
    odd = [
        b"[" * 200_000,
        b'{"caption": ' * 50_000,
        b"\xff\xfe",
        b'{"caption": 1' + b"0" * 5000 + b"}",
        b"\0" * 50,
        b"null",
    ]
    samples = [sample(0), *({"jpg": jpeg(i), "json": content} for i, content in enumerate(odd))]
    source = open_tar(str(write_shard(tmp_path / "0.tar", samples)), caption="caption")
    assert source[0].captions == ("picture number 0",)
    for index in range(1, len(samples)):
        with pytest.raises(BadSampleError, match=r"unreadable caption|empty caption"):
            source[index]


def test_a_damaged_parquet_file_is_one_line(tmp_path):
    path, rng = tmp_path / "a.parquet", np.random.default_rng(0)
    pq.write_table(pa.table({"image": [jpeg(i) for i in range(40)], "caption": ["a picture"] * 40}), path)
    content, refused = path.read_bytes(), 0
    for number in range(30):
        damaged = bytearray(content)
        for offset in rng.integers(0, len(content), 20):
            damaged[offset] = rng.integers(256)
        path.write_bytes(damaged[: rng.integers(1, len(content))] if number % 3 == 0 else damaged)
        try:
            source = open_source(f"parquet:{path}")
            assert all(len(source[i].captions) == 1 for i in range(len(source)))
        except BadSampleError:
            continue
        except UserError as error:
            refused += 1
            assert "\n" not in str(error)
    assert refused >= 10


def test_a_shard_that_is_a_web_page_or_compressed_is_one_line(tmp_path):
    for name, content in (("page", b"<html>" * 500), ("zip", b"\x1f\x8b" + bytes(2000)), ("none", b"")):
        (tmp_path / f"{name}.tar").write_bytes(content)
        with pytest.raises(UserError, match=rf"{name}.tar: not a tar file"):
            open_tar(str(tmp_path / f"{name}.tar"))
