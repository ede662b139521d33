"""The job spec: all that a training needs to know, as one JSON document. No torch."""

from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from cifar_assets.training.recipes import Recipe
from resources.digests import sha256_json
from resources.errors import ConfigError
from resources.trainer.contract import TrainingSpec

ALGORITHM = 3
"""Raised whenever the code changes what weights a recipe, data and seed give: old checkpoints are then not resumed."""


class Execution(BaseModel):
    """How a training runs on this machine. Decides nothing about what is trained beyond rounding."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    device: Literal["auto", "cpu", "cuda"] = Field(default="auto", description="auto takes a GPU where there is one.")
    threads: int | None = Field(
        default=None, ge=1, description="CPU threads per process; by default this process's part of the CPU limit."
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


class JobSpec(TrainingSpec):
    """One training job, complete: the same spec gives the same weights, wherever it runs."""

    model_config = ConfigDict(frozen=True, extra="forbid", hide_input_in_errors=True)

    dataset_uri: str = Field(description="URI of the processed dataset's folder, ending in its digest.")
    dataset_digest: str = Field(pattern=r"^[0-9a-f]{64}$", description="Digest of the processed dataset.")
    recipe: Recipe = Field(description="What to train and how, complete.")
    seed: int = Field(default=0, ge=0, lt=2**32, description="Decides initial weights, order and augmentation.")
    output_uri: str = Field(description="URI of the models bucket: the model goes to <output_uri>/<model digest>/.")
    write_baseline_copies: bool = Field(
        default=False, description="Also write the weights as resnet18_cifar10.pth, for readers of the old pipeline."
    )
    execution: Execution = Field(default_factory=Execution, description="How to run it here.")

    @model_validator(mode="before")
    @classmethod
    def _read_earlier_form(cls, values: Any) -> Any:
        """Translate a spec of an earlier release, as in a stored plan. Fields that are gone are dropped."""
        if not isinstance(values, dict) or "write_seed_copies" not in values or "recipe" not in values:
            return values
        if not isinstance(values["recipe"], dict) or not isinstance(values["recipe"].get("network"), str):
            return values  # as it is, to be refused field by field
        values = {**values, "write_baseline_copies": values["write_seed_copies"]}
        del values["write_seed_copies"]
        values["execution"] = _known_fields(Execution, values.get("execution") or {})
        recipe = {"views": "mirrored" if values["recipe"].get("test_time_flip") else "plain", **values["recipe"]}
        if recipe["network"] == "resnet18":
            raise ValueError("recipe.network: resnet18 with a 3x3 stem is not built any more: train by another recipe")
        recipe["network"] = recipe["network"].removesuffix("-imagenet")
        return values | {"recipe": _known_fields(Recipe, recipe)}

    @model_validator(mode="after")
    def _check_dataset_uri(self) -> "JobSpec":
        if self.dataset_uri.rstrip("/").rpartition("/")[2] != self.dataset_digest:
            raise ValueError(f"dataset_uri {self.dataset_uri!r} must end in dataset_digest {self.dataset_digest}")
        return self

    @property
    def name(self) -> str:
        return f"cifar10-{self.recipe.name}"

    @property
    def identity(self) -> str:
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


def _known_fields(model: type[BaseModel], values: dict[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in values.items() if name in model.model_fields}


def parse_spec(text: str | bytes, source: str) -> JobSpec:
    """The job spec in a JSON document. Raises ConfigError naming the source and every field that is wrong."""
    try:
        return JobSpec.model_validate_json(text)
    except ValidationError as error:
        problems = "; ".join(
            f"{'.'.join(map(str, problem['loc'])) or 'document'}: {problem['msg']}" for problem in error.errors()
        )
        raise ConfigError(f"Job spec from {source} is not valid: {problems}.") from error
