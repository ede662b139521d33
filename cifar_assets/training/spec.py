"""The job spec: everything that a training needs to know, as one JSON document. No torch."""

import logging
from collections.abc import Mapping, Sequence
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field, TypeAdapter, ValidationError, model_validator

from cifar_assets.dataset.versions.processed import read_processed
from cifar_assets.training.recipes import Recipe, get_recipe, set_fields
from cifar_assets.training.start import Start, find_start
from resources.digests import sha256_json
from resources.errors import ConfigError
from resources.mlflow.target import DEFAULT_NAME, MlflowTarget
from resources.object_store import ObjectStore
from resources.trainer.contract import TrainingSpec

_LOG = logging.getLogger(__name__)

ALGORITHM = 4
"""Incremented if a code change gives other weights for the same inputs: old checkpoints are then not resumed."""


class Execution(BaseModel):
    """How a training runs on this machine. Has no effect on the result beyond rounding."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    device: Literal["auto", "cpu", "cuda"] = Field(default="auto", description="auto uses a GPU if there is one.")
    threads: int | None = Field(
        default=None, ge=1, description="CPU threads per process; by default its fraction of all CPUs."
    )
    resident_megabytes: int = Field(default=4096, ge=0, description="Largest split to keep on the device.")
    checkpoint_every_steps: int = Field(
        default=100, ge=0, description="Steps between checkpoints within an epoch; 0 for only at the end of epochs."
    )
    keep_checkpoints: int = Field(default=2, ge=1, description="Number of checkpoints kept while the training runs.")


class JobSpec(TrainingSpec):
    """One training job, complete: the same spec gives the same weights, wherever it runs."""

    model_config = ConfigDict(frozen=True, extra="forbid", hide_input_in_errors=True)

    data_set: str = Field(default=DEFAULT_NAME, description="Name of the data set, for names and descriptions only.")
    dataset_uri: str = Field(description="URI of the processed dataset's folder, ending in its digest.")
    dataset_digest: str = Field(pattern=r"^[0-9a-f]{64}$", description="Digest of the processed dataset.")
    recipe: Recipe = Field(description="The complete recipe.")
    seed: int = Field(default=0, ge=0, lt=2**32, description="Determines initial weights, order and augmentation.")
    start: Start | None = Field(default=None, description="Weights to start from; by default random ones.")
    output_uri: str = Field(description="URI of the models bucket: the model goes to <output_uri>/<model digest>/.")
    write_baseline_copies: bool = Field(
        default=False, description="Also write the weights as resnet18_cifar10.pth, for readers of the old pipeline."
    )
    execution: Execution = Field(default_factory=Execution, description="How to run it here.")

    @model_validator(mode="before")
    @classmethod
    def _read_earlier_form(cls, values: Any) -> Any:
        """Convert a spec of an earlier release, as in a stored plan."""
        if not isinstance(values, dict) or "write_seed_copies" not in values:
            return values
        recipe, execution = values.get("recipe"), values.get("execution") or {}
        if not isinstance(recipe, dict) or not isinstance(execution, dict):
            return values  # unchanged, to be refused field by field
        if recipe.get("network") == "resnet18":
            raise ValueError("recipe.network: resnet18 with a 3x3 stem is no longer supported: use another recipe")
        network = str(recipe.get("network")).removesuffix("-imagenet")
        recipe = {"views": "mirrored" if recipe.get("test_time_flip") else "plain", **recipe, "network": network}
        rest = {name: value for name, value in values.items() if name != "write_seed_copies"}
        return rest | {
            "write_baseline_copies": values["write_seed_copies"],
            "recipe": _known_fields(Recipe, recipe),
            "execution": _known_fields(Execution, execution),
        }

    @model_validator(mode="after")
    def _check_dataset_uri(self) -> "JobSpec":
        if self.dataset_uri.rstrip("/").rpartition("/")[2] != self.dataset_digest:
            raise ValueError(f"dataset_uri {self.dataset_uri!r} must end in dataset_digest {self.dataset_digest}")
        return self

    @property
    def name(self) -> str:
        return f"{self.data_set}-{self.recipe.name}"

    @property
    def identity(self) -> str:
        start = {"start": self.start.sha256} if self.start else {}
        return sha256_json(
            {
                "algorithm": ALGORITHM,
                "dataset": self.dataset_digest,
                "recipe": self.recipe.model_dump(mode="json"),
                "seed": self.seed,
                **start,
            }
        )

    def check_dataset(self, processed: ObjectStore) -> None:
        """Raise ObjectNotFoundError if the dataset is not stored, ConfigError if the recipe does not fit its images."""
        manifest = read_processed(processed, self.dataset_digest)
        self.recipe.check_fits(manifest, manifest.count("train"))

    @property
    def processed_uri(self) -> str:
        """URI of the bucket that contains the dataset."""
        return self.dataset_uri.rstrip("/").rpartition("/")[0] + "/"


def _known_fields(model: type[BaseModel], values: dict[str, Any]) -> dict[str, Any]:
    if gone := sorted(values.keys() - model.model_fields.keys()):
        _LOG.warning("The job spec is of an earlier release; these fields no longer exist: %s", ", ".join(gone))
    return {name: value for name, value in values.items() if name in model.model_fields}


def build_spec(
    processed: ObjectStore,
    models: ObjectStore,
    dataset_digest: str,
    *,
    recipe: str,
    overrides: Mapping[str, Any],
    execution: Mapping[str, Any],
    seed: int,
    mlflow: MlflowTarget | None,
    data_set: str = DEFAULT_NAME,
    start_from: str | None = None,
    other_models: Sequence[ObjectStore] = (),
) -> JobSpec:
    """The job that Dagster and the other pipelines run. Raises ConfigError naming the invalid recipe or field.

    A recipe is fitted to few training images, and must fit the dataset as `JobSpec.check_dataset` says. `start_from` is
    what `find_start` takes; a model may be in one of the other stores too.
    """
    num_images = read_processed(processed, dataset_digest).count("train")
    given = {name for name, value in overrides.items() if value is not None}
    chosen = get_recipe(recipe, overrides).fitted(num_images, given)
    if chosen.needs_start and not start_from:
        raise ConfigError(
            f"Recipe {chosen.name!r} with freeze {chosen.freeze} and body_rate {chosen.body_rate} continues from other "
            "weights: set start_from, or choose another recipe."
        )
    start = find_start(start_from, (models, *other_models), chosen) if start_from else None
    fields = set_fields("execution", execution, Execution.model_fields)
    try:
        spec = JobSpec(
            data_set=data_set,
            dataset_uri=processed.at(dataset_digest).uri(),
            dataset_digest=dataset_digest,
            recipe=chosen,
            seed=seed,
            start=start,
            output_uri=models.uri(),
            mlflow=mlflow,
            write_baseline_copies=data_set == DEFAULT_NAME,
            execution=Execution(**fields),
        )
    except ValidationError as error:
        raise ConfigError(f"The training's settings are not valid: {error}") from error
    spec.check_dataset(processed)
    return spec


def parse_spec(text: str | bytes, source: str) -> JobSpec:
    """The job spec in a JSON document. Raises ConfigError naming the source and every invalid field."""
    try:
        return JobSpec.model_validate_json(text)
    except ValidationError as error:
        problems = "; ".join(
            f"{'.'.join(map(str, problem['loc'])) or 'document'}: {problem['msg']}" for problem in error.errors()
        )
        raise ConfigError(f"Job spec from {source} is not valid: {problems}.") from error


def json_object(option: str, text: str) -> dict[str, Any]:
    """The JSON object in a command's option. Raises ConfigError."""
    try:
        return TypeAdapter(dict[str, Any]).validate_json(text)
    except ValidationError as error:
        raise ConfigError(f"--{option} is {text!r}: expected a JSON object such as {{}}.") from error
