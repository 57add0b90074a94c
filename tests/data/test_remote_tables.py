"""Tables on a web server or in a bucket, and tables of URLs: the samples of the local files, or a stop."""

import csv

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from clip_jax.data.sources import BadSampleError, open_source
from clip_jax.errors import UserError
from clip_jax.storage import remote
from tests import emulators
from tests.data.faulty_server import serve
from tests.data.shards import jpeg


@pytest.fixture
def server(tmp_path, monkeypatch):
    monkeypatch.setattr(remote, "PAUSES_SECONDS", (0.001,) * 6)
    (tmp_path / "data").mkdir()
    with serve(tmp_path / "data") as running:
        yield running


def write_tables(folder) -> None:
    """Eight pairs as commas, tabs and Parquet with paths beside them, and as Parquet with bytes in two files."""
    (folder / "photos").mkdir(parents=True, exist_ok=True)
    for i in range(8):
        (folder / "photos" / f"{i}.jpg").write_bytes(jpeg(i))
    rows = [(f"photos/{i}.jpg", f"number {i}, a picture") for i in range(8)]
    for name, delimiter in (("a.csv", ","), ("a.tsv", "\t")):
        with open(folder / name, "w", newline="", encoding="utf-8") as file:
            csv.writer(file, delimiter=delimiter).writerows([("file", "caption"), *rows])
    files, captions = zip(*rows, strict=True)
    pq.write_table(pa.table({"file": files, "caption": captions}), folder / "paths.parquet")
    for number, part in enumerate((slice(0, 5), slice(5, 8))):
        images = [jpeg(i) for i in range(8)[part]]
        table = pa.table({"image": images, "caption": captions[part]})
        pq.write_table(table, folder / f"bytes-{number}.parquet", row_group_size=2)


TABLES = ("csv:{}/a.csv", "csv:{}/a.tsv", "parquet:{}/paths.parquet", "parquet:{}/bytes-{{0..1}}.parquet")


def pairs(source) -> list:
    return [(sample.image, sample.captions) for sample in map(source.__getitem__, range(len(source)))]


@pytest.mark.parametrize("table", TABLES)
def test_a_table_on_a_failing_server_is_the_local_one(server, table, monkeypatch):
    monkeypatch.setattr(remote, "CHUNK_BYTES", 100)  # several reads for each table
    write_tables(server.folder)
    local = open_source(table.format(server.folder))
    server.every = 3
    distant = open_source(table.format(server.url))
    assert pairs(distant) == pairs(local) and len(distant) == 8
    assert distant.fingerprint == local.fingerprint
    assert bool(distant.notes) == ("bytes" not in table) and not local.notes
    assert len(server.requests) > 4


@pytest.mark.parametrize("scheme", ["s3", pytest.param("gs", marks=pytest.mark.slow)])
def test_tables_in_a_bucket_are_the_local_ones(scheme, tmp_path, monkeypatch):
    write_tables(tmp_path / "data")
    with emulators.filled(scheme, tmp_path / "data", monkeypatch) as (_, folder):
        for table in TABLES:
            local, distant = open_source(table.format(tmp_path / "data")), open_source(table.format(folder))
            assert pairs(distant) == pairs(local) and distant.fingerprint == local.fingerprint
        urls = tmp_path / "urls.tsv"
        urls.write_text(f"filepath\ttitle\n{folder}/photos/3.jpg\tthree\n{folder}/photos/none.jpg\tnone\n")
        source = open_source(f"csv:{urls}")
        assert source[0].image == jpeg(3) and source[0].key == f"{folder}/photos/3.jpg"
        with pytest.raises(BadSampleError, match="no such file on the server"):
            source[1]


def test_an_image_that_a_server_does_not_have_is_bad_and_one_that_it_does_not_give_now_is_awaited(server):
    write_tables(server.folder)
    table = server.folder / "urls.csv"
    rows = "".join(f"{server.url}/photos/{i}.jpg,number {i}\n" for i in range(10))
    table.write_text(f"url,caption\n{rows}")
    source = open_source(f"csv:{table}")
    assert source.notes[0].endswith(f"(first: {server.url}/photos/0.jpg)")
    server.every = 3
    assert [source[i].image for i in range(8)] == [jpeg(i) for i in range(8)]
    assert len(server.requests) >= 10
    server.every = 0
    server.requests.clear()
    for status, reason in ((404, "no such file on the server"), (403, "may not read it"), (451, "status 451")):
        server.missing_status = status
        with pytest.raises(BadSampleError, match=reason):
            source[8]
    assert len(server.requests) == 3, "a final answer is not asked for again"
    for status in (429, 500):
        server.missing_status = status
        with pytest.raises(UserError, match=rf"photos/9.jpg: cannot be read after 7 attempts \({status}"):
            source[9]


def test_a_table_that_is_larger_than_the_disk_is_refused_before_it_is_copied(server, monkeypatch):
    write_tables(server.folder)
    monkeypatch.setattr("shutil.disk_usage", lambda _: type("Usage", (), {"free": 1000}))
    with pytest.raises(UserError, match=r"do not fit in .*CLIP_JAX_CACHE, or use tar shards"):
        open_source(f"parquet:{server.url}/bytes-0.parquet")
