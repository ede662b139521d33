"""Where data and models are kept: a folder on a laptop, MinIO in a cluster, the same keys in both."""

from abc import abstractmethod
from pathlib import Path
from typing import TYPE_CHECKING

import dagster as dg
from pydantic import Field

from cifar_assets.contracts import BUCKETS, MODELS_BUCKET, PROCESSED_BUCKET, RAW_BUCKET
from cifar_assets.object_store import FolderStore, ObjectStore

if TYPE_CHECKING:
    from cifar_assets.object_store.s3 import S3Store


class ObjectStoreResource(dg.ConfigurableResource):
    """Gives the stores of the three data buckets, and what a child process or pod needs to open the same ones."""

    @abstractmethod
    def root(self) -> ObjectStore:
        """The store above the buckets. Opens no connection."""

    @abstractmethod
    def child_environment(self) -> dict[str, str]:
        """Environment variables with which `open_store` reaches this store's URIs from another process."""

    def ensure_buckets(self) -> None:
        """Create buckets that are missing, where the store has such a thing."""

    @property
    def raw(self) -> ObjectStore:
        return self.root().at(RAW_BUCKET)

    @property
    def processed(self) -> ObjectStore:
        return self.root().at(PROCESSED_BUCKET)

    @property
    def models(self) -> ObjectStore:
        return self.root().at(MODELS_BUCKET)


class LocalObjectStore(ObjectStoreResource):
    """A folder with one subfolder a bucket."""

    path: str = Field(
        default=".cifar/store", description="Folder that holds the buckets; relative to the working folder."
    )

    def root(self) -> FolderStore:
        return FolderStore(Path(self.path))

    def child_environment(self) -> dict[str, str]:
        return {}


class MinioObjectStore(ObjectStoreResource):
    """MinIO, or any store that speaks S3."""

    endpoint_url: str = Field(description="Scheme, host and port, such as http://minio.cifar.svc:9000; no path.")
    access_key: str = Field(description="Access key; bind it with EnvVar.")
    secret_key: str = Field(description="Secret key; bind it with EnvVar.")
    region: str = Field(default="us-east-1", description="Region the buckets are in; MinIO takes any.")

    def root(self) -> "S3Store":
        from cifar_assets.object_store.s3 import S3Store

        return S3Store.connect(
            endpoint_url=self.endpoint_url, access_key=self.access_key, secret_key=self.secret_key, region=self.region
        )

    def child_environment(self) -> dict[str, str]:
        return {
            "AWS_ENDPOINT_URL": self.endpoint_url,
            "AWS_ACCESS_KEY_ID": self.access_key,
            "AWS_SECRET_ACCESS_KEY": self.secret_key,
            "AWS_REGION": self.region,
        }

    def ensure_buckets(self) -> None:
        self.root().ensure_buckets(BUCKETS)
