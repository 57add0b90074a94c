"""Folders in a bucket, ``gs://`` or ``s3://``: checked at the start, downloaded, and uploaded again.

Object stores cannot append, and every call takes tens of milliseconds: small files are read and written on this
machine and uploaded whole. Checkpoints, which are large, do not pass through here: all processes write them directly
into the bucket (``checkpoints.py``).
"""

import logging
import os
import threading
import time
from collections.abc import Callable, Collection
from concurrent.futures import Future
from pathlib import Path, PurePosixPath
from typing import Any, NamedTuple

from clip_jax.errors import UserError

EXTRAS = {"gs": "gcs", "s3": "s3"}
"""By scheme, the extra of setup.py that installs its libraries."""

DEADLINE_SECONDS = 60.0
"""For the first answer: the libraries can hang without credentials, or where the bucket does not exist."""

PAUSES_SECONDS = (1.0, 5.0, 25.0, 125.0)
"""Between attempts, on top of the libraries' own (gcsfs: six within half a minute). A longer outage ends the run, which
can be resumed from its last checkpoint."""


class Remote(NamedTuple):
    """A folder in a bucket that was reached."""

    url: str
    filesystem: Any
    """fsspec's: gcsfs or s3fs."""
    root: str
    """The folder's path in the file system, bucket first."""


def is_bucket(where: str | Path) -> bool:
    return str(where).startswith(tuple(f"{scheme}://" for scheme in EXTRAS))


def connect(url: str) -> Remote:
    """The folder, once its bucket was reached; UserError, within a minute, where that fails."""
    scheme, _, rest = url.partition("://")
    bucket, _, folder = rest.strip("/").partition("/")
    if not folder:
        raise UserError(f"{url}: name a folder in the bucket, as in {scheme}://{bucket or 'BUCKET'}/runs/NAME")
    # Where TensorFlow is installed, etils (Orbax's paths) would use it instead of fsspec, and it does not support S3.
    os.environ.setdefault("EPATH_USE_TF", "false")
    for library in ("gcsfs", "s3fs"):  # they log a traceback besides raising
        logging.getLogger(library).setLevel(logging.CRITICAL)
    try:
        filesystem = _with_timeout(DEADLINE_SECONDS, lambda: _REACH[scheme](bucket))
    except ImportError as error:
        needs = f"pip install 'clip-jax-tpu[{EXTRAS[scheme]}]'"
        raise UserError(f"{url}: {scheme}:// needs libraries that are not installed ({error.name}): {needs}") from error
    except TimeoutError as error:
        raise UserError(
            f"{url}: no answer within {DEADLINE_SECONDS:.0f} s; check the network and the name of the bucket"
        ) from error
    return Remote(url, filesystem, f"{bucket}/{folder}")


def pull(remote: Remote, to: Path, *, skip: Collection[str]) -> None:
    """Downloads the folder's files to ``to``, except the names in ``skip``; a missing folder counts as empty."""
    to.mkdir(parents=True, exist_ok=True)
    try:
        entries = _retried(remote.filesystem.ls, remote.root, detail=True)
    except FileNotFoundError:
        return
    for entry in entries:
        if PurePosixPath(entry["name"]).name in skip:
            continue
        is_folder = entry["type"] == "directory"
        for file in _retried(remote.filesystem.find, entry["name"]) if is_folder else [entry["name"]]:
            parts = PurePosixPath(file).relative_to(remote.root).parts
            if parts and ".." not in parts:  # no parts: web consoles create an empty object for a folder
                target = to.joinpath(*parts)
                target.parent.mkdir(parents=True, exist_ok=True)
                _retried(remote.filesystem.get_file, file, str(target))


def push(remote: Remote, files: Collection[Path], under: Path) -> None:
    """Uploads files, under their names relative to the folder ``under``. UserError if that is forbidden."""
    for file in files:
        try:
            name = file.relative_to(under).as_posix()
            _retried(remote.filesystem.put_file, str(file), f"{remote.root}/{name}")
        except PermissionError as error:
            raise UserError(f"{remote.url}: these credentials may not write to the bucket ({error})") from error


def _file_system(scheme: str) -> Any:
    """fsspec's, for the whole process: without cached listings, which miss what other processes wrote."""
    import fsspec

    fsspec.config.conf.setdefault(scheme, {}).setdefault("use_listings_cache", False)
    return fsspec.filesystem(scheme)


def _reach_gcs(bucket: str) -> Any:
    import gcsfs  # noqa: F401  (fsspec imports it late, with a poorer message where it is missing)
    from google.api_core.exceptions import Forbidden, NotFound, Unauthorized
    from google.auth.exceptions import GoogleAuthError
    from google.cloud import storage

    try:
        # Orbax makes the same request; and unlike gcsfs it fails without credentials.
        storage.Client().get_bucket(bucket)
    except NotFound as error:
        make = f"gcloud storage buckets create gs://{bucket} --location=REGION"
        raise UserError(f"gs://{bucket}: no such bucket; `{make}` creates it, in the region of the TPU") from error
    except (Forbidden, Unauthorized) as error:
        roles = "Storage Object User and Storage Legacy Bucket Reader"
        raise UserError(f"gs://{bucket}: these credentials may not use it; they need the roles {roles}") from error
    except GoogleAuthError as error:
        raise UserError(
            f"gs://{bucket}: no credentials on this machine; `gcloud auth application-default login`, or give the "
            f"machine a service account ({str(error).splitlines()[0]})"
        ) from error
    return _file_system("gs")


def _reach_s3(bucket: str) -> Any:
    import s3fs  # noqa: F401
    from botocore.exceptions import NoCredentialsError

    filesystem = _file_system("s3")
    try:
        filesystem.call_s3("head_bucket", Bucket=bucket)
    except FileNotFoundError as error:
        raise UserError(f"s3://{bucket}: no such bucket; `aws s3 mb s3://{bucket}` creates it") from error
    except PermissionError as error:
        raise UserError(f"s3://{bucket}: these credentials may not use it") from error
    except NoCredentialsError as error:
        raise UserError(
            f"s3://{bucket}: no credentials on this machine; `aws configure`, AWS_ACCESS_KEY_ID and "
            "AWS_SECRET_ACCESS_KEY, or give the machine a role"
        ) from error
    return filesystem


_REACH: dict[str, Callable[[str], Any]] = {"gs": _reach_gcs, "s3": _reach_s3}


def _with_timeout(seconds: float, call: Callable[[], Any]) -> Any:
    """What ``call`` returns or raises; TimeoutError when it takes longer; its daemon thread is then abandoned."""
    outcome: Future = Future()

    def work() -> None:
        try:
            outcome.set_result(call())
        except BaseException as error:
            outcome.set_exception(error)

    threading.Thread(target=work, daemon=True).start()
    return outcome.result(timeout=seconds)


def _retried(call: Callable[..., Any], *arguments: Any, **options: Any) -> Any:
    """Calls until there is no error, with growing pauses; errors that a retry cannot solve are raised at once."""
    for pause in PAUSES_SECONDS:
        try:
            return call(*arguments, **options)
        except (FileNotFoundError, PermissionError):
            raise
        except Exception as error:  # gcsfs, aiohttp and botocore have no common ancestor below this one
            if "Forbidden" in str(error):  # gcsfs raises a bare OSError
                raise PermissionError(str(error)) from error
            logging.getLogger("clip_jax").warning("%s; again in %.0f s", error, pause)
            time.sleep(pause)
    return call(*arguments, **options)
