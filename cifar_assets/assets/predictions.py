"""The served model's predictions for all pictures of a folder or prefix."""

from collections.abc import Iterator
from typing import TYPE_CHECKING

import dagster as dg
from pydantic import Field

from cifar_assets.assets import metadata
from cifar_assets.assets.binding import data_set_asset
from cifar_assets.assets.common import AccuracyGate, retrying_infrastructure_faults
from cifar_assets.assets.inference_service import judge_proven
from cifar_assets.assets.keys import INFERENCE_SERVICE, key_of
from cifar_assets.assets.record import materialized_digest
from cifar_assets.data_set import DataSet
from cifar_assets.gate import choose_precision
from resources.errors import ConfigError
from resources.object_store.resource import ObjectStoreResource

if TYPE_CHECKING:
    from cifar_assets.predictions.run import Predictions


class PredictionsConfig(dg.Config):
    """Which pictures are classified, and by which model."""

    source: str | None = Field(
        default=None, description="Folder, or s3://bucket/prefix, of the pictures. Required to classify any."
    )
    model_digest: str | None = Field(
        default=None, description="Digest of a model that the gate passes; by default the one that is served."
    )


@data_set_asset(
    group="serving",
    kinds={"s3", "parquet", "onnx"},
    tags={"layer": "predictions"},
    deps=[INFERENCE_SERVICE],
    output_required=False,
    dagster_type=dg.Nothing,  # pyright: ignore[reportArgumentType]: typed as None
)
def predictions(
    data_set: DataSet,
    context: dg.AssetExecutionContext,
    config: PredictionsConfig,
    object_store: ObjectStoreResource,
    gate: AccuracyGate,
) -> Iterator[dg.MaterializeResult]:
    """Parquet files with the class and probabilities of each picture, or the reason why it has none.

    Materialize it again after an interruption, or when pictures were added: what is classified is not repeated. Without
    a source, a run of several assets, such as "Materialize all", leaves it out.
    """
    if config.source is None and set(context.run.asset_selection or ()) - {context.asset_key}:
        context.log.info("Left out: no source is set. To classify pictures, launch the job predict with a source.")
        return
    with retrying_infrastructure_faults():
        if config.source is None:
            raise ConfigError("source is not set: set it in the config to the folder or s3:// prefix to classify.")
        from cifar_assets.predictions.run import predict

        models = object_store.models
        digest = config.model_digest or materialized_digest(context, key_of(data_set, INFERENCE_SERVICE))
        _, verdict, _ = judge_proven(context.instance, data_set, models, digest, gate)
        if not verdict.passed:
            raise ConfigError(f"The model is not used: {verdict.reason}. Set model_digest to one that the gate passes.")
        precision, _ = choose_precision(models, digest, gate.precision)

        def observe(done: int, total: int) -> None:
            progress = {"num_classified": done, "num_pictures": total}
            context.log_event(dg.AssetObservation(context.asset_key, metadata=progress))

        stores = models, object_store.processed
        found = predict(config.source, *stores, digest, precision, public_keys=gate.public_keys, on_part=observe)
        yield dg.MaterializeResult(data_version=dg.DataVersion(found.manifest.digest), metadata=_metadata(found))


def _metadata(found: "Predictions") -> metadata.Metadata:
    from cifar_assets.predictions.parts import COLUMNS

    manifest, counts = found.manifest, found.counts
    columns = [dg.TableColumn(name, str(kind), description) for name, (kind, description) in COLUMNS.items()]
    return {
        "dagster/row_count": manifest.rows,
        "dagster/column_schema": dg.TableSchema(columns),
        "uri": found.target.uri(),
        "source": manifest.source,
        "model_digest": manifest.model_digest,
        "precision": manifest.precision,
        "num_classified_now": found.num_predicted,
        "images_per_second": metadata.shown(found.num_predicted / found.seconds),
        "num_unusable": manifest.rows - sum(counts.values()),
        "counts": metadata.table({"class": name, "images": counts.get(name, 0)} for name in manifest.classes),
        "unusable": metadata.table({"name": name, "reason": reason} for name, reason in found.unusable),
        "unread": metadata.table({"name": name, "reason": reason} for name, reason in [*found.unread.items()][:50]),
        "least_certain": metadata.picture("pictures, the least certain first", found.sheet),
    }
