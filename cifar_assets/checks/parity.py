"""Checks of the model that Argo made: is it the one that Dagster made of the same dataset, recipe and seed?"""

import json
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache
from typing import Any

import dagster as dg

from cifar_assets.assets.keys import ARGO_TRAINED_MODEL, TRAINED_MODEL
from cifar_assets.assets.record import find_materialization
from cifar_assets.assets.upstream import materialized_digest, previous_digests
from cifar_assets.checks.results import answers, spec
from cifar_assets.finding import Finding, objections
from cifar_assets.gate import judge_model
from cifar_assets.model_package import (
    ENVIRONMENT_FILE,
    METRICS_FILE,
    RECIPE_FILE,
    WEIGHTS_FILE,
    ModelManifest,
    read_json,
    read_manifest,
)
from resources.errors import DataError, ExplainedError
from resources.object_store import ObjectStore
from resources.object_store.resource import ObjectStoreResource


@dataclass(frozen=True)
class StoredModel:
    """A model package, opened."""

    digest: str
    package: ObjectStore
    manifest: ModelManifest

    @property
    def inputs(self) -> tuple[str, int, Any]:
        """Dataset, seed and recipe."""
        recipe = read_json(self.package, self.manifest, RECIPE_FILE)
        return self.manifest.dataset_digest, self.manifest.seed, recipe

    @property
    def artefacts(self) -> set[str]:
        return {info.key for info in self.package.list()}

    @property
    def metric_names(self) -> set[str]:
        return set(read_json(self.package, self.manifest, METRICS_FILE))

    @property
    def environment(self) -> dict[str, Any]:
        """What the training ran on, as far as it bears upon rounding."""
        found = json.loads(self.package.read(ENVIRONMENT_FILE))
        names = ("processes", "threads", "device", "precision", "cpu")
        return {**{name: found[name] for name in names}, "torch": found["packages"].get("torch")}


def open_model(models: ObjectStore, digest: str) -> StoredModel:
    """The stored model. ObjectNotFoundError or IntegrityError where it is not what the digest says."""
    package = models.at(digest)
    return StoredModel(digest, package, read_manifest(package, digest))


PARITY_CHECKS = [
    spec(
        ARGO_TRAINED_MODEL,
        "same_inputs",
        "trained_model has a model of the same dataset, recipe and seed. When it fails there is nothing to compare "
        "with: materialize trained_model and then this asset.",
    ),
    spec(ARGO_TRAINED_MODEL, "same_artefacts", "Both models consist of the same files."),
    spec(ARGO_TRAINED_MODEL, "same_metrics", "Both models report metrics of the same names."),
    spec(
        ARGO_TRAINED_MODEL,
        "same_weights",
        "The weights are the same to the bit, if as many processes trained. When it fails look at the images: one "
        "of the pipelines runs other code or another torch.",
    ),
    spec(ARGO_TRAINED_MODEL, "same_verdict", "The workflow's last step decided as the gate decides about the twin."),
]


@dg.multi_asset_check(name="argo_parity_checks", can_subset=True, specs=PARITY_CHECKS)
def argo_parity_checks(
    context: dg.AssetCheckExecutionContext, object_store: ObjectStoreResource
) -> Iterator[dg.AssetCheckResult]:
    """Five comparisons of the model from Argo with its twin from Dagster."""
    models = object_store.models
    digest = materialized_digest(context, ARGO_TRAINED_MODEL)
    argo = cache(lambda: open_model(models, digest))
    twin = cache(lambda: _find_twin(context, models, argo()))
    judges = {
        "same_inputs": lambda: Finding(
            True,
            f"Dataset {argo().manifest.dataset_digest}, seed {argo().manifest.seed} and recipe are those of "
            f"{twin().digest}.",
            {"twin": twin().digest},
        ),
        "same_artefacts": lambda: _sets("files", argo().artefacts, twin().artefacts),
        "same_metrics": lambda: _sets("metrics", argo().metric_names, twin().metric_names),
        "same_weights": lambda: compare_weights(argo(), twin()),
        "same_verdict": lambda: _verdicts(context.instance, models, digest, twin()),
    }
    yield from answers(context, PARITY_CHECKS, digest, judges)


def _find_twin(context: dg.AssetCheckExecutionContext, models: ObjectStore, argo: StoredModel) -> StoredModel:
    """The newest model of trained_model with the same inputs; one of the same digest comes first."""
    digests = previous_digests(context.instance, TRAINED_MODEL)
    for digest in sorted(digests, key=lambda digest: digest != argo.digest):
        try:
            model = open_model(models, digest)
            if model.inputs == argo.inputs:
                return model
        except ExplainedError as error:
            context.log.warning(f"Model {digest} cannot be compared with: {error}")
    raise DataError(f"No model of trained_model has the dataset, recipe and seed of {argo.digest}.")


def _sets(what: str, argo: set[str], twin: set[str]) -> Finding:
    missing, further = sorted(twin - argo), sorted(argo - twin)
    text = f"Both have the same {len(argo)} {what}."
    if missing or further:
        text = f"Argo's model lacks the {what} {missing} and has {further} in addition."
    return Finding(not (missing or further), text)


def compare_weights(argo: StoredModel, twin: StoredModel) -> Finding:
    """Equal weights, or another number of processes, pass."""
    if argo.manifest.files[WEIGHTS_FILE] == twin.manifest.files[WEIGHTS_FILE]:
        text = f"The weights have the same sha256, {argo.manifest.files[WEIGHTS_FILE]}."
        return Finding(True, text, {"identical": str(True)})
    ours, theirs = argo.environment, twin.environment
    differences = ", ".join(f"{key} {ours[key]} and {theirs[key]}" for key in ours if ours[key] != theirs[key])
    comparable = ours["processes"] == theirs["processes"]
    text = f"The weights differ. Argo and Dagster had {differences or 'the same environment'}."
    return Finding(not comparable, text, {"identical": str(False)})


def _verdicts(instance: dg.DagsterInstance, models: ObjectStore, digest: str, twin: StoredModel) -> Finding:
    """The recorded verdict of the workflow, against the same functions' verdict on the twin at the same threshold."""
    record = find_materialization(instance, ARGO_TRAINED_MODEL, digest)
    if record is None or record.asset_materialization is None:
        raise DataError(f"No materialization of {ARGO_TRAINED_MODEL.to_user_string()} gave model {digest}.")
    recorded = record.asset_materialization.metadata
    against = objections(judge_model(models, twin.digest, float(str(recorded["threshold"].value))))
    expected, found = "refused" if against else "passed", str(recorded["gate"].value)
    return Finding(found == expected, f"Argo: {found}. The gate: {expected}. {' '.join(against)}".rstrip())
