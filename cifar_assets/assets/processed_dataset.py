"""Training-ready tensors: one immutable version per raw version and split."""

import dagster as dg
from pydantic import Field

from cifar_assets.assets import metadata
from cifar_assets.assets.faults import retrying_infrastructure_faults
from cifar_assets.assets.keys import OWNERS, PREFIX, PROCESSED_DATASET, RAW_DATASET
from cifar_assets.assets.upstream import materialized_digest, previous_digests
from cifar_assets.dataset.versions.processed import build_processed
from cifar_assets.dataset.versions.seed_copies import write_seed_processed, write_seed_raw
from cifar_assets.dataset.versions.splits import SplitConfig
from cifar_assets.dataset.versions.verdicts import judge_processed
from cifar_assets.finding import objections
from resources.object_store.resource import ObjectStoreResource


class ProcessedDatasetConfig(dg.Config):
    """How the raw images are split and stored."""

    raw_digest: str | None = Field(
        default=None, description="Digest of the raw version to process; by default the one raw_dataset materialized."
    )
    validation_fraction: float = Field(
        default=0.1,
        gt=0,
        lt=1,
        description="Share of the training images, chosen by image digest, kept for validation.",
    )
    test_fraction: float = Field(
        default=0.1, gt=0, lt=1, description="Share kept for the test where the source has no test split of its own."
    )
    max_shard_rows: int = Field(default=16_384, ge=1, description="Images in one shard, 3 kB each.")
    write_seed_copies: bool = Field(
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
        split = SplitConfig(
            validation_fraction=config.validation_fraction,
            test_fraction=config.test_fraction,
            max_shard_rows=config.max_shard_rows,
        )
        version = build_processed(raw, processed, raw_digest, split)
        if reasons := objections(judge_processed(raw, processed, version.digest)):
            context.log.warning(f"The copies for the old pipeline stay as they are: {' '.join(reasons)}")
        elif config.write_seed_copies:
            write_seed_raw(raw, processed, version.digest)
            write_seed_processed(processed, version.digest)
        previous = next(
            (digest for digest in previous_digests(context.instance, PROCESSED_DATASET) if digest != version.digest),
            None,
        )
        return dg.MaterializeResult(
            data_version=dg.DataVersion(version.digest), metadata=metadata.of_processed(processed, version, previous)
        )
