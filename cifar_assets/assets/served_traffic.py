"""What the served model was asked and answered lately, according to the record that the server writes."""

from datetime import UTC, datetime, timedelta

import dagster as dg
from pydantic import Field

from cifar_assets.assets import metadata
from cifar_assets.assets.binding import data_set_asset
from cifar_assets.assets.common import retrying_infrastructure_faults
from cifar_assets.assets.keys import INFERENCE_SERVICE
from cifar_assets.data_set import DataSet
from cifar_assets.traffic.records import read_traffic
from resources.object_store.resource import ObjectStoreResource


class ServedTrafficConfig(dg.Config):
    """Which records are read."""

    hours: float = Field(
        default=24.0, gt=0, le=24 * 366, description="Records of so many hours before now; the newest 20,000 images."
    )


@data_set_asset(group="monitoring", kinds={"s3", "parquet"}, tags={"layer": "monitoring"}, deps=[INFERENCE_SERVICE])
def served_traffic(
    data_set: DataSet,
    context: dg.AssetExecutionContext,
    config: ServedTrafficConfig,
    object_store: ObjectStoreResource,
) -> dg.MaterializeResult:
    """Predictions of the last hours: by class, confidence, latency, refusals, and the pictures.

    The data version is the window of time, to whole seconds in UTC, from which the check reads the same records.
    """
    with retrying_infrastructure_faults():
        end = datetime.now(UTC).replace(microsecond=0) + timedelta(seconds=1)  # with what was just written
        start = (end - timedelta(hours=config.hours)).replace(microsecond=0)
        version = f"{start.isoformat()}/{end.isoformat()}"
        traffic = read_traffic(object_store.traffic, start, end)
        return dg.MaterializeResult(
            data_version=dg.DataVersion(version),
            metadata={"window": version, "uri": object_store.traffic.uri(), **metadata.of_traffic(traffic)},
        )
