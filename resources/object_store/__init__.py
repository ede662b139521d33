"""Objects by key, in a folder or in S3, behind one interface."""

import os
from pathlib import Path
from urllib.parse import unquote

from resources.errors import ConfigError
from resources.object_store.base import ObjectInfo, ObjectStore
from resources.object_store.folder import FolderStore

__all__ = ["FolderStore", "ObjectInfo", "ObjectStore", "locate", "open_store"]

RAW_BUCKET = "raw-data"
PROCESSED_BUCKET = "processed-data"
MODELS_BUCKET = "models"
DATA_BUCKETS = (RAW_BUCKET, PROCESSED_BUCKET, MODELS_BUCKET)
TRAFFIC_BUCKET = "served-traffic"
"""What the model server records: see docs/monitoring.md."""
MLFLOW_BUCKET = "mlflow"
"""Used only by the tracking server."""
LOGS_BUCKET = "dagster-logs"
"""Compute logs of Dagster in the cluster."""


def open_store(uri: str) -> ObjectStore:
    """The store rooted at a `file:///folder` or `s3://bucket/prefix` URI. Opens no connection.

    S3 settings are read from the AWS_... variables in docs/kubernetes.md. ConfigError for any other address.
    """
    scheme, _, path = uri.partition("://")
    if scheme == "file":
        return FolderStore(Path(unquote(path)))
    if scheme == "s3" and "@" not in path.partition("/")[0]:
        from resources.object_store.s3 import S3Store

        return S3Store.from_environment(path)
    raise ConfigError(
        f"Cannot open {uri!r}: expected file:///folder or s3://bucket/prefix, without credentials in it. Set "
        "credentials in AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY."
    )


def locate(address: str) -> tuple[ObjectStore, str]:
    """The store for a path or an s3:// address, and the key in it, which is used unchanged."""
    if not address.startswith("s3://"):
        path = Path(os.path.abspath(os.path.expanduser(address)))
        return FolderStore(path.parent), path.name
    bucket, _, key = address.removeprefix("s3://").partition("/")
    return open_store(f"s3://{bucket}"), key.removesuffix("/")
