"""Files behind ``https://``, ``gs://`` and ``s3://``, read by range through fsspec.

Every call is retried, with growing pauses, if a server is slow, throttles, truncates a body or sends another length
than requested; then the run stops. Data that a server does not deliver is never replaced by other data.
"""

import collections
import functools
import threading
import time
from collections.abc import Callable
from concurrent.futures import Future
from typing import Any

from clip_jax.errors import UserError
from clip_jax.storage.buckets import EXTRAS

PAUSES_SECONDS = (0.5, 1.0, 2.0, 4.0, 8.0, 16.0, 32.0)
"""Pauses between attempts: a minute in total."""
SILENCE_SECONDS = 30.0
"""Time without a byte from a web server after which an attempt has failed."""
RETRIED_STATUSES = (408, 409, 423, 425, 429)
"""Answers of web servers about a request and not about a file: timeouts, locks and throttling."""
VERSIONS = ("generation", "ETag", "etag", "LastModified", "Last-Modified", "mtime")
"""Properties that show that a file changed, the best first; servers differ in which they report."""
SCHEMES = EXTRAS | {"http": "http", "https": "http"}
"""By scheme, the extra of setup.py that installs its libraries."""
CHUNK_BYTES = 8 * 1024 * 1024
CHUNKS = 64


class RefusedError(UserError):
    """A server's final answer: the file is not there, or may not be read. ``reason`` says which."""

    def __init__(self, where: str, reason: str, detail: str = ""):
        super().__init__(f"{where}: {reason}{f' ({detail})' if detail else ''}")
        self.reason = reason


def is_remote(where: str) -> bool:
    return "://" in where


def is_supported(where: str) -> bool:
    return where.partition("://")[0] in SCHEMES


def stat(where: str) -> tuple[int, str]:
    """(size in bytes, version). Raises UserError."""

    def find() -> tuple[int, str]:
        found = _filesystem(where).info(where)
        if found.get("size") is None:
            raise UserError(f"{where}: the server does not say its size, and so cannot serve parts of it")
        return int(found["size"]), next((str(found[key]) for key in VERSIONS if found.get(key)), "")

    return _retried(where, find)


def read(where: str, offset: int, size: int, version: str = "") -> bytes:
    """Exactly ``size`` bytes, of the ``version`` that ``stat`` reported. Raises UserError, also for another version.

    Stores are asked for the version; of web servers, those without ETags and times cannot be.
    """

    def get() -> bytes:
        data = _range(where, offset, offset + size, version)
        if len(data) != size:
            raise OSError(f"{len(data)} bytes instead of {size} at {offset}")
        return data

    return _retried(where, get)


def _range(where: str, start: int, end: int, version: str) -> bytes:
    files, scheme, condition = _filesystem(where), where.partition("://")[0], {}
    if scheme == "s3" and version.startswith('"'):
        import fsspec.asyn

        return fsspec.asyn.sync(files.loop, _s3_range, files, where, start, end, version)
    if scheme == "gs" and version.isdigit():
        condition = {"generation": version}
    elif version.startswith('"'):  # weak ETags do not match
        condition = {"headers": {"If-Match": version}}
    elif version.endswith(" GMT"):
        condition = {"headers": {"If-Unmodified-Since": version}}
    return files.cat_file(where, start=start, end=end, **condition)


async def _s3_range(files: Any, where: str, start: int, end: int, etag: str) -> bytes:
    bucket, key, _ = files.split_path(where)
    wanted = {"Bucket": bucket, "Key": key, "Range": f"bytes={start}-{end - 1}", "IfMatch": etag}
    response = await files._call_s3("get_object", **wanted)
    try:
        return await response["Body"].read()
    finally:
        response["Body"].close()


def fetch(where: str) -> bytes:
    """The whole of a small file, whose size need not be known. Raises UserError."""
    return _retried(where, lambda: _filesystem(where).cat_file(where))


def children(folder: str) -> tuple[list[str], list[str]]:
    """The names of the folders and of the files in a folder of a bucket, sorted; none where there is no such folder."""
    scheme = folder.partition("://")[0]
    if scheme not in EXTRAS:
        raise UserError(f"{folder}: a web server does not list its files; use {' or '.join(EXTRAS)}://")

    def find() -> list[dict[str, Any]]:
        try:
            return _filesystem(folder).ls(folder, detail=True)
        except FileNotFoundError:
            return []

    prefix = folder.partition("://")[2].rstrip("/")  # web consoles create an empty object for a folder
    entries = [(entry["name"].rstrip("/"), entry["type"]) for entry in _retried(folder, find)]
    found = [(path.rpartition("/")[2], kind) for path, kind in entries if path != prefix]
    folders, files = (sorted(name for name, kind in found if kind == wanted) for wanted in ("directory", "file"))
    return folders, files


