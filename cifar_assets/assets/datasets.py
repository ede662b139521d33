"""The two datasets: raw images as an immutable version, and training-ready tensors made from it."""

import dagster as dg
from pydantic import Field

from cifar_assets.assets import metadata
from cifar_assets.assets.binding import data_set_asset
from cifar_assets.assets.common import retrying_infrastructure_faults
from cifar_assets.assets.keys import PROCESSED_DATASET, RAW_DATASET, key_of
from cifar_assets.assets.record import materialized_digest, previous_digests
from cifar_assets.data_set import DataSet
from cifar_assets.dataset.versions.baseline_copies import write_baseline_copies
from cifar_assets.dataset.versions.processed import build_processed
from cifar_assets.dataset.versions.raw import build_raw_version
from cifar_assets.dataset.versions.splits import SplitConfig
from cifar_assets.dataset.versions.verdicts import judge_processed
from resources.errors import ConfigError
from resources.object_store.resource import ObjectStoreResource
from resources.redaction import has_credentials, redacted
from resources.verdict import objections


class RawDatasetConfig(dg.Config):
    """What the raw dataset is made from."""

    source: str | None = Field(
        default=None,
        description="'download', 'synthetic', or a path or s3:// URI of an official archive, of Parquet files "
        "or of class folders. Defaults to that of the data set: for cifar10 to CIFAR10_SOURCE, or 'download'.",
    )
    resize: bool = Field(
        default=True, description="Scale images of another size to that of the dataset; otherwise they are refused."
    )
    version: str | None = Field(
        default=None,
        description="Digest of an earlier raw version to make current again, instead of building one from the source.",
    )

    def resolved_source(self, data_set: DataSet) -> str:
        if self.source and has_credentials(self.source):
            raise ConfigError(
                f"source is {redacted(self.source)}: Dagster shows run config in its UI. Set CIFAR10_SOURCE or "
                "DATA_SETS instead, in a cluster from a Secret."
            )
        return self.source or data_set.source


@data_set_asset(group="data", kinds={"s3", "parquet"}, tags={"layer": "raw"})
def raw_dataset(
    data_set: DataSet, context: dg.AssetExecutionContext, config: RawDatasetConfig, object_store: ObjectStoreResource
) -> dg.MaterializeResult:
    """Raw images imported from the source, joined with all valid landed data.

    The data version is the sha256 of a manifest that lists each object with its own sha256. Landed objects that cannot
    be used are moved to rejected/ in the bucket, with the reason beside them.
    """
    with retrying_infrastructure_faults():
        object_store.ensure_buckets()
        version = build_raw_version(
            object_store.raw,
            config.resolved_source(data_set),
            data_set.request,
            digest=config.version,
            resize=config.resize,
        )
        return dg.MaterializeResult(
            data_version=dg.DataVersion(version.digest), metadata=metadata.of_raw(object_store.raw, version)
        )


class ProcessedDatasetConfig(dg.Config):
    """How the raw images are split and stored."""

    raw_digest: str | None = Field(
        default=None,
        description="Digest of the raw version to process; by default the one that raw_dataset materialized.",
    )
    validation_fraction: float = Field(
        default=0.1,
        gt=0,
        lt=1,
        description="Fraction of the training images held out for validation, chosen by image digest.",
    )
    test_fraction: float = Field(
        default=0.1, gt=0, lt=1, description="Fraction held out for testing if the source has no test split."
    )
    max_shard_rows: int = Field(default=16_384, ge=1, description="Images of 3 kB per shard; fewer larger ones.")
    write_baseline_copies: bool = Field(
        default=True,
        description="Also write cifar10-dataset.tar.gz and cifar10-processed.tar.gz, unless a check blocks the "
        "version, for readers of "
        "the pipeline that this project replaces. Takes a few seconds, and memory for a third of the images: turn it "
        "off for large data.",
    )


@data_set_asset(group="data", kinds={"s3", "numpy"}, tags={"layer": "processed"}, deps=[RAW_DATASET])
def processed_dataset(
    data_set: DataSet,
    context: dg.AssetExecutionContext,
    config: ProcessedDatasetConfig,
    object_store: ObjectStoreResource,
) -> dg.MaterializeResult:
    """Decoded images as uint8 tensors in safetensors shards, split into train, validation and test.

    The split follows each image's own digest, so adding data does not move existing images. Channel statistics are
    computed on the train split only.
    """
    with retrying_infrastructure_faults():
        raw, processed = object_store.raw, object_store.processed
        raw_digest = config.raw_digest or materialized_digest(context, key_of(data_set, RAW_DATASET))
        split = SplitConfig(**config.model_dump(exclude={"raw_digest", "write_baseline_copies"}))
        version = build_processed(raw, processed, raw_digest, split)
        if reasons := objections(judge_processed(raw, processed, version.digest)):
            context.log.warning(f"The copies for the old pipeline are left unchanged: {' '.join(reasons)}")
        elif config.write_baseline_copies and data_set.is_default:
            write_baseline_copies(raw, processed, version.digest)
        earlier = (
            each
            for each in previous_digests(context.instance, key_of(data_set, PROCESSED_DATASET))
            if each != version.digest
        )
        return dg.MaterializeResult(
            data_version=dg.DataVersion(version.digest),
            metadata=metadata.of_processed(processed, version, next(earlier, None)),
        )
