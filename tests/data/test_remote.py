"""Shards on a web server: the same samples as on disk, through every fault, and a stop when it lasts."""

from concurrent.futures import ThreadPoolExecutor

import fsspec
import numpy as np
import pytest

from clip_jax.data.sources import open_source, tar_index
from clip_jax.errors import UserError
from clip_jax.storage import remote
from tests import emulators
from tests.data.faulty_server import serve
from tests.data.shards import sample, write_shard, write_shards
from tests.data.test_stream import batches, equal


@pytest.fixture
def server(tmp_path, monkeypatch):
    monkeypatch.setattr(remote, "PAUSES_SECONDS", (0.001,) * 6)
    (tmp_path / "shards").mkdir()
    with serve(tmp_path / "shards") as running:
        yield running


def test_a_server_that_fails_one_request_in_five_gives_the_same_batches(server):
    local = open_source(write_shards(server.folder, 40, shards=4))
    server.every = 5
    distant = open_source(f"tar:{server.url}/train-{{00000..00003}}.tar")
    assert distant.fingerprint == local.fingerprint and len(distant) == 40
    here, there = batches(local), batches(distant)
    with ThreadPoolExecutor(4) as pool:
        for step, found in enumerate(pool.map(lambda step: there(step, np.arange(8)), range(12))):
            assert equal(found, here(step, np.arange(8)))
    assert there.faults.reasons.total() == 0, "what a server does not deliver is not replaced"
    assert len(server.requests) > 100


def test_a_server_that_is_silent_is_asked_again(server, monkeypatch):
    local = open_source(write_shards(server.folder, 6, shards=1))
    monkeypatch.setattr(remote, "SILENCE_SECONDS", 0.3)
    remote._of_scheme.cache_clear()
    fsspec.get_filesystem_class("http").clear_instance_cache()
    try:
        source = open_source(f"tar:{server.url}/train-00000.tar")
        server.requests.clear()
        server.silence, server.every = 600, 1
        monkeypatch.setattr("tests.data.faulty_server.FAULTS", ("", "slow"))  # every second request
        assert [source[i] for i in range(3)] == [local[i] for i in range(3)]
        assert len(server.requests) >= 5
    finally:
        remote._of_scheme.cache_clear()
        fsspec.get_filesystem_class("http").clear_instance_cache()


def test_a_shard_is_streamed_once_and_a_sample_is_one_request(server, monkeypatch):
    write_shards(server.folder, 40, shards=1)
    monkeypatch.setattr(tar_index, "REMOTE_WINDOW", 32 * 1024)
    source = open_source(f"tar:{server.url}/train-00000.tar")
    size = (server.folder / "train-00000.tar").stat().st_size
    read = [r for _, r in server.requests if r]
    assert len(read) <= size // (16 * 1024) + 3
    server.requests.clear()
    source[7], source[30]
    assert len(server.requests) == 2
    open_source(f"tar:{server.url}/train-00000.tar")
    assert all(r is None for _, r in server.requests[2:]), "the index is kept: only the version is asked for"


def test_neighbors_are_read_in_long_pieces_which_are_read_once(server, monkeypatch):
    local = open_source(write_shards(server.folder, 40, shards=2))
    source = open_source(f"tar:{server.url}/train-{{00000..00001}}.tar", long_reads=True)
    server.requests.clear()
    monkeypatch.setattr(remote, "CHUNK_BYTES", 16 * 1024)
    with ThreadPoolExecutor(4) as pool:
        assert list(pool.map(source.__getitem__, range(40))) == [local[i] for i in range(40)]
    size = sum(path.stat().st_size for path in server.folder.glob("*.tar"))
    assert len(server.requests) == len(set(server.requests)) <= size // (16 * 1024) + 2