def glob(pattern: str) -> list[str]:
    """The files of a pattern, sorted, in a bucket; web servers have no listings."""
    scheme = pattern.partition("://")[0]
    if scheme not in EXTRAS:
        raise UserError(f"{pattern}: a web server does not list its files; name them, as in {{00000..00099}}.tar")
    return [f"{scheme}://{name}" for name in sorted(_retried(pattern, lambda: _filesystem(pattern).glob(pattern)))]


class Chunks:
    """Long reads for samples that are read together: recent chunks are cached, and read once at a time."""

    def __init__(self) -> None:
        self._chunks: collections.OrderedDict[tuple[str, str, int], Future] = collections.OrderedDict()
        self._lock = threading.Lock()

    def read(self, where: str, offset: int, size: int, end: int, version: str = "") -> bytes:
        """The bytes at ``offset`` of a version of a file, which has ``end`` bytes."""
        first, last = offset // CHUNK_BYTES, (offset + size - 1) // CHUNK_BYTES
        data = b"".join(self._chunk(where, version, number, end) for number in range(first, last + 1))
        return data[offset - first * CHUNK_BYTES :][:size]

    def _chunk(self, where: str, version: str, number: int, end: int) -> bytes:
        key = where, version, number
        with self._lock:
            found = self._chunks.get(key)
            is_new = found is None
            if is_new:
                found = self._chunks[key] = Future()
            self._chunks.move_to_end(key)
            while len(self._chunks) > CHUNKS:
                self._chunks.popitem(last=False)
        if is_new:
            start = number * CHUNK_BYTES
            try:
                found.set_result(read(where, start, min(CHUNK_BYTES, end - start), version))
            except BaseException as error:
                with self._lock:
                    self._chunks.pop(key, None)
                found.set_exception(error)
        return found.result()


def _filesystem(where: str) -> Any:
    return _of_scheme(where.partition("://")[0])


@functools.cache
def _of_scheme(scheme: str) -> Any:
    if scheme not in SCHEMES:
        raise UserError(f"{scheme}://: files are read from {', '.join(SCHEMES)}")
    try:
        import fsspec

        options = {}
        if scheme in ("http", "https"):
            import aiohttp

            timeout = aiohttp.ClientTimeout(total=None, sock_connect=SILENCE_SECONDS, sock_read=SILENCE_SECONDS)
            options["client_kwargs"] = {"timeout": timeout}
        return fsspec.filesystem(scheme, use_listings_cache=False, **options)
    except ImportError as error:
        raise UserError(
            f"{scheme}:// needs libraries that are not installed ({error.name}): "
            f"pip install 'clip-jax-tpu[{SCHEMES[scheme]}]'"
        ) from error


def _retried(where: str, call: Callable[[], Any]) -> Any:
    for pause in (*PAUSES_SECONDS, None):
        try:
            return call()
        except UserError:
            raise
        except Exception as error:  # aiohttp, gcsfs and botocore have no common ancestor below this one
            if reason := _refusal(error):
                raise RefusedError(where, *reason) from error
            if pause is None:
                cause = _meant(error)
                what = str(cause) or type(cause).__name__
                raise UserError(f"{where}: cannot be read after {len(PAUSES_SECONDS) + 1} attempts ({what})") from error
            time.sleep(pause)
    raise AssertionError("unreachable")


def _refusal(error: Exception) -> tuple[str, ...]:
    """The reason and its detail if another attempt cannot help; else empty."""
    error = _meant(error)
    status = getattr(error, "status", None)  # of aiohttp's answers; other stores' errors have none
    if status == 412 or "PreconditionFailed" in repr(error) or "PreconditionFailed" in repr(error.__cause__):
        return ("changed while it was read; start again",)
    if isinstance(error, FileNotFoundError) or status in (404, 410):
        return ("no such file on the server",)
    if isinstance(error, PermissionError) or status in (401, 403):
        return "these credentials may not read it", str(status or error)
    if isinstance(status, int) and 400 <= status < 500 and status not in RETRIED_STATUSES:
        return (f"the server refuses it with status {status}",)
    return ("not a URL",) if type(error).__name__ == "InvalidURL" else ()


def _meant(error: Exception) -> Exception:
    """fsspec takes any failure of a web server to describe a file for a missing file; what it was is the cause."""
    is_of_web = type(error.__cause__).__module__.startswith("aiohttp") or isinstance(error.__cause__, TimeoutError)
    return error.__cause__ if isinstance(error, FileNotFoundError) and is_of_web else error
