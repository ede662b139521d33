"""Objects by key, in a folder or in S3, behind one interface."""

from pathlib import Path
from urllib.parse import unquote, urlsplit

from resources.errors import ConfigError
from resources.object_store.base import ObjectInfo, ObjectStore
from resources.object_store.folder import FolderStore
from resources.redaction import redacted

__all__ = ["FolderStore", "ObjectInfo", "ObjectStore", "open_store"]

RAW_BUCKET = "raw-data"
PROCESSED_BUCKET = "processed-data"
MODELS_BUCKET = "models"
DATA_BUCKETS = (RAW_BUCKET, PROCESSED_BUCKET, MODELS_BUCKET)
MLFLOW_BUCKET = "mlflow"
"""Used by the tracking server alone."""
LOGS_BUCKET = "dagster-logs"
"""Where Dagster in the cluster keeps what steps print."""


def open_store(uri: str) -> ObjectStore:
    """The store rooted at a `file:///folder` or `s3://bucket/prefix` URI.

    S3 takes its settings from the AWS_... variables of docs/kubernetes.md. No connection is opened. Raises ConfigError
    for another scheme.
    """
    try:
        parts = urlsplit(uri)
    except ValueError as error:
        raise ConfigError(f"Cannot open {redacted(uri)!r}: {error}.") from error
    if parts.scheme == "file":
        return FolderStore(Path(unquote(parts.path)))
    if parts.scheme == "s3" and "@" in parts.netloc:
        raise ConfigError(
            f"Cannot open {redacted(uri)}: an s3:// address holds no credentials. Set AWS_ACCESS_KEY_ID and "
            "AWS_SECRET_ACCESS_KEY."
        )
    if parts.scheme == "s3":
        from resources.object_store.s3 import S3Store

        return S3Store.from_environment(f"{parts.netloc}{parts.path}")
    raise ConfigError(f"Cannot open {redacted(uri)!r}: expected a file:///... or s3://bucket/... URI.")
