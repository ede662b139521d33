"""The two datasets: raw images as one immutable version, and training-ready tensors made of it."""

import dagster as dg
from pydantic import Field

from cifar_assets.assets import metadata
from cifar_assets.assets.common import retrying_infrastructure_faults
from cifar_assets.assets.keys import OWNERS, PREFIX, PROCESSED_DATASET, RAW_DATASET
from cifar_assets.assets.record import materialized_digest, previous_digests
from cifar_assets.dataset.versions.baseline_copies import write_baseline_processed, write_baseline_raw
from cifar_assets.dataset.versions.processed import build_processed
from cifar_assets.dataset.versions.raw import build_raw_version
from cifar_assets.dataset.versions.splits import SplitConfig
from cifar_assets.dataset.versions.verdicts import judge_processed
from cifar_assets.settings import read_settings
from resources.errors import ConfigError
from resources.object_store.resource import ObjectStoreResource
from resources.redaction import has_credentials, redacted
from resources.verdict import objections


class RawDatasetConfig(dg.Config):
    """What the raw dataset is made from."""

    source: str | None = Field(
        default=None,
        description="'download', 'synthetic', or a path or s3:// URI of an official archive, of Parquet files "
        "or of class folders. By default CIFAR10_SOURCE of the environment, and without that 'download'.",
    )
    resize: bool = Field(default=True, description="Scale images of another size to 32x32; otherwise they are refused.")
    version: str | None = Field(
        default=None,
        description="Digest of an earlier raw version to make current again, instead of building one from the source.",
    )

    def resolved_source(self) -> str:
        if self.source and has_credentials(self.source):
            raise ConfigError(
                f"source is {redacted(self.source)}: Dagster shows the config of runs. Set CIFAR10_SOURCE instead, in "
                "a cluster from a Secret."
            )
        return self.source or read_settings().cifar10_source


@dg.asset(key_prefix=PREFIX, group_name="data", kinds={"s3", "parquet"}, owners=OWNERS, tags={"layer": "raw"})
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


class ProcessedDatasetConfig(dg.Config):
    """How the raw images are split and stored."""

    raw_digest: str | None = Field(
        default=None, description="Digest of the raw version to process; by default the one raw_dataset materialized."
    )
    validation_fraction: float = Field(
        default=0.1,
        gt=0,
        lt=1,
        description="Fraction of the training images, chosen by image digest, kept for validation.",
    )
    test_fraction: float = Field(
        default=0.1, gt=0, lt=1, description="Fraction kept for the test where the source has no test split of its own."
    )
    max_shard_rows: int = Field(default=16_384, ge=1, description="Images in one shard, 3 kB each.")
    write_baseline_copies: bool = Field(
        default=True,
        description="Also write cifar10-dataset.tar.gz and cifar10-processed.tar.gz, unless it is blocked, for "
        "readers of the pipeline that this project replaces. Costs some seconds, and memory for a third of the images: "
        "leave out for large data.",
    )


@dg.asset(
    key_prefix=PREFIX,
    group_name="data",
    kinds={"s3", "numpy"},
    owners=OWNERS,
    tags={"layer": "processed"},
    deps=[RAW_DATASET],
)
def processed_dataset(
    context: dg.AssetExecutionContext, config: ProcessedDatasetConfig, object_store: ObjectStoreResource
) -> dg.MaterializeResult:
    """Decoded images as uint8 tensors in safetensors shards, split into train, validation and test.

    The split follows each image's own digest, so that new data moves no old image. Channel statistics are those of the
    train split alone.
    """
    with retrying_infrastructure_faults():
        raw, processed = object_store.raw, object_store.processed
        raw_digest = config.raw_digest or materialized_digest(context, RAW_DATASET)
        split = SplitConfig(**config.model_dump(exclude={"raw_digest", "write_baseline_copies"}))
        version = build_processed(raw, processed, raw_digest, split)
        if reasons := objections(judge_processed(raw, processed, version.digest)):
            context.log.warning(f"The copies for the old pipeline stay as they are: {' '.join(reasons)}")
        elif config.write_baseline_copies:
            write_baseline_raw(raw, processed, version.digest)
            write_baseline_processed(processed, version.digest)
        earlier = (each for each in previous_digests(context.instance, PROCESSED_DATASET) if each != version.digest)
        return dg.MaterializeResult(
            data_version=dg.DataVersion(version.digest),
            metadata=metadata.of_processed(processed, version, next(earlier, None)),
        )
