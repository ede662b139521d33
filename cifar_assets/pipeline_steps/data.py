"""The first two steps: is every object of the data what its digest says, and does it pass what blocks in Dagster?"""

import json
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from cifar_assets.dataset.stores import Stores
from cifar_assets.dataset.versions.processed import ProcessedManifest, list_processed_versions, read_processed
from cifar_assets.dataset.versions.raw import current_raw_digest, read_raw
from cifar_assets.dataset.versions.reader import open_split
from cifar_assets.dataset.versions.splits import SPLIT_NAMES, SplitConfig
from cifar_assets.dataset.versions.verdicts import judge_processed, judge_raw
from cifar_assets.pipeline_steps.plan import Plan
from cifar_assets.training.recipes import get_recipe
from cifar_assets.training.spec import Execution, JobSpec
from resources.errors import ConfigError, DataError, ObjectNotFoundError
from resources.mlflow.target import MlflowTarget
from resources.object_store import ObjectStore
from resources.verdict import Judges, objections

CURRENT = "current"


@dataclass(frozen=True)
class Request:
    """What a person asks a run for."""

    run: str
    dataset: str
    """Digest of a processed version, or `current`."""
    recipe: str
    overrides: Mapping[str, Any]
    execution: Mapping[str, Any]
    seed: int
    replicas: int
    mlflow: MlflowTarget | None


def make_plan(stores: Stores, request: Request) -> Plan:
    """The run's plan, its dataset named by digest.

    ConfigError for a recipe, override or number that is not valid, ObjectNotFoundError where the dataset is missing.
    """
    recipe = get_recipe(request.recipe, request.overrides)
    digest = current_dataset(stores) if request.dataset == CURRENT else request.dataset
    manifest = read_processed(stores.processed, digest)
    try:
        spec = JobSpec(
            dataset_uri=stores.processed.at(digest).uri(),
            dataset_digest=digest,
            recipe=recipe,
            seed=request.seed,
            output_uri=stores.models.uri(),
            mlflow=request.mlflow,
            write_baseline_copies=True,
            execution=Execution(**request.execution),
        )
        return Plan(run=request.run, raw_digest=manifest.raw_digest, replicas=request.replicas, spec=spec)
    except ValueError as error:
        raise ConfigError(f"The run asks for something that cannot be: {error}") from error


def current_dataset(stores: Stores) -> str:
    """Digest of the processed version of the current raw version, split as by default where there are several.

    ObjectNotFoundError where nothing was imported or processed yet, ConfigError where the choice is not clear.
    """
    raw_digest = current_raw_digest(stores.raw)
    if raw_digest is None:
        raise ObjectNotFoundError(
            f"There is no raw data in {stores.raw.uri()}: materialize cifar10/raw_dataset, or name a dataset's digest."
        )
    versions = {
        digest: read_processed(stores.processed, digest) for digest in list_processed_versions(stores.processed)
    }
    found = {digest: manifest for digest, manifest in versions.items() if manifest.raw_digest == raw_digest}
    usual = [digest for digest, manifest in found.items() if manifest.config == SplitConfig()]
    choice = usual or list(found)
    if not choice:
        raise ObjectNotFoundError(
            f"Raw version {raw_digest} was not processed yet: {stores.processed.uri()} has no version made from it. "
            "Materialize cifar10/processed_dataset."
        )
    if len(choice) > 1:
        raise ConfigError(f"Raw version {raw_digest} was processed in several ways: name one of {', '.join(choice)}.")
    return choice[0]


def verify_raw(raw: ObjectStore, digest: str) -> int:
    """The number of images of a raw version; DataError with the reasons where it fails what blocks in Dagster."""
    manifest = read_raw(raw, digest)
    _require(judge_raw(raw, digest), f"Raw version {digest}")
    return manifest.rows


def verify_processed(stores: Stores, digest: str, raw_digest: str) -> ProcessedManifest:
    """Open every split, which compares each file's digest, and ask what blocks in Dagster.

    DataError where the manifest belongs to other raw data, or counts other images than there are.
    """
    manifest = read_processed(stores.processed, digest)
    if manifest.raw_digest != raw_digest:
        raise DataError(
            f"Processed version {digest} was made from raw version {manifest.raw_digest}, expected {raw_digest}: "
            "materialize cifar10/processed_dataset again."
        )
    for split in SPLIT_NAMES:
        with tempfile.TemporaryDirectory(prefix="cifar-verify-") as fresh:  # what is compared comes from the store
            rows = len(open_split(stores.processed, digest, split, Path(fresh)))
        if rows != manifest.count(split):
            raise DataError(
                f"The {split} split of processed version {digest} has {rows} images where its manifest counts "
                f"{manifest.count(split)}: materialize cifar10/processed_dataset again."
            )
    _require(judge_processed(stores.raw, stores.processed, digest), f"Processed version {digest}")
    return manifest


def _require(judges: Judges, what: str) -> None:
    if reasons := objections(judges):
        raise DataError(f"{what} is refused. {' '.join(reasons)}")


def parse_object(text: str, what: str) -> dict[str, Any]:
    """A JSON object given on the command line. ConfigError naming what it was for."""
    try:
        value = json.loads(text)
    except ValueError as error:
        raise ConfigError(f"{what} is {text!r}: expected a JSON object such as {{}}. {error}") from error
    if not isinstance(value, dict):
        raise ConfigError(f"{what} is {text!r}: expected a JSON object such as {{}}.")
    return value
