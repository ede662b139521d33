"""The tracking target of a training, and MLflow errors that require user action. Needs no Dagster."""

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
"""Name of the experiment and of the registered model."""
CA_VARIABLE = "MLFLOW_TRACKING_SERVER_CERT_PATH"
"""Environment variable of MLflow's client: file of the certificate authorities to trust."""

_OWN_STATE = re.compile(r"The (experiment|run) (\S+) must be in the 'active' state")
_UNTRUSTED = f"Set {CA_VARIABLE} to a file with the certificate authority of the server."
_KNOWN = {
    "certificate verify failed": _UNTRUSTED,
    "CA certificate bundle, invalid path": _UNTRUSTED,
    "out-of-date database schema": "Back up the database, then run: mlflow db upgrade {uri}. If a newer MLflow wrote "
    "it, install that version instead.",
    "readonly database": "Give this process's user write permission to the database file and its folder.",
    "unable to open database file": "Create the folder of the database, or give this process's user permission to it.",
    "file is not a database": "Move the file away: MLflow creates a new database.",
    "unsupported URI": "Set MLFLOW_TRACKING_URI to a URI such as http://mlflow:5000 or sqlite:////folder/mlflow.db.",
}
_FOREIGN = ("ENDPOINT_NOT_FOUND", "NOT_IMPLEMENTED")
_FOREIGN_TEXTS = re.compile(r"not in a valid JSON format|failed with error code (?:30\d|404|405|426|501) ")


def check_tracking_uri(uri: str, name: str = "tracking_uri") -> str:
    """The URI, unchanged. ConfigError if it contains credentials: job specs are written into manifests and stores."""
    if has_credentials(uri):
        raise ConfigError(
            f"{name} is {redacted(uri)}: expected an address without user, password or query, which would be stored. "
            "Set MLFLOW_TRACKING_USERNAME and MLFLOW_TRACKING_PASSWORD instead, in pods from a Secret."
        )
    return uri


class MlflowTarget(BaseModel):
    """Where a training is tracked, and the name under which its model is registered."""

    model_config = ConfigDict(frozen=True, extra="forbid", hide_input_in_errors=True)

    tracking_uri: Annotated[str, AfterValidator(lambda uri: check_tracking_uri(uri))] = Field(
        min_length=1, description="sqlite:///... or http(s)://... URI of the tracking store."
    )
    experiment: str = Field(default=DEFAULT_NAME, min_length=1, description="Experiment, created if it does not exist.")
    run_name: str | None = Field(
        default=None, description="Name of the MLflow run; MLflow generates one if it is empty."
    )
    tags: dict[str, str] = Field(default_factory=dict, description="Tags of the run and of the model version.")
    registered_model: str | None = Field(
        default=DEFAULT_NAME,
        description="Registered model that gets the new version; if unset, no version is registered.",
    )
    patience_seconds: float = Field(
        default=60.0, ge=0, description="Seconds that the end of a training waits for pending requests."
    )
    artifact_uri: str | None = Field(
        default=None, description="Artifact root for a new experiment; if empty, the tracking store's default."
    )


def open_client(uri: str) -> "MlflowClient":
    """A client with short timeouts: MLflow's defaults are minutes per call, and a sensor tick has one minute."""
    from mlflow import MlflowClient

    os.environ.setdefault("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "1")
    os.environ.setdefault("MLFLOW_HTTP_REQUEST_TIMEOUT", "20")
    for name in ("alembic", "mlflow.store.db"):  # opening a sqlite store logs every step of the schema migration
        logging.getLogger(name).setLevel(logging.WARNING)
    return MlflowClient(uri, uri)


def http_status(error: Exception) -> int | None:
    """The HTTP status of an MLflow error, or of an upload through its server."""
    from mlflow.exceptions import MlflowException

    if isinstance(error, MlflowException):
        return error.get_http_status_code()
    return getattr(getattr(error, "response", None), "status_code", None)


def why_refused(error: Exception, uri: str) -> str | None:
    """MLflow's refusal and what the user has to do about it; None for errors that may be transient."""
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
        advice = f"The server at {uri} is not an MLflow server, or has another version: check MLFLOW_TRACKING_URI."
    if advice:
        return f"{first_line(error)} {advice}"
    return first_line(error) if status in (400, 404, 413, 422) else None


def first_line(error: Exception) -> str:
    """The first line of an error's text, or its type."""
    return (str(error).splitlines() or [type(error).__name__])[0].strip()[:300]
