"""Object stores on this machine: Google's storage API (gcp-storage-emulator) and Amazon's (moto), each with a bucket.

The libraries under test do not know: they get the address by the environment variables that they have for that.
"""

import contextlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import fsspec
import portpicker
import pytest

from clip_jax.storage import remote

BUCKET = "a-bucket"


@contextlib.contextmanager
def gcs() -> Iterator[dict[str, str]]:
    """The environment in which ``gs://a-bucket`` is there."""
    from gcp_storage_emulator.server import create_server

    port = portpicker.pick_unused_port()
    address = f"http://127.0.0.1:{port}"
    with create_server("127.0.0.1", port, in_memory=True, default_bucket=BUCKET):
        yield {
            "STORAGE_EMULATOR_HOST": address,  # google-cloud-storage and gcsfs
            "TENSORSTORE_GCS_HTTP_URL": address,  # TensorStore, so Orbax's arrays
            "GCSFS_EXPERIMENTAL_ZB_HNS_SUPPORT": "false",  # asks for the bucket's kind by gRPC, which is not emulated
        }


@contextlib.contextmanager
def s3() -> Iterator[dict[str, str]]:
    """The environment in which ``s3://a-bucket`` is there."""
    import boto3
    from moto.server import ThreadedMotoServer

    port = portpicker.pick_unused_port()
    server = ThreadedMotoServer("127.0.0.1", port, verbose=False)
    server.start()
    environment = {
        "AWS_ENDPOINT_URL": f"http://127.0.0.1:{port}",
        "AWS_DEFAULT_REGION": "us-east-1",
        "AWS_ACCESS_KEY_ID": "nobody",
        "AWS_SECRET_ACCESS_KEY": "nothing",
    }
    client = boto3.client(
        "s3",
        endpoint_url=environment["AWS_ENDPOINT_URL"],
        region_name="us-east-1",
        aws_access_key_id="nobody",
        aws_secret_access_key="nothing",
    )
    client.create_bucket(Bucket=BUCKET)
    yield environment
    server.stop()


STORES = {"gs": gcs, "s3": s3}


@contextlib.contextmanager
def filled(scheme: str, folder: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[tuple[Any, str]]:
    """fsspec's file system of a bucket, and the URL of a copy of ``folder`` in it."""
    remote._of_scheme.cache_clear()
    fsspec.get_filesystem_class(scheme).clear_instance_cache()  # that of another test has the address of its server
    with STORES[scheme]() as environment:
        for name, value in environment.items():
            monkeypatch.setenv(name, value)
        files, url = remote._of_scheme(scheme), f"{scheme}://{BUCKET}/{folder.name}"
        for path in sorted(path for path in folder.rglob("*") if path.is_file()):
            files.put_file(str(path), f"{url}/{path.relative_to(folder).as_posix()}")
        yield files, url
    remote._of_scheme.cache_clear()
