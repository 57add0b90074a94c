"""S3 for Orbax, which writes to Google's object store alone (0.12.8), though TensorStore beneath it has both.

``register`` patches four private names of Orbax, which still do the same for ``gs://`` and local folders. It is called
for ``s3://`` only, and ``tests/storage/test_buckets.py`` trains against an S3 server, so that another Orbax is noticed.
"""

import functools
import importlib.metadata
import os
from typing import Any

from clip_jax.errors import UserError


@functools.cache
def register() -> None:
    """From now on, in this process, Orbax accepts ``s3://`` wherever it accepts ``gs://``."""
    from orbax.checkpoint._src.path import gcs_utils
    from orbax.checkpoint._src.serialization import tensorstore_utils

    try:
        of_gcs, normalize = gcs_utils.get_kvstore_for_gcs, tensorstore_utils._normalize_path
        old = (gcs_utils._GCS_PATH_PREFIX, tensorstore_utils._use_gcs_driver)
    except AttributeError as error:
        version = importlib.metadata.version("orbax-checkpoint")
        raise UserError(
            f"s3://: not with orbax-checkpoint {version} ({error.name}); install 0.12.8, or use gs://"
        ) from error
    # No atomic rename: a checkpoint is complete once the file that commits it is written.
    gcs_utils._GCS_PATH_PREFIX = (*old[0], "s3://")
    gcs_utils.get_kvstore_for_gcs = lambda path: _kvstore(path) if path.startswith("s3://") else of_gcs(path)
    tensorstore_utils._use_gcs_driver = lambda path: path.startswith("s3://") or old[1](path)
    tensorstore_utils._normalize_path = lambda path: normalize(path).replace("s3:/", "s3://", 1)


def _kvstore(path: str) -> dict[str, Any]:
    """TensorStore's spec of a folder; https://google.github.io/tensorstore/kvstore/s3."""
    bucket, _, folder = path.removeprefix("s3://").partition("/")
    spec = {"driver": "s3", "bucket": bucket, "path": folder}
    # The variables of botocore and s3fs, for stores other than Amazon's. Without a region TensorStore asks the bucket.
    if endpoint := os.environ.get("AWS_ENDPOINT_URL_S3") or os.environ.get("AWS_ENDPOINT_URL"):
        spec["endpoint"] = endpoint
    if region := os.environ.get("AWS_REGION") or os.environ.get("AWS_DEFAULT_REGION"):
        spec["aws_region"] = region
    return spec
