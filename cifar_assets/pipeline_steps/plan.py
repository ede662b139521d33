"""What one run of the pipeline is about, decided by its first step and handed to the others as one JSON document."""

import json
from collections.abc import Mapping
from typing import Any, Literal

from dagster_pipes import DAGSTER_PIPES_CONTEXT_ENV_VAR, DAGSTER_PIPES_MESSAGES_ENV_VAR, encode_param
from pydantic import BaseModel, ConfigDict, Field, ValidationError

from cifar_assets.dataset.stores import Stores
from cifar_assets.dataset.versions.processed import list_processed_versions, read_processed
from cifar_assets.dataset.versions.raw import current_raw_digest
from cifar_assets.dataset.versions.splits import SplitConfig
from cifar_assets.training.recipes import get_recipe
from cifar_assets.training.spec import Execution, JobSpec
from resources.errors import ConfigError, ObjectNotFoundError
from resources.mlflow.target import MlflowTarget
from resources.pipes_store import STORE_URI_PARAM
from resources.trainer.contract import JOB_SPEC_VARIABLE

CURRENT = "current"
"""In place of a dataset's digest: the processed version of the current raw version."""
MESSAGES_PREFIX = "pipes/messages/"
"""Where in the models bucket trainings write their messages, those that Dagster starts as well."""


class Plan(BaseModel):
    """The exact data, training and number of processes of one run. Names and aliases are resolved."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    version: Literal[1] = 1
    run: str = Field(min_length=1, description="Identifies the run: no two runs share a name.")
    raw_digest: str = Field(pattern=r"^[0-9a-f]{64}$", description="Raw version behind the dataset.")
    replicas: int = Field(default=1, ge=1, le=64, description="Pods that train.")
    spec: JobSpec = Field(description="What the trainer is told.")

    @property
    def messages_prefix(self) -> str:
        """Key prefix, in the models bucket, of what this run's training tells."""
        return f"{MESSAGES_PREFIX}{self.run}/"

    def trainer_environment(self) -> dict[str, str]:
        """Variables with which `python -m cifar_assets.training` does this run's training.

        The Pipes variables make the trainer leave its messages, the resulting digest among them, in the store: the
        same way Dagster learns of it.
        """
        messages = {STORE_URI_PARAM: f"{self.spec.output_uri.rstrip('/')}/{self.messages_prefix}"}
        unknown = (
            "asset_keys",
            "code_version_by_asset_key",
            "provenance_by_asset_key",
            "partition_key",
            "partition_key_range",
            "partition_time_window",
            "job_name",
        )
        context = {**dict.fromkeys(unknown), "run_id": self.run, "retry_number": 0, "extras": {}}
        return {
            JOB_SPEC_VARIABLE: _embeddable(self.spec.model_dump(mode="json")),
            DAGSTER_PIPES_CONTEXT_ENV_VAR: encode_param({"data": context}),
            DAGSTER_PIPES_MESSAGES_ENV_VAR: encode_param(messages),
        }

    def to_json(self) -> str:
        return _embeddable(self.model_dump(mode="json"))


def make_plan(
    stores: Stores,
    *,
    run: str,
    dataset: str,
    recipe: str,
    overrides: Mapping[str, Any],
    execution: Mapping[str, Any],
    seed: int,
    replicas: int,
    mlflow: MlflowTarget | None,
) -> Plan:
    """The run's plan, its dataset named by digest.

    ConfigError for a recipe, override or number that is not valid, ObjectNotFoundError where the dataset is missing.
    """
    chosen = get_recipe(recipe, overrides)
    digest = current_dataset(stores) if dataset == CURRENT else dataset
    manifest = read_processed(stores.processed, digest)
    try:
        spec = JobSpec(
            dataset_uri=stores.processed.at(digest).uri(),
            dataset_digest=digest,
            recipe=chosen,
            seed=seed,
            output_uri=stores.models.uri(),
            mlflow=mlflow,
            write_baseline_copies=True,
            execution=Execution(**execution),
        )
        return Plan(run=run, raw_digest=manifest.raw_digest, replicas=replicas, spec=spec)
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


def parse_plan(text: str) -> Plan:
    """The plan in a JSON document. ConfigError for one that the first step did not write."""
    try:
        return Plan.model_validate_json(text)
    except ValidationError as error:
        raise ConfigError(f"This is not a plan as the step `data` writes it: {error}") from error


def parse_object(text: str, what: str) -> dict[str, Any]:
    """A JSON object given on the command line. ConfigError naming what it was for."""
    try:
        value = json.loads(text)
    except ValueError as error:
        raise ConfigError(f"{what} is {text!r}: expected a JSON object such as {{}}. {error}") from error
    if not isinstance(value, dict):
        raise ConfigError(f"{what} is {text!r}: expected a JSON object such as {{}}.")
    return value


def _embeddable(value: Mapping[str, Any]) -> str:
    """Compact JSON that can stand between single quotes in YAML, and in which Argo finds no template of its own."""
    text = json.dumps(value, separators=(",", ":"), sort_keys=True)
    return text.replace("'", "\\u0027").replace("{{", "{\\u007b")
