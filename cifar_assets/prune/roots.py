"""What is in use, and therefore stays: asked of Dagster, MLflow and the service. Who does not answer stops pruning."""

import os
from dataclasses import dataclass
from typing import TYPE_CHECKING

import dagster as dg

from cifar_assets.assets.keys import (
    ARGO_TRAINED_MODEL,
    INFERENCE_SERVICE,
    PROCESSED_DATASET,
    RAW_DATASET,
    TRAINED_MODEL,
)
from cifar_assets.assets.upstream import DATA_VERSION_TAG
from cifar_assets.prune.stores import find_digests

if TYPE_CHECKING:
    from resources.inference_service import InferenceServiceResource

_RECENT = {RAW_DATASET: 1, PROCESSED_DATASET: 1, TRAINED_MODEL: 1, ARGO_TRAINED_MODEL: 1, INFERENCE_SERVICE: 2}
"""How many distinct versions that Dagster last recorded stay: of the service two, so that there is a way back."""

_LOOKED_THROUGH = 100
_UNFINISHED = [
    dg.DagsterRunStatus.NOT_STARTED,
    dg.DagsterRunStatus.QUEUED,
    dg.DagsterRunStatus.STARTING,
    dg.DagsterRunStatus.STARTED,
    dg.DagsterRunStatus.CANCELING,
]


@dataclass(frozen=True)
class Roots:
    """Digests of models and data versions that stay, and why."""

    reasons: dict[str, str]

    def add(self, digest: str | None, reason: str) -> None:
        if digest:
            self.reasons.setdefault(digest, reason)


def add_recorded(roots: Roots, instance: dg.DagsterInstance) -> None:
    """The versions that Dagster last recorded, and those that unfinished runs and RETRAIN_CONFIG name."""
    for key, number in _RECENT.items():
        records = instance.fetch_materializations(key, limit=_LOOKED_THROUGH).records
        tags = [record.asset_materialization.tags or {} for record in records if record.asset_materialization]
        versions = dict.fromkeys(tag[DATA_VERSION_TAG] for tag in tags if DATA_VERSION_TAG in tag)
        for version in list(versions)[:number]:
            roots.add(version, f"last materialized as {key.to_user_string()}")
    for record in instance.get_run_records(dg.RunsFilter(statuses=_UNFINISHED)):
        for digest in find_digests(str(record.dagster_run.run_config)):
            roots.add(digest, f"named in the config of run {record.dagster_run.run_id}")
    for digest in find_digests(os.environ.get("RETRAIN_CONFIG", "")):
        roots.add(digest, "named in RETRAIN_CONFIG")


def add_served(roots: Roots, serving: "InferenceServiceResource") -> None:
    """The model that answers now."""
    roots.add(serving.status().model_digest, "served")
