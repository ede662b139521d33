"""The store for data and models: a folder on a laptop, MinIO in a cluster, with the same keys."""

from abc import abstractmethod
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING

import dagster as dg
from pydantic import Field

from resources.object_store import (
    DATA_BUCKETS,
    MODELS_BUCKET,
    PROCESSED_BUCKET,
    RAW_BUCKET,
    TRAFFIC_BUCKET,
    FolderStore,
    ObjectStore,
)

if TYPE_CHECKING:
    from resources.object_store.s3 import S3Store


class ObjectStoreResource(dg.ConfigurableResource):
    """Provides the stores of the data buckets, and the environment for a child process or pod to open them."""

    folder: str = Field(default="", description="Folder in each bucket that the stores are limited to.")

    @abstractmethod
    def root(self) -> ObjectStore:
        """The store that contains the buckets. Opens no connection."""

    @abstractmethod
    def child_environment(self) -> dict[str, str]:
        """Environment variables with which `open_store` reaches this store's URIs from another process."""

    def ensure_buckets(self) -> None:
        """Create missing buckets, if the store has buckets."""

    @property
    def raw(self) -> ObjectStore:
        return self._store(RAW_BUCKET)

    @property
    def processed(self) -> ObjectStore:
        return self._store(PROCESSED_BUCKET)

    @property
    def models(self) -> ObjectStore:
        return self._store(MODELS_BUCKET)

    @property
    def traffic(self) -> ObjectStore:
        return self._store(TRAFFIC_BUCKET)

    def _store(self, bucket: str) -> ObjectStore:
        store = self.root().bucket(bucket)
        return store.at(self.folder) if self.folder else store


class LocalObjectStore(ObjectStoreResource):
    """A folder with one subfolder per bucket."""

    path: str = Field(
        default=".cifar/store", description="Folder that contains the buckets; relative to the working directory."
    )

    def root(self) -> FolderStore:
        return FolderStore(Path(self.path))

    def child_environment(self) -> dict[str, str]:
        return {}


class MinioObjectStore(ObjectStoreResource):
    """MinIO, or any S3-compatible store."""

    endpoint_url: str = Field(
        default="", description="Scheme, host and port, such as http://minio.cifar.svc:9000; no path."
    )
    access_key: str = Field(default="", description="Access key; bind it with EnvVar.")
    secret_key: str = Field(default="", description="Secret key; bind it with EnvVar.")
    session_token: str = Field(default="", description="Token of temporary credentials; bind it with EnvVar.")
    region: str = Field(default="", description="Region for signing requests; by default the endpoint's.")
    addressing: str = Field(
        default="auto",
        description="How URLs contain the bucket: path, virtual (in the host name) or auto (as AWS requires).",
    )
    bucket_prefix: str = Field(
        default="", description="Prefix of all bucket names; bucket names are globally unique in S3."
    )

    def root(self) -> "S3Store":
        from resources.object_store.s3 import S3Store
        from resources.object_store.s3_settings import VARIABLES, S3Connection

        return S3Store(S3Connection(**{key: getattr(self, key) for key in VARIABLES}))

    def child_environment(self) -> dict[str, str]:
        from resources.object_store.s3_settings import VARIABLES, main_variable

        # addresses name their bucket with its prefix
        keys = [key for key in VARIABLES if key != "bucket_prefix" and getattr(self, key)]
        return {main_variable(key): getattr(self, key) for key in keys}

    def ensure_buckets(self) -> None:
        self.root().ensure_buckets(self.bucket_prefix + name for name in DATA_BUCKETS)


def object_store_from_environment(environment: Mapping[str, str], folder: str = "") -> MinioObjectStore:
    """The store that the AWS_... variables describe; opens no connection."""
    from resources.object_store.s3_settings import variables_set

    variables = {key: dg.EnvVar(name) for key, name in variables_set(environment).items()}
    return MinioObjectStore(folder=folder, **variables)
