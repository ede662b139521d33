"""What one run of the pipeline is about, decided by its first step and handed to the others as one JSON document."""

import json
from collections.abc import Mapping
from typing import Any, Literal

from dagster_pipes import DAGSTER_PIPES_CONTEXT_ENV_VAR, DAGSTER_PIPES_MESSAGES_ENV_VAR, encode_param
from pydantic import BaseModel, ConfigDict, Field, ValidationError

from cifar_assets.contracts import JOB_SPEC_VARIABLE
from cifar_assets.training.spec import JobSpec
from resources.errors import ConfigError
from resources.pipes_store import STORE_URI_PARAM

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
        context = {
            "asset_keys": None,
            "code_version_by_asset_key": None,
            "provenance_by_asset_key": None,
            "partition_key": None,
            "partition_key_range": None,
            "partition_time_window": None,
            "run_id": self.run,
            "job_name": None,
            "retry_number": 0,
            "extras": {},
        }
        return {
            JOB_SPEC_VARIABLE: _embeddable(self.spec.model_dump(mode="json")),
            DAGSTER_PIPES_CONTEXT_ENV_VAR: encode_param({"data": context}),
            DAGSTER_PIPES_MESSAGES_ENV_VAR: encode_param(messages),
        }

    def to_json(self) -> str:
        return _embeddable(self.model_dump(mode="json"))


def parse_plan(text: str) -> Plan:
    """The plan in a JSON document. ConfigError for one that the first step did not write."""
    try:
        return Plan.model_validate_json(text)
    except ValidationError as error:
        raise ConfigError(f"This is no plan as the step `data` writes it: {error}") from error


def _embeddable(value: Mapping[str, Any]) -> str:
    """Compact JSON that can stand between single quotes in YAML, and in which Argo finds no template of its own."""
    text = json.dumps(value, separators=(",", ":"), sort_keys=True)
    return text.replace("'", "\\u0027").replace("{{", "{\\u007b")
