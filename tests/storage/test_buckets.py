"""A run in a bucket equals a run in a folder; a bucket that cannot be used gives one line.

The servers are emulators of Google's and Amazon's storage (``emulators.py``); all else is as for a user.
"""

import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import fsspec
import numpy as np
import portpicker
import pytest

import clip_jax
from clip_jax.errors import UserError
from clip_jax.storage import buckets, checkpoints
from clip_jax.storage.run_folder import Folder
from tests import emulators
from tests.training import runs


@pytest.fixture(scope="module", params=emulators.STORES)
def bucket(request):
    """``gs://a-bucket`` and ``s3://a-bucket``, for this process and those it starts."""
    with emulators.STORES[request.param]() as environment, pytest.MonkeyPatch.context() as patch:
        for name, value in environment.items():
            patch.setenv(name, value)
        fsspec.config.conf.clear()
        for kind in ("gs", "s3"):
            fsspec.get_filesystem_class(kind).clear_instance_cache()
        yield f"{request.param}://{emulators.BUCKET}"


def names(url: str) -> list[str]:
    """All objects below a folder of a bucket."""
    remote = buckets.connect(url)
    return sorted(name.removeprefix(f"{remote.root}/") for name in remote.filesystem.find(remote.root))


def copy(url: str, to: Path) -> Path:
    buckets.pull(buckets.connect(url), to, skip=())
    return to


def test_what_is_pushed_is_there_on_another_machine(bucket):
    url, binary = f"{bucket}/pushed/run", bytes(range(256)) * 40 + b"\r\n\n\r\r\n"
    here = Folder(url)
    assert str(here) == url and here.path.name == "run" and list(here.path.iterdir()) == []
    (here.path / "tokenizer").mkdir()
    (here.path / "tokenizer" / "a.model").write_bytes(binary)
    (here.path / "metrics.jsonl").write_text("one\n")
    here.push(0)
    there = Folder(url)
    assert there.path != here.path and (there.path / "tokenizer" / "a.model").read_bytes() == binary
    with (here.path / "metrics.jsonl").open("a") as file:  # what an object store cannot do
        file.write("two\n")
    here.push(0)
    assert (Folder(url).path / "metrics.jsonl").read_text() == "one\ntwo\n"


def test_each_object_has_one_writer(bucket):
    url = f"{bucket}/writers/run"
    first = Folder(url)
    for name in ("run.json", "samples.0.jsonl", "samples.1.jsonl"):
        (first.path / name).write_text("old")
    first.push(0)
    first, second = Folder(url), Folder(url)
    for folder, text in ((first, "first"), (second, "second")):
        (folder.path / "run.json").write_text(text)
        (folder.path / f"samples.{0 if folder is first else 1}.jsonl").write_text(text)
    first.push(0)
    second.push(1)
    found = copy(url, first.path.parent / "copy")
    assert (found / "run.json").read_text() == "first"
    assert (found / "samples.0.jsonl").read_text() == "first" and (found / "samples.1.jsonl").read_text() == "second"


def test_a_local_folder_is_itself(tmp_path):
    folder = Folder(str(tmp_path / "run"))
    assert folder.path == tmp_path / "run" and str(folder) == str(tmp_path / "run") and not folder.path.exists()
    folder.push(0)
    assert not folder.path.exists()


def test_a_bucket_that_is_not_there_is_one_line(bucket):
    scheme = bucket.partition(":")[0]
    with pytest.raises(UserError, match=f"^{scheme}://no-such-bucket: no such bucket; `.* creates it"):
        Folder(f"{scheme}://no-such-bucket/run")
    with pytest.raises(UserError, match="name a folder in the bucket"):
        Folder(bucket)
    with pytest.raises(UserError, match=f"^{bucket}/nothing: empty or missing"):
        clip_jax.load(f"{bucket}/nothing")


