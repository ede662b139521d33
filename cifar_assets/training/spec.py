"""The job spec: all that a training needs to know, as one JSON document. No torch."""

from pathlib import Path
from typing import Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator, model_validator

from cifar_assets.contracts import MODEL_NAME
from cifar_assets.training.recipes import Recipe
from resources.digests import sha256_json
from resources.errors import ConfigError
from resources.redaction import has_credentials, redacted

ALGORITHM = 2
"""Raised whenever the code changes what weights a recipe, data and seed give: old checkpoints are then not resumed."""


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

    tracking_uri: str = Field(min_length=1, description="sqlite:///... or http(s)://... URI of the tracking store.")
    experiment: str = Field(default=MODEL_NAME, min_length=1, description="Experiment, made when it does not exist.")
    run_name: str | None = Field(
        default=None, description="Name of the MLflow run; MLflow invents one when it is empty."
    )
    tags: dict[str, str] = Field(default_factory=dict, description="Tags put on the run and on the model version.")
    registered_model: str | None = Field(
        default=MODEL_NAME, description="Registered model that gets the new version; none registers nothing."
    )
    patience_seconds: float = Field(
        default=60.0, ge=0, description="Seconds the end of a training waits for what could not be sent before."
    )
    artifact_uri: str | None = Field(
        default=None, description="Artifact root for a new experiment; the tracking store's own when it is empty."
    )

    @field_validator("tracking_uri")
    @classmethod
    def _without_credentials(cls, value: str) -> str:
        try:
            return check_tracking_uri(value)
        except ConfigError as error:
            raise ValueError(str(error)) from error


class Execution(BaseModel):
    """How a training is run on this machine. Decides nothing about what is trained beyond rounding."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    device: Literal["auto", "cpu", "cuda"] = Field(default="auto", description="auto takes a GPU where there is one.")
    threads: int | None = Field(
        default=None, ge=1, description="CPU threads per process; by default this process's share of the CPU limit."
    )
    compile: bool = Field(
        default=False,
        description="Compile the network with torch.compile: pays on GPUs, and needs a C++ compiler where it runs.",
    )
    resident_megabytes: int = Field(
        default=4096,
        ge=0,
        description="Splits up to this size are kept on the device; larger ones are read batch by batch.",
    )
    checkpoint_every_steps: int = Field(
        default=100,
        ge=0,
        description="Steps between checkpoints within an epoch; 0 checkpoints at ends of epochs only.",
    )
    keep_checkpoints: int = Field(default=2, ge=1, description="Checkpoints kept while the training runs.")
    cache_folder: str | None = Field(
        default=None, description="Folder for data fetched from a remote store; a temporary one by default."
    )


class JobSpec(BaseModel):
    """One training job, complete: the same spec gives the same weights, wherever it runs."""

    model_config = ConfigDict(frozen=True, extra="forbid", hide_input_in_errors=True)

    dataset_uri: str = Field(description="URI of the processed dataset's folder, ending in its digest.")
    dataset_digest: str = Field(pattern=r"^[0-9a-f]{64}$", description="Digest of the processed dataset.")
    recipe: Recipe = Field(description="What to train and how, complete.")
    seed: int = Field(default=0, ge=0, lt=2**32, description="Decides initial weights, order and augmentation.")
    output_uri: str = Field(description="URI of the models bucket: the model goes to <output_uri>/<model digest>/.")
    mlflow: MlflowTarget | None = Field(default=None, description="Where to track the training; none tracks nothing.")
    write_seed_copies: bool = Field(
        default=False, description="Also write the weights as resnet18_cifar10.pth, for readers of the old pipeline."
    )
    execution: Execution = Field(default_factory=Execution, description="How to run it here.")

    @model_validator(mode="after")
    def _check_dataset_uri(self) -> "JobSpec":
        if self.dataset_uri.rstrip("/").rpartition("/")[2] != self.dataset_digest:
            raise ValueError(f"dataset_uri {self.dataset_uri!r} must end in dataset_digest {self.dataset_digest}")
        return self

    @property
    def identity(self) -> str:
        """Digest of what decides the weights. Checkpoints are found by it, so the same job continues them."""
        return sha256_json(
            {
                "algorithm": ALGORITHM,
                "dataset": self.dataset_digest,
                "recipe": self.recipe.model_dump(mode="json"),
                "seed": self.seed,
            }
        )

    @property
    def processed_uri(self) -> str:
        """URI of the bucket the dataset lies in."""
        return self.dataset_uri.rstrip("/").rpartition("/")[0] + "/"


def parse_spec(text: str | bytes, source: str) -> JobSpec:
    """The job spec in a JSON document. Raises ConfigError naming the source and every field that is wrong."""
    try:
        return JobSpec.model_validate_json(text)
    except ValidationError as error:
        problems = "; ".join(
            f"{'.'.join(map(str, problem['loc'])) or 'document'}: {problem['msg']}" for problem in error.errors()
        )
        raise ConfigError(f"Job spec from {source} is not valid: {problems}.") from error


def read_spec(path: Path) -> JobSpec:
    """The job spec in a file."""
    try:
        return parse_spec(path.read_bytes(), str(path))
    except OSError as error:
        raise ConfigError(f"Job spec {path} cannot be read: {error}.") from error
