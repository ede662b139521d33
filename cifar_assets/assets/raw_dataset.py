"""Raw images as one immutable version: a manifest of objects and digests."""

import os

import dagster as dg
from pydantic import Field

from cifar_assets.assets import metadata
from cifar_assets.assets.faults import retrying_infrastructure_faults
from cifar_assets.assets.keys import OWNERS, PREFIX
from cifar_assets.dataset.versions.raw import build_raw_version
from resources.errors import ConfigError
from resources.object_store.resource import ObjectStoreResource
from resources.redaction import has_credentials, redacted

SOURCE_VARIABLE = "CIFAR10_SOURCE"


class RawDatasetConfig(dg.Config):
    """What the raw dataset is made from."""

    source: str | None = Field(
        default=None,
        description="'download', 'synthetic', or a path, file:// or s3:// URI of an official archive, of Parquet files "
        f"or of class folders. Without it {SOURCE_VARIABLE} of the environment decides, and without that 'download'.",
    )
    resize: bool = Field(default=True, description="Scale images of another size to 32x32; otherwise they are refused.")
    version: str | None = Field(
        default=None,
        description="Digest of an earlier raw version to make current again, instead of building one from the source.",
    )

    def resolved_source(self) -> str:
        if self.source and has_credentials(self.source):
            raise ConfigError(
                f"source is {redacted(self.source)}: Dagster shows the config of runs. Set {SOURCE_VARIABLE} instead, "
                "in a cluster from a Secret."
            )
        return self.source or os.environ.get(SOURCE_VARIABLE) or "download"


@dg.asset(
    key_prefix=PREFIX,
    group_name="data",
    kinds={"s3", "parquet"},
    owners=OWNERS,
    tags={"layer": "raw"},
)
def raw_dataset(
    context: dg.AssetExecutionContext, config: RawDatasetConfig, object_store: ObjectStoreResource
) -> dg.MaterializeResult:
    """Raw images as imported from the source, joined with everything valid that landed.

    The data version is the sha256 of a manifest that lists each object with its own sha256. Landed objects that cannot
    be used are in the bucket under rejected/ with the reason beside them.
    """
    with retrying_infrastructure_faults():
        object_store.ensure_buckets()
        version = build_raw_version(
            object_store.raw, config.resolved_source(), digest=config.version, resize=config.resize
        )
        return dg.MaterializeResult(
            data_version=dg.DataVersion(version.digest), metadata=metadata.of_raw(object_store.raw, version)
        )
