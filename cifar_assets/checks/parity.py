"""Checks of the model that Argo made: is it the one that Dagster made of the same dataset, recipe and seed?"""

import json
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import dagster as dg

from cifar_assets.assets.keys import ARGO_TRAINED_MODEL, TRAINED_MODEL
from cifar_assets.assets.upstream import data_version, materialized_digest, previous_digests
from cifar_assets.checks.results import only_selected, result, spec
from cifar_assets.errors import CifarError
from cifar_assets.gate import judge
from cifar_assets.model_package import (
    ENVIRONMENT_FILE,
    METRICS_FILE,
    RECIPE_FILE,
    WEIGHTS_FILE,
    ModelManifest,
    read_json,
    read_manifest,
)
from cifar_assets.object_store import ObjectStore
from resources.object_store import ObjectStoreResource


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


@dg.multi_asset_check(
    name="argo_parity_checks",
    can_subset=True,
    specs=[
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
            "of the roads runs other code or another torch.",
        ),
        spec(
            ARGO_TRAINED_MODEL, "same_verdict", "The workflow's last step decided as the gate decides about the twin."
        ),
    ],
)
@only_selected
def argo_parity_checks(
    context: dg.AssetCheckExecutionContext, object_store: ObjectStoreResource
) -> Iterator[dg.AssetCheckResult]:
    """Five comparisons of the model from Argo with its twin from Dagster."""
    models = object_store.models
    argo = open_model(models, materialized_digest(context, ARGO_TRAINED_MODEL))
    twin = _find_twin(context, models, argo)
    if twin is None:
        text = f"No model of trained_model has the dataset, recipe and seed of {argo.digest}."
        names = ("same_inputs", "same_artefacts", "same_metrics", "same_weights", "same_verdict")
        yield from (result(ARGO_TRAINED_MODEL, name, False, text) for name in names)
        return
    yield result(
        ARGO_TRAINED_MODEL,
        "same_inputs",
        True,
        f"Dataset {argo.manifest.dataset_digest}, seed {argo.manifest.seed} and recipe are those of {twin.digest}.",
        twin=twin.digest,
    )
    yield _sets("same_artefacts", "files", argo.artefacts, twin.artefacts)
    yield _sets("same_metrics", "metrics", argo.metric_names, twin.metric_names)
    yield compare_weights(argo, twin)
    yield _verdicts(context, models, argo, twin)


def _find_twin(context: dg.AssetCheckExecutionContext, models: ObjectStore, argo: StoredModel) -> StoredModel | None:
    """The newest model of trained_model with the same inputs; one of the same digest comes first."""
    digests = previous_digests(context.instance, TRAINED_MODEL)
    for digest in sorted(digests, key=lambda digest: digest != argo.digest):
        try:
            model = open_model(models, digest)
            if model.inputs == argo.inputs:
                return model
        except CifarError as error:
            context.log.warning(f"Model {digest} cannot be compared with: {error}")
    return None


def _sets(name: str, what: str, argo: set[str], twin: set[str]) -> dg.AssetCheckResult:
    missing, further = sorted(twin - argo), sorted(argo - twin)
    text = f"Both have the same {len(argo)} {what}."
    if missing or further:
        text = f"Argo's model lacks the {what} {missing} and has {further} beside them."
    return result(ARGO_TRAINED_MODEL, name, not (missing or further), text)


def compare_weights(argo: StoredModel, twin: StoredModel) -> dg.AssetCheckResult:
    """Equal weights, or another number of processes, pass."""
    name = "same_weights"
    if argo.manifest.files[WEIGHTS_FILE] == twin.manifest.files[WEIGHTS_FILE]:
        text = f"The weights have the same sha256, {argo.manifest.files[WEIGHTS_FILE]}."
        return result(ARGO_TRAINED_MODEL, name, True, text, identical=str(True))
    ours, theirs = argo.environment, twin.environment
    differences = ", ".join(f"{key} {ours[key]} and {theirs[key]}" for key in ours if ours[key] != theirs[key])
    comparable = ours["processes"] == theirs["processes"]
    text = f"The weights differ. Argo and Dagster had {differences or 'the same environment'}."
    return result(ARGO_TRAINED_MODEL, name, not comparable, text, identical=str(False))


def _verdicts(
    context: dg.AssetCheckExecutionContext, models: ObjectStore, argo: StoredModel, twin: StoredModel
) -> dg.AssetCheckResult:
    """The workflow's own word, as it was recorded, against the gate's at the same threshold."""
    recorded = _recorded_metadata(context, argo.digest)
    threshold = float(recorded["threshold"].value)  # pyright: ignore[reportArgumentType]  # recorded as a float
    verdict = judge(models, twin.digest, threshold)[1]
    expected = "passed" if verdict.passed else "refused"
    found = str(recorded["gate"].value)
    text = f"Argo: {found}. The gate: {expected}, as {verdict.reason}."
    return result(ARGO_TRAINED_MODEL, "same_verdict", found == expected, text)


def _recorded_metadata(context: dg.AssetCheckExecutionContext, digest: str) -> dict[str, dg.MetadataValue]:
    for record in context.instance.fetch_materializations(ARGO_TRAINED_MODEL, limit=100).records:
        materialization = record.asset_materialization
        if materialization and data_version(materialization) == digest:
            return dict(materialization.metadata)
    raise CifarError(f"No materialization of {ARGO_TRAINED_MODEL.to_user_string()} gave model {digest}.")
