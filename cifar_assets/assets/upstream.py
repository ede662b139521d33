"""Which exact version of an asset a step or a check works on."""

import dagster as dg

from resources.errors import ConfigError

DATA_VERSION_TAG = "dagster/data_version"


def materialized_digest(context: dg.AssetExecutionContext | dg.AssetCheckExecutionContext, key: dg.AssetKey) -> str:
    """The data version of `current_materialization`."""
    return data_version(current_materialization(context, key))


def current_materialization(
    context: dg.AssetExecutionContext | dg.AssetCheckExecutionContext, key: dg.AssetKey
) -> dg.AssetMaterialization:
    """The materialization that this run made, or else the one Dagster last recorded.

    A run that made its own upstream must not pick up what another run made in between. Raises ConfigError when the
    asset was never materialized.
    """
    records = context.instance.fetch_materializations(dg.AssetRecordsFilter(asset_key=key), limit=RECENT).records
    own = next((record for record in records if record.run_id == context.run.run_id), None)
    record = own or next(iter(records), None)
    if record is None or record.asset_materialization is None:
        raise ConfigError(
            f"{key.to_user_string()} has no materialization to work on: materialize it first, "
            "or name the digest in this asset's config."
        )
    return record.asset_materialization


def previous_digests(instance: dg.DagsterInstance, key: dg.AssetKey) -> list[str]:
    """Data versions of the asset's last materializations, newest first, each once."""
    records = instance.fetch_materializations(key, limit=RECENT).records
    digests = (data_version(record.asset_materialization) for record in records if record.asset_materialization)
    return list(dict.fromkeys(digests))


def data_version_of(record: dg.EventLogRecord) -> str:
    """The data version of the materialization in an event record."""
    if record.asset_materialization is None:
        raise ConfigError(f"Event {record.storage_id} is not a materialization.")
    return data_version(record.asset_materialization)


def data_version(materialization: dg.AssetMaterialization) -> str:
    """The data version a materialization carries. ConfigError for one recorded without, such as by hand."""
    version = (materialization.tags or {}).get(DATA_VERSION_TAG)
    if not version:
        raise ConfigError(
            f"The last materialization of {materialization.asset_key.to_user_string()} has no data version: "
            "materialize the asset again."
        )
    return version


RECENT = 100
"""How many materializations are looked through: for a run's own, for earlier versions, and for a training to reuse."""
