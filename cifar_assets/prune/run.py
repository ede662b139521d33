"""The whole of pruning: find out what is needed, list what can go, and remove it if asked to."""

from collections.abc import Callable, Iterable
from dataclasses import dataclass, field

import dagster as dg

from cifar_assets.dataset.sources.download import download_folder
from cifar_assets.dataset.stores import Stores, stores_below
from cifar_assets.dataset.versions.processed import list_processed_versions
from cifar_assets.dataset.versions.raw import list_raw_digests
from cifar_assets.prune import machine, roots
from cifar_assets.prune.policy import Policy, Removal
from cifar_assets.prune.stores import (
    data_of_models,
    orphans,
    pins,
    prune_models,
    prune_processed,
    prune_raw,
    raw_of_processed,
)
from cifar_assets.prune.tracking import Tracking
from resources.errors import ConfigError, ExplainedError
from resources.inference_service import InferenceServiceResource
from resources.mlflow.resource import MlflowResource
from resources.object_store.resource import ObjectStoreResource

Say = Callable[[str], None]


class PruneError(ExplainedError):
    """It could not be found out what is needed. Nothing was removed."""


@dataclass
class Report:
    """What was, or would be, removed."""

    removals: list[Removal] = field(default_factory=list)

    @property
    def size(self) -> int:
        return sum(removal.size for removal in self.removals)

    def by_kind(self) -> dict[str, tuple[int, int]]:
        """Number and bytes by kind of thing."""
        kinds: dict[str, tuple[int, int]] = {}
        for removal in self.removals:
            number, size = kinds.get(removal.kind, (0, 0))
            kinds[removal.kind] = (number + 1, size + removal.size)
        return kinds


@dataclass(frozen=True)
class Pruner:
    """Prunes what these resources reach."""

    policy: Policy
    instance: dg.DagsterInstance
    object_store: ObjectStoreResource
    mlflow: MlflowResource
    serving: InferenceServiceResource

    def run(self, apply: bool, say: Say) -> Report:
        """List what can go, each thing with the reason, and with `apply` remove it.

        Raises PruneError, and removes nothing, where Dagster, MLflow, the service or a manifest does not tell what is
        in use.
        """
        report = Report()
        stores = stores_below(self.object_store.root())
        try:
            tracking = self._tracking()
            versions, kept_processed, kept_raw = self._versions(stores, tracking)
        except Exception as error:
            raise PruneError(f"Nothing was removed, as it cannot be told what is in use: {error}") from error
        self._handle(versions, apply, say, report)
        if apply:  # also those that others published meanwhile
            kept_processed, kept_raw = list_processed_versions(stores.processed), list_raw_digests(stores.raw)
        self._handle(orphans(stores, kept_processed, kept_raw, self.policy), apply, say, report)
        self._handle(machine.temporary_files(self.policy), apply, say, report)
        self._handle(machine.downloads(self.policy, download_folder()), apply, say, report)
        self._handle(machine.compute_logs(self.policy, self.instance, self.object_store.root()), apply, say, report)
        return report

    def _tracking(self) -> Tracking | None:
        try:
            return Tracking(self.mlflow, self.policy)
        except ConfigError:
            return None  # a deployment without MLflow has no registered models

    def _versions(
        self, stores: Stores, tracking: Tracking | None
    ) -> tuple[list[Removal], Iterable[str], Iterable[str]]:
        in_use = roots.Roots({})
        roots.add_served(in_use, self.serving)
        roots.add_recorded(in_use, self.instance)
        for digest in pins(stores.models):
            in_use.add(digest, "pinned")
        for digest, reason in (tracking.registered() if tracking else {}).items():
            in_use.add(digest, reason)
        models = prune_models(stores.models, in_use.reasons, self.policy)
        for digest, reason in data_of_models(stores, models.kept).items():
            in_use.add(digest, reason)
        processed = prune_processed(stores.processed, in_use.reasons, self.policy)
        for digest, reason in raw_of_processed(stores.processed, processed.kept).items():
            in_use.add(digest, reason)
        raw = prune_raw(stores.raw, in_use.reasons, self.policy)
        registered = list(tracking.removals(in_use.reasons | dict.fromkeys(models.kept, "kept"))) if tracking else []
        # a version in MLflow goes before the model that it names, and a model before its data
        removals = [*registered, *models.removals, *processed.removals, *raw.removals]
        return removals, processed.kept, raw.kept

    def _handle(self, removals: Iterable[Removal], apply: bool, say: Say, report: Report) -> None:
        for removal in removals:
            verb = "Removing" if apply else "Would remove"
            say(f"{verb} {removal.kind} {removal.name} ({readable_size(removal.size)}): {removal.reason}")
            if apply:
                removal.remove()
            report.removals.append(removal)


def readable_size(size: float) -> str:
    """Bytes as a person reads them, such as 1.5 MB."""
    for unit in ("bytes", "kB", "MB"):
        if size < 1000:
            return f"{size:.0f} {unit}" if unit == "bytes" else f"{size:.1f} {unit}"
        size /= 1000
    return f"{size:.1f} GB"