def test_no_credentials_are_one_line(bucket, monkeypatch, tmp_path):
    for name in ("STORAGE_EMULATOR_HOST", "AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"):
        monkeypatch.delenv(name, raising=False)
    # As on a machine outside of any cloud: nobody to ask, nothing at home.
    monkeypatch.setenv("NO_GCE_CHECK", "true")
    monkeypatch.setenv("AWS_EC2_METADATA_DISABLED", "true")
    monkeypatch.setenv("HOME", str(tmp_path))
    fsspec.get_filesystem_class("s3").clear_instance_cache()
    with pytest.raises(UserError, match=f"^{bucket}: no credentials on this machine; `.*`") as caught:
        Folder(f"{bucket}/run")
    assert "\n" not in str(caught.value)
    fsspec.get_filesystem_class("s3").clear_instance_cache()


@pytest.mark.parametrize("bucket", ["gs"], indirect=True)
def test_credentials_that_may_not_are_one_line(bucket, monkeypatch):
    from gcp_storage_emulator import server

    folder = Folder(f"{bucket}/forbidden/run")
    (folder.path / "run.json").write_text("{}")

    def refuse(self, method):
        response = server.Response(self._request_handler)
        response.status = server.HTTPStatus.FORBIDDEN
        server.Request(self._request_handler, method).data  # noqa: B018  (read, or the client's writing breaks)
        response.json({"error": {"code": 403, "message": "no"}})
        response.close()

    monkeypatch.setattr(server.Router, "handle", refuse)
    with pytest.raises(UserError, match=r"may not write to the bucket"):
        folder.push(0)
    with pytest.raises(UserError, match=r"may not use it; they need the roles Storage Object User and"):
        Folder(f"{bucket}/forbidden/run")


def test_a_store_that_never_answers_is_given_up(monkeypatch):
    with socket.create_server(("127.0.0.1", 0)) as silent:
        monkeypatch.setenv("STORAGE_EMULATOR_HOST", f"http://127.0.0.1:{silent.getsockname()[1]}")
        monkeypatch.setattr(buckets, "DEADLINE_SECONDS", 0.5)
        with pytest.raises(UserError, match=r"^gs://a-bucket/run: no answer within"):
            Folder("gs://a-bucket/run")


@pytest.mark.parametrize(("scheme", "library"), [("gs", "gcsfs"), ("s3", "s3fs")])
def test_a_library_that_is_missing_is_named_with_its_extra(monkeypatch, scheme, library):
    monkeypatch.setitem(sys.modules, library, None)
    with pytest.raises(UserError, match=rf"\({library}\): pip install 'clip-jax-tpu\[{buckets.EXTRAS[scheme]}\]'"):
        Folder(f"{scheme}://a-bucket/run")


def test_a_fault_that_passes_is_waited_for_with_growing_pauses(monkeypatch):
    pauses, faults = [], [ConnectionError("reset"), OSError("503"), ValueError("busy")]

    def call():
        if faults:
            raise faults.pop(0)
        return "done"

    monkeypatch.setattr(time, "sleep", pauses.append)
    assert buckets._retried(call) == "done"
    assert pauses == list(buckets.PAUSES_SECONDS[:3]) == sorted(pauses)

    faults[:] = [FileNotFoundError("x")]
    with pytest.raises(FileNotFoundError):  # no pause mends that
        buckets._retried(call)
    faults[:] = [OSError("503")] * 9
    with pytest.raises(OSError, match="503"):
        buckets._retried(call)


@pytest.mark.parametrize("bucket", ["gs"], indirect=True)
def test_a_store_that_refuses_for_a_moment_is_tried_again(bucket, monkeypatch):
    from gcp_storage_emulator import server

    folder = Folder(f"{bucket}/busy/run")
    (folder.path / "run.json").write_text("{}")
    refused, handle = [], server.Router.handle

    def busy(self, method):
        if len(refused) == 2:
            return handle(self, method)
        refused.append(method)
        response = server.Response(self._request_handler)
        response.status = server.HTTPStatus.SERVICE_UNAVAILABLE
        server.Request(self._request_handler, method).data  # noqa: B018
        response.close()

    monkeypatch.setattr(server.Router, "handle", busy)
    folder.push(0)
    assert len(refused) == 2 and names(f"{bucket}/busy/run") == ["run.json"]


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """A local run that was never killed, with its recipe beside it."""
    folder = tmp_path_factory.mktemp("whole")
    done = runs.main(folder, f"--config={runs.write_recipe(folder)}", f"--workdir={folder / 'run'}", cached=True)
    assert done.returncode == 0, done.stderr
    return folder / "run"