def test_labels_of_remote_shards_are_checked_and_an_outage_is_not_taken_for_no_classes(server):
    write_shard(server.folder / "0.tar", [sample(i) | {"cls": str(i).encode()} for i in range(3)])
    where = f"tar:{server.url}/0.tar"
    assert open_source(where).class_names == ()
    (server.folder / "classnames.txt").write_text("cat\ndog\nowl\n")
    source = open_source(where)
    assert source.class_names == ("cat", "dog", "owl") and source[1].label == 1
    (server.folder / "classnames.txt").write_text("cat\ndog\n")
    with pytest.raises(UserError, match=r"0.tar/000000002.cls is 2; labels are 0\.\.1, the lines of http.*classnames"):
        open_source(where)
    server.missing_status = 500
    (server.folder / "classnames.txt").unlink()
    with pytest.raises(UserError, match=r"classnames.txt: cannot be read after 7 attempts"):
        open_source(where)


def test_a_remote_shard_that_changed_is_indexed_again(server):
    write_shard(server.folder / "0.tar", [sample(i) for i in range(4)])
    before = open_source(f"tar:{server.url}/0.tar")
    write_shard(server.folder / "0.tar", [sample(i) for i in range(5, 9)])
    after = open_source(f"tar:{server.url}/0.tar")
    assert after[0].captions == ("picture number 5",) and after.fingerprint != before.fingerprint


def test_a_lasting_outage_and_a_missing_shard_end_in_one_line(server):
    write_shards(server.folder, 4, shards=1)
    source = open_source(f"tar:{server.url}/train-00000.tar")
    server.down = True
    with pytest.raises(UserError, match=r"train-00000.tar: cannot be read after 7 attempts \(503"):
        source[0]
    with pytest.raises(UserError, match=r"train-00000.tar: cannot be read after 7 attempts \(503"):
        remote.stat(f"{server.url}/train-00000.tar")
    server.down = False
    server.missing_status = 403
    with pytest.raises(UserError, match=r"none.tar: these credentials may not read it \(403"):
        remote.stat(f"{server.url}/none.tar")
    server.missing_status = 404
    assert source[0].captions == ("picture number 0",)
    with pytest.raises(UserError, match=r"train-00001\.tar: no such file on the server"):
        open_source(f"tar:{server.url}/train-{{00000..00001}}.tar")
    with pytest.raises(UserError, match="a web server does not list its files"):
        open_source(f"tar:{server.url}/*.tar")


@pytest.mark.parametrize("long_reads", [False, True])
def test_a_shard_that_is_rewritten_is_not_read_through_its_old_index(server, long_reads):
    write_shards(server.folder, 10, shards=1)
    source = open_source(f"tar:{server.url}/train-00000.tar", long_reads=long_reads)
    write_shard(server.folder / "train-00000.tar", [sample(100 + i) for i in range(10)])
    with pytest.raises(UserError, match=r"train-00000\.tar: changed while it was read; start again"):
        source[0]


@pytest.mark.parametrize("scheme", ["s3", "gs"])
def test_shards_in_a_bucket_are_found_by_a_pattern_and_read_as_on_disk(scheme, tmp_path, monkeypatch):
    local = open_source(write_shards(tmp_path / "shards", 10, shards=2))
    with emulators.filled(scheme, tmp_path / "shards", monkeypatch) as (files, folder):
        for where in (folder, f"{folder}/*-0000?.tar", f"{folder}/train-{{00000..00001}}.tar"):
            source = open_source(f"tar:{where}")
            assert [source[i] for i in range(10)] == list(local) and source.fingerprint == local.fingerprint
        before = remote.stat(f"{folder}/train-00000.tar")
        opened = open_source(f"tar:{folder}/train-00000.tar")
        files.put_file(str(tmp_path / "shards/train-00001.tar"), f"{folder}/train-00000.tar")
        assert remote.stat(f"{folder}/train-00000.tar") != before
        assert open_source(f"tar:{folder}/train-00000.tar")[0].captions == local[5].captions
        if scheme == "s3":
            with pytest.raises(UserError, match="changed while it was read; start again"):
                opened[0]
        else:  # the emulator answers with the newest content whatever the generation; the question has it
            asked, request = [], files._request
            monkeypatch.setattr(files, "_request", lambda *of, **more: asked.append(of[1]) or request(*of, **more))
            opened[0]
            assert asked and all(f"generation={before[1]}" in url for url in asked)
