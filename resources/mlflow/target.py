"""Where a training is tracked, and what MLflow refuses until a person acts. Needs no Dagster."""

import logging
import os
import re
from typing import TYPE_CHECKING, Annotated

from pydantic import AfterValidator, BaseModel, ConfigDict, Field

from resources.errors import ConfigError
from resources.redaction import has_credentials, redacted

if TYPE_CHECKING:
    from mlflow import MlflowClient

DEFAULT_NAME = "cifar10"
"""Of the experiment and of the registered model."""

_OWN_STATE = re.compile(r"The (experiment|run) (\S+) must be in the 'active' state")
_KNOWN = {
    "out-of-date database schema": "Back up the database, then run: mlflow db upgrade {uri}. If a newer MLflow wrote "
    "it, install that version instead.",
    "readonly database": "Give this process's user write permission on the database file and its folder.",
    "unable to open database file": "Make the folder of the database, or give this process's user permission to it.",
    "file is not a database": "Move that file away: MLflow makes a new database.",
    "unsupported URI": "Set MLFLOW_TRACKING_URI to an address such as http://mlflow:5000 or sqlite:////folder/mlflow.db.",
}
_FOREIGN = ("ENDPOINT_NOT_FOUND", "NOT_IMPLEMENTED")
_FOREIGN_TEXTS = re.compile(r"not in a valid JSON format|failed with error code (?:30\d|404|405|426|501) ")


def check_tracking_uri(uri: str, name: str = "tracking_uri") -> str:
    """The URI as it is. ConfigError where it holds credentials: job specs are written into manifests and stores."""
    if has_credentials(uri):
        raise ConfigError(
            f"{name} is {redacted(uri)}: expected an address without user, password or query, which would be stored. "
            "Set MLFLOW_TRACKING_USERNAME and MLFLOW_TRACKING_PASSWORD instead, in pods from a Secret."
        )
    return uri


class MlflowTarget(BaseModel):
    """Where a training is tracked and under which name its model is registered."""

    model_config = ConfigDict(frozen=True, extra="forbid", hide_input_in_errors=True)

    tracking_uri: Annotated[str, AfterValidator(lambda uri: check_tracking_uri(uri))] = Field(
        min_length=1, description="sqlite:///... or http(s)://... URI of the tracking store."
    )
    experiment: str = Field(default=DEFAULT_NAME, min_length=1, description="Experiment, made when it does not exist.")
    run_name: str | None = Field(
        default=None, description="Name of the MLflow run; MLflow invents one when it is empty."
    )
    tags: dict[str, str] = Field(default_factory=dict, description="Tags put on the run and on the model version.")
    registered_model: str | None = Field(
        default=DEFAULT_NAME, description="Registered model that gets the new version; none registers nothing."
    )
    patience_seconds: float = Field(
        default=60.0, ge=0, description="Seconds the end of a training waits for what could not be sent before."
    )
    artifact_uri: str | None = Field(
        default=None, description="Artifact root for a new experiment; the tracking store's own when it is empty."
    )


def open_client(uri: str) -> "MlflowClient":
    """A client with little patience of its own: MLflow's is minutes per call, a sensor's tick has one."""
    from mlflow import MlflowClient

    os.environ.setdefault("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "1")
    os.environ.setdefault("MLFLOW_HTTP_REQUEST_TIMEOUT", "20")
    for name in ("alembic", "mlflow.store.db"):  # opening a sqlite store logs every step of the schema migration
        logging.getLogger(name).setLevel(logging.WARNING)
    return MlflowClient(uri, uri)


def http_status(error: Exception) -> int | None:
    """The HTTP status of an error of MLflow, or of an upload through its server."""
    from mlflow.exceptions import MlflowException

    if isinstance(error, MlflowException):
        return error.get_http_status_code()
    return getattr(getattr(error, "response", None), "status_code", None)


def why_refused(error: Exception, uri: str) -> str | None:
    """What MLflow refuses and what a person has to do about it; None for what may pass by itself."""
    text, status = str(error), http_status(error)
    advice = next((advice.format(uri=uri) for words, advice in _KNOWN.items() if words in text), None)
    if match := _OWN_STATE.search(text):
        kind, identity = match.groups()
        advice = f"To restore it: MLFLOW_TRACKING_URI={uri} mlflow {kind}s restore --{kind}-id {identity}"
    elif not advice and status in (401, 403):
        advice = (
            "Set MLFLOW_TRACKING_USERNAME and MLFLOW_TRACKING_PASSWORD, or MLFLOW_TRACKING_TOKEN, with write access."
        )
    elif not advice and (getattr(error, "error_code", None) in _FOREIGN or _FOREIGN_TEXTS.search(text)):
        advice = f"What answers at {uri} is not an MLflow server, or one of another version: check MLFLOW_TRACKING_URI."
    if advice:
        return f"{first_line(error)} {advice}"
    return first_line(error) if status in (400, 404, 413, 422) else None


def first_line(error: Exception) -> str:
    """The beginning of an error's text, or its type."""
    return (str(error).splitlines() or [type(error).__name__])[0].strip()[:300]