def machine(whole: Path, folder: Path) -> dict[str, object]:
    """How to start a process on a machine that has nothing of the run: its own temporary and working folder."""
    folder.mkdir()
    return {"env": {**runs.environment(whole.parent), "TMPDIR": str(folder)}, "cwd": folder}


# A whole run takes half a minute: one kind of bucket for each fact; the tests above are for both.
@pytest.mark.exhaustive
@pytest.mark.parametrize("bucket", ["gs"], indirect=True)
def test_a_run_in_a_bucket_killed_and_resumed_elsewhere_equals_a_local_one(bucket, whole, tmp_path):
    url, recipe = f"{bucket}/killed/run", whole.parent / "recipe.py"
    first = subprocess.Popen(
        runs.command(f"--config={recipe}", f"--workdir={url}"),
        **machine(whole, tmp_path / "first"),
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    deadline = time.monotonic() + 240
    # While its second checkpoint is being written: the third step's is whole, the sixth's has begun.
    while not any(name.startswith("checkpoints/6/") for name in names(url)):
        assert first.poll() is None and time.monotonic() < deadline
        time.sleep(0.005)
    first.send_signal(signal.SIGKILL)
    first.wait()
    committed = "checkpoints/6/commit_success.txt" in names(url)
    assert checkpoints.latest_step(url) == (6 if committed else 3)

    resumed = subprocess.run(
        runs.command(f"--workdir={url}"),
        **machine(whole, tmp_path / "second"),
        capture_output=True,
        text=True,
        timeout=240,
    )
    assert resumed.returncode == 0, resumed.stdout + resumed.stderr
    assert f"report {url}/report.html" in " ".join(resumed.stdout.split())
    assert list((tmp_path / "second").glob("clip_jax_*")) == []  # nothing is left on the machine

    found = copy(url, tmp_path / "copy")
    assert runs.metrics(found) == runs.metrics(whole)
    assert sorted(int(p.name) for p in (found / "checkpoints").iterdir()) == [9, 12]
    assert (found / "tokenizer/sentencepiece.model").read_bytes() == (
        whole / "tokenizer/sentencepiece.model"
    ).read_bytes()
    assert (found / "report.html").read_text().count("data:image/") >= 10 and any((found / "tensorboard").iterdir())

    local, remote = clip_jax.load(whole), clip_jax.load(url)
    assert remote.step == 12
    np.testing.assert_array_equal(remote.encode_text(["picture 3"]), local.encode_text(["picture 3"]))
    image = np.full((40, 40, 3), 99, np.uint8)
    np.testing.assert_array_equal(remote.encode_image(image), local.encode_image(image))


@pytest.mark.slow
@pytest.mark.parametrize("bucket", ["s3"], indirect=True)
def test_two_processes_without_a_shared_disk_write_one_run(bucket, whole, tmp_path):
    url, port = f"{bucket}/two/run", portpicker.pick_unused_port()
    arguments = [f"--config={whole.parent / 'recipe.py'}", f"--workdir={url}", "--config.mesh.fsdp=2"]
    arguments += [f"--coordinator=127.0.0.1:{port}", "--num_processes=2"]
    both = [
        subprocess.Popen(
            runs.command(*arguments, f"--process_id={i}"),
            **machine(whole, tmp_path / f"machine {i}"),
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        for i in range(2)
    ]
    outputs = [process.communicate(timeout=240)[0] for process in both]
    assert [process.returncode for process in both] == [0, 0], outputs

    found = copy(url, tmp_path / "copy")
    assert {"samples.0.jsonl", "samples.1.jsonl"} <= {p.name for p in found.iterdir()}
    arrays = found / "checkpoints/12/model"
    assert all((arrays / f"ocdbt.process_{i}").is_dir() for i in range(2))  # each wrote its half
    for ours, theirs in zip(runs.metrics(found), runs.metrics(whole), strict=True):
        for name in ("train/loss", "eval/held_out/loss"):
            assert ours.get(name, 0) == pytest.approx(theirs.get(name, 0), rel=1e-4)
    text = ["picture number 3"]
    np.testing.assert_allclose(
        clip_jax.load(url).encode_text(text), clip_jax.load(whole).encode_text(text), rtol=1e-3, atol=1e-4
    )
