"""The settings: every environment variable that Dagster's code location and the commands read. See docs/settings.md."""

from typing import Annotated, Any, Literal

from pydantic import AfterValidator, Field, Json, ValidationError, model_validator
from pydantic_settings import BaseSettings, SettingsConfigDict

from cifar_assets.model_package import WantedPrecision
from resources.errors import ConfigError
from resources.model_signature import read_public_keys
from resources.redaction import has_credentials


def _without_credentials(address: str) -> str:
    if has_credentials(address):
        raise ValueError("expected an address without user, password or query, which would be stored and shown")
    return address


Address = Annotated[str, AfterValidator(_without_credentials)]
JsonObject = Json[dict[str, Any]]


class Settings(BaseSettings):
    """One field for each variable, which has the field's name in upper case. An empty variable counts as unset."""

    model_config = SettingsConfigDict(
        frozen=True, env_ignore_empty=True, extra="ignore", validate_default=False, hide_input_in_errors=True
    )

    dagster_deployment: Literal["local", "kubernetes"] = Field(
        default="local", description="Where trainings and the service run: `local` or `kubernetes`."
    )
    cifar10_source: str = Field(
        default="download",
        repr=False,
        description="Raw images: `download`, `synthetic`, or a path or URI, including a signed one (data.md).",
    )
    data_sets: str | None = Field(
        default=None,
        repr=False,
        description="Further data sets: a YAML list, or a file that contains it (your_own_images.md).",
    )
    accuracy_threshold: float | None = Field(
        default=None,
        ge=0,
        le=1,
        allow_inf_nan=False,
        description="Lowest test accuracy of a model that may be served: a fraction from 0 to 1, such as 0.8. By "
        "default 0.85 for CIFAR-10, and for other images more than always naming the most frequent class.",
    )
    serving_precision: WantedPrecision = Field(
        default="auto",
        description="`float32`, `int8` (fails for a model that loses accuracy), or `auto` (serving.md).",
    )
    model_public_key: Annotated[str, AfterValidator(read_public_keys)] | None = Field(
        default=None,
        description="Public key, or file of it: only models that it signed are served (signing.md).",
    )
    retrain_config: JsonObject = Field(
        default={},
        description="Config of `trained_model` in runs that the landing sensor starts: a JSON object, such as "
        '`{"recipe": "fast"}`.',
    )
    inference_service_port: int = Field(
        default=8080, ge=1, le=65535, description="`local`: port of the service, from 1 to 65535."
    )
    recorded_fraction: float = Field(
        default=0,
        ge=0,
        le=1,
        allow_inf_nan=False,
        description="Fraction of the predictions that the model server records, from 0 (none) to 1 (monitoring.md).",
    )
    cifar_store: str = Field(
        default=".cifar/store",
        description="Object store that commands read: a folder, or `s3:///` for the one at AWS_ENDPOINT_URL.",
    )
    mlflow_tracking_uri: str | None = Field(
        default=None, repr=False, description="`kubernetes`: address of the tracking server, without credentials."
    )
    trainer_image: str | None = Field(
        default=None, description="`kubernetes`, required: trainer image, such as `localhost/cifar-trainer:dev`."
    )
    trainer_kind: Literal["pytorchjob", "trainjob"] | None = Field(
        default=None,
        description="`kubernetes`: `pytorchjob` or `trainjob`; by default what the cluster has, PyTorchJob first.",
    )
    trainer_namespace: str = Field(default="cifar", description="`kubernetes`: namespace of trainings and workflows.")
    trainer_job: JsonObject = Field(
        default={},
        repr=False,
        description="`kubernetes`: fields of `PyTorchJobConfig` or `TrainJobConfig`, a JSON object, such as "
        '`{"memory": "4Gi"}`.',
    )
    trainer_store_endpoint_url: str | None = Field(
        default=None,
        description="`kubernetes`: address of the object store for pods, if it differs from AWS_ENDPOINT_URL.",
    )
    trainer_mlflow_tracking_uri: Address | None = Field(
        default=None, description="`kubernetes`: address of MLflow for pods, if it differs from MLFLOW_TRACKING_URI."
    )
    server_image: str | None = Field(
        default=None, description="`kubernetes`, required: server image, such as `localhost/cifar-server:dev`."
    )
    server_namespace: str = Field(default="cifar", description="`kubernetes`: namespace of the InferenceService.")
    server_name: str = Field(default="cifar10", description="`kubernetes`: name of the InferenceService.")
    server_settings: JsonObject = Field(
        default={},
        repr=False,
        description='`kubernetes`: fields of `InferenceServiceSettings`, a JSON object, such as `{"min_replicas": 2}`.',
    )
    server_url: Address | None = Field(
        default=None, description="`kubernetes`: address at which Dagster reaches the service, such as an ingress."
    )
    server_host: str | None = Field(default=None, description="`kubernetes`: Host header for SERVER_URL.")
    server_gateway: str | None = Field(
        default=None,
        description="`kubernetes`: Gateway as namespace/name, for canaries without Knative; serverless, with Dagster "
        "outside the cluster: Knative's gateway as namespace/service, by default `kourier-system/kourier-internal`.",
    )
    server_shadow_seconds: float | None = Field(
        default=None, gt=0, description="`kubernetes`: how long a new model first gets a copy of every request."
    )
    argo_parameters: JsonObject = Field(
        default={}, description="`kubernetes`: further parameters of the Argo workflow, a JSON object."
    )

    @model_validator(mode="after")
    def _names_its_images(self) -> "Settings":
        for name in ("trainer_image", "server_image"):
            if self.dagster_deployment == "kubernetes" and not getattr(self, name):
                raise ValueError(f"{name.upper()} is not set: set it to the image that `make images` built")
        return self


def read_settings() -> Settings:
    """The current settings. ConfigError names each invalid variable and what is allowed, but not its value."""
    try:
        return Settings()
    except ValidationError as error:
        raise ConfigError(f"The environment is not valid. {'; '.join(map(_problem, error.errors()))}.") from None


def _problem(details: Any) -> str:
    problem = details["msg"].removeprefix("Value error, ")
    if not details["loc"]:
        return problem
    name = str(details["loc"][0])
    return f"{name.upper()}: {problem} ({(Settings.model_fields[name].description or '').rstrip('.')})"
