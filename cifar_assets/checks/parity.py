"""Checks whether the model that Argo made equals the one that Dagster made from the same dataset, recipe and seed."""

import json
from collections.abc import Iterator
from functools import cache
from typing import Any

import dagster as dg

from cifar_assets.assets.binding import data_set_checks
from cifar_assets.assets.keys import ARGO_TRAINED_MODEL, TRAINED_MODEL, key_of
from cifar_assets.assets.record import find_materialization, materialized_digest, previous_digests
from cifar_assets.checks.results import answers, declare
from cifar_assets.data_set import DataSet
from cifar_assets.gate import default_threshold, judge_model, read_metrics
from cifar_assets.model_package import ENVIRONMENT_FILE, RECIPE_FILE, WEIGHTS_FILE, read_json, read_manifest
from resources.errors import DataError, ExplainedError
from resources.object_store import ObjectStore
from resources.object_store.resource import ObjectStoreResource
from resources.verdict import Verdict, objections

PARITY_CHECKS = declare(
    ARGO_TRAINED_MODEL,
    failing={
        "same_inputs": "trained_model has a model of the same dataset, recipe and seed. If it fails, there is "
        "nothing to compare to: materialize trained_model and then this asset.",
        "same_artefacts": "Both models consist of the same files.",
        "same_metrics": "Both models report metrics with the same names.",
        "same_weights": "The weights are bit-identical if the number of processes is equal. If it fails, compare the "
        "container images: one of the pipelines runs different code or another version of torch.",
        "same_verdict": "The workflow's last step reached the same verdict as the gate does for the twin.",
    },
)


class _Model:
    """A stored model, opened."""

    def __init__(self, models: ObjectStore, digest: str):
        self.digest = digest
        self.package = models.at(digest)
        self.manifest = read_manifest(self.package, digest)
        recipe = read_json(self.package, self.manifest, RECIPE_FILE)
        self.inputs = (self.manifest.dataset_digest, self.manifest.seed, recipe, self.manifest.start_weights)

    def environment(self) -> dict[str, Any]:
        """The parts of the training environment that affect rounding."""
        found = json.loads(self.package.read(ENVIRONMENT_FILE))
        names = ("processes", "threads", "device", "precision", "cpu")
        return {**{name: found[name] for name in names}, "torch": found["packages"].get("torch")}


@data_set_checks(PARITY_CHECKS)
def argo_parity_checks(
    data_set: DataSet, context: dg.AssetCheckExecutionContext, object_store: ObjectStoreResource
) -> Iterator[dg.AssetCheckResult]:
    """Five comparisons between the model from Argo and its twin from Dagster."""
    models = object_store.models
    digest = materialized_digest(context, key_of(data_set, ARGO_TRAINED_MODEL))

    @cache
    def both() -> tuple[_Model, _Model]:
        argo = _Model(models, digest)
        return argo, _find_twin(context, key_of(data_set, TRAINED_MODEL), models, argo)

    def same_inputs() -> Verdict:
        argo, twin = both()
        text = f"Dataset {argo.inputs[0]}, seed {argo.inputs[1]} and recipe are those of {twin.digest}."
        return Verdict(True, text, {"twin": twin.digest})

    judges = {
        "same_inputs": same_inputs,
        "same_artefacts": lambda: _sets("files", *({info.key for info in each.package.list()} for each in both())),
        "same_metrics": lambda: _sets("metrics", *(set(read_metrics(models, each.digest)) for each in both())),
        "same_weights": lambda: _same_weights(*both()),
        "same_verdict": lambda: _same_verdict(context.instance, key_of(data_set, ARGO_TRAINED_MODEL), models, *both()),
    }
    yield from answers(context, PARITY_CHECKS(data_set), digest, judges)


def _find_twin(
    context: dg.AssetCheckExecutionContext, trained: dg.AssetKey, models: ObjectStore, argo: _Model
) -> _Model:
    """The newest model of trained_model with the same inputs, preferably one with the same digest."""
    digests = previous_digests(context.instance, trained)
    for digest in sorted(digests, key=lambda digest: digest != argo.digest):
        try:
            model = _Model(models, digest)
        except ExplainedError as error:
            context.log.warning(f"Model {digest} cannot be used for the comparison: {error}")
            continue
        if model.inputs == argo.inputs:
            return model
    raise DataError(f"trained_model has no model with the dataset, recipe and seed of {argo.digest}.")


def _sets(what: str, argo: set[str], twin: set[str]) -> Verdict:
    missing, further = sorted(twin - argo), sorted(argo - twin)
    text = f"Both have the same {len(argo)} {what}."
    if missing or further:
        text = f"Argo's model lacks the {what} {missing} and has {further} that the other lacks."
    return Verdict(not (missing or further), text)


def _same_weights(argo: _Model, twin: _Model) -> Verdict:
    """Passes if the weights are equal or the number of processes differs."""
    if argo.manifest.files[WEIGHTS_FILE] == twin.manifest.files[WEIGHTS_FILE]:
        return Verdict(True, "The weights have the same sha256.", {"identical": str(True)})
    ours, theirs = argo.environment(), twin.environment()
    differences = ", ".join(f"{key} {ours[key]} and {theirs[key]}" for key in ours if ours[key] != theirs[key])
    text = f"The weights differ. Between Argo and Dagster: {differences or 'no difference in the environment'}."
    return Verdict(ours["processes"] != theirs["processes"], text, {"identical": str(False)})


def _same_verdict(
    instance: dg.DagsterInstance, key: dg.AssetKey, models: ObjectStore, argo: _Model, twin: _Model
) -> Verdict:
    """Compares the workflow's recorded verdict with the gate's verdict on the twin, at the same threshold."""
    made = find_materialization(instance, key, argo.digest)
    if made is None:
        raise DataError(f"No materialization of {key.to_user_string()} has model {argo.digest}.")
    recorded = made.materialization.metadata
    threshold = float(str(recorded["threshold"].value))
    is_default = threshold == default_threshold(argo.manifest, read_metrics(models, argo.digest))
    against = objections(judge_model(models, twin.digest, None if is_default else threshold))
    expected, found = "refused" if against else "passed", str(recorded["gate"].value)
    return Verdict(found == expected, f"Argo: {found}. The gate: {expected}. {'; '.join(against)}".rstrip())
