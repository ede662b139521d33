"""The plan of one pipeline run, made by its first step and passed to the others as one JSON document."""

import json
from collections.abc import Mapping
from typing import Any, Literal

from dagster_pipes import DAGSTER_PIPES_CONTEXT_ENV_VAR, DAGSTER_PIPES_MESSAGES_ENV_VAR, encode_param
from pydantic import BaseModel, ConfigDict, Field, ValidationError

from cifar_assets.dataset.stores import Stores
from cifar_assets.dataset.versions.processed import list_processed_versions, read_processed
from cifar_assets.dataset.versions.raw import current_raw_digest
from cifar_assets.dataset.versions.splits import SplitConfig
from cifar_assets.training.spec import JobSpec
from resources.errors import ConfigError, ObjectNotFoundError
from resources.object_store import ObjectStore
from resources.pipes_store import STORE_URI_PARAM, parse_object
from resources.trainer.contract import JOB_SPEC_VARIABLE, PIPES_PREFIX


class Plan(BaseModel):
    """The exact data, training and number of processes of one run, with names and aliases resolved."""

    model_config = ConfigDict(frozen=True, extra="forbid", hide_input_in_errors=True)

    version: Literal[1] = 1
    run: str = Field(min_length=1, description="Unique name of the run.")
    raw_digest: str = Field(pattern=r"^[0-9a-f]{64}$", description="Raw version that the dataset was made from.")
    replicas: int = Field(default=1, ge=1, le=64, description="Number of training pods.")
    spec: JobSpec = Field(description="The trainer's job spec.")

    @property
    def messages_prefix(self) -> str:
        """Key prefix, in the models bucket, of the Pipes messages of this run's training."""
        return f"{PIPES_PREFIX}messages/{self.run}/"

    def trainer_environment(self) -> dict[str, str]:
        """Environment variables for `python -m cifar_assets.training` to do this run's training.

        The Pipes variables make the trainer write its messages, including the resulting digest, to the store, as it
        does for Dagster.
        """
        messages = {STORE_URI_PARAM: f"{self.spec.output_uri.rstrip('/')}/{self.messages_prefix}"}
        return {
            JOB_SPEC_VARIABLE: _embeddable(self.spec),
            DAGSTER_PIPES_CONTEXT_ENV_VAR: encode_param({"data": {"run_id": self.run, "extras": {}}}),
            DAGSTER_PIPES_MESSAGES_ENV_VAR: encode_param(messages),
        }

    def to_json(self) -> str:
        return _embeddable(self)

    def training_result(self, models: ObjectStore) -> Mapping[str, Any]:
        """The newest result message of the run's training. ObjectNotFoundError when there is none."""
        result: Mapping[str, Any] | None = None
        for info in models.list(self.messages_prefix):
            for line in models.read(info.key).splitlines():
                match parse_object(line):
                    case {"method": "report_custom_message", "params": {"payload": {"type": "result", **payload}}}:
                        result = {name: value for name, value in payload.items() if name != "mlflow_unsent"}
        if result is None:
            raise ObjectNotFoundError(
                f"The training of run {self.run} reported no model in {models.uri(self.messages_prefix)}: "
                "it ended early, or failed for a reason in its log."
            )
        return result


def parse_plan(text: str) -> Plan:
    """The plan in a JSON document. ConfigError for a document that is not a plan."""
    try:
        return Plan.model_validate_json(text)
    except ValidationError as error:
        raise ConfigError(f"The document is not a plan written by the step `data`: {error}") from error


def current_dataset(stores: Stores) -> str:
    """Digest of the processed version of the current raw version, with default split settings if there are several.

    ObjectNotFoundError if nothing was imported or processed yet, ConfigError if the choice is ambiguous.
    """
    raw_digest = current_raw_digest(stores.raw)
    if raw_digest is None:
        raise ObjectNotFoundError(
            f"There is no raw data in {stores.raw.uri()}: materialize cifar10/raw_dataset, or pass a dataset's digest."
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
        raise ConfigError(
            f"Raw version {raw_digest} was processed in several ways: pass one of the digests {', '.join(choice)}."
        )
    return choice[0]


def _embeddable(model: BaseModel) -> str:
    """Compact JSON that is safe between single quotes in YAML and contains no Argo template tags."""
    text = json.dumps(model.model_dump(mode="json"), separators=(",", ":"), sort_keys=True)
    return text.replace("'", "\\u0027").replace("{{", "{\\u007b")
