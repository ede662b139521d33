"""Recipes: everything that decides what weights a training ends with, apart from its data and its seed. No torch."""

from collections.abc import Mapping
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from cifar_assets.contracts import IMAGE_SIZE
from resources.errors import ConfigError

Network = Literal["resnet18-imagenet", "resnet18", "speednet"]
Schedule = Literal["cosine", "triangle", "constant"]
Flip = Literal["none", "random", "alternating"]
Padding = Literal["zero", "reflect"]
Views = Literal["plain", "mirrored", "six"]
Precision = Literal["auto", "float32", "bfloat16"]


class ResolutionPhase(BaseModel):
    """From this part of the training on, images are trained on at this size."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    start: float = Field(
        ge=0, lt=1, description="Fraction of the steps after which the phase begins; 0 is the first step."
    )
    size: int = Field(ge=8, le=IMAGE_SIZE, description="Height and width in pixels that images are scaled down to.")


class Recipe(BaseModel):
    """A complete description of a training. Every field can be overridden on its own."""

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)

    name: str = Field(min_length=1, max_length=60, description="What the recipe is called in records; decides nothing.")
    network: Network = Field(
        description="resnet18-imagenet: torchvision's ResNet-18, 7x7 stride-2 stem and max pooling. resnet18: the same "
        "18 layers behind a 3x3 stride-2 stem without pooling. speednet: three stages of convolutions behind a "
        "whitening layer."
    )
    width: int = Field(
        default=64, ge=4, le=256, description="Channels of the network's first stage; later stages are multiples of it."
    )
    widening: int = Field(
        default=4, ge=1, le=8, description="Channels of a speednet's later stages, as a multiple of `width`."
    )
    depth: int = Field(default=2, ge=2, le=4, description="Convolutions in each stage of a speednet.")
    epochs: int = Field(ge=1, le=1000, description="Times that every training image is seen.")
    batch_size: int = Field(ge=2, le=8192, description="Images per optimizer step, over all processes together.")
    resolutions: tuple[ResolutionPhase, ...] = Field(
        default=(ResolutionPhase(start=0, size=IMAGE_SIZE),),
        description="Image sizes over the course of the training, in order of their start. Tests always use 32 pixels.",
    )
    optimizer: Literal["sgd", "muon"] = Field(
        default="sgd",
        description="muon: Muon for the convolutions, SGD for a ResNet's stem, the head, biases and batch norm.",
    )
    learning_rate: float = Field(
        gt=0,
        lt=3e38,
        description="Peak learning rate of Muon or, without it, of SGD, for the batch size of this recipe.",
    )
    head_learning_rate: float = Field(
        default=1e-4,
        gt=0,
        lt=3e34,
        description="With muon, SGD's peak rate for stem and head, divided by the batch size.",
    )
    bias_learning_rate: float = Field(
        default=1e-4,
        gt=0,
        lt=3e34,
        description="With muon, SGD's peak rate for biases and batch norm, divided by the batch size.",
    )
    muon_momentum: float = Field(default=0.6, gt=0, lt=1, description="Momentum of Muon.")
    schedule: Schedule = Field(
        default="triangle",
        description="How the rate falls after the warm-up: along half a cosine, in a straight line, or not at all.",
    )
    schedule_interval: Literal["step", "epoch"] = Field(
        default="step", description="Whether the rate changes with every step or only between epochs."
    )
    warmup: float = Field(
        default=0.2, ge=0, lt=1, description="Share of the training in which the rate rises in a straight line."
    )
    final_learning_rate: float = Field(
        default=0.0, ge=0, le=1, description="Rate at the end of the schedule, as a share of the peak."
    )
    momentum: float = Field(default=0.9, ge=0, lt=1, description="Momentum of SGD.")
    nesterov: bool = Field(default=True, description="Nesterov's form of momentum.")
    weight_decay: float = Field(default=5e-4, ge=0, lt=3e38, description="L2 penalty of SGD.")
    decay_norm_and_bias: bool = Field(
        default=False, description="Whether batch norm parameters and biases are decayed as well."
    )
    label_smoothing: float = Field(
        default=0.0, ge=0, lt=1, description="Share of the target spread evenly over the classes while training."
    )
    ema_decay: float = Field(
        default=0.0,
        ge=0,
        lt=1,
        description="Decay per step of the moving average of the weights; 0 publishes the last weights.",
    )
    ema_every: int = Field(default=5, ge=1, description="Steps between two updates of the moving average.")
    flip: Flip = Field(
        default="random",
        description="Mirroring: none, by an independent coin per image and epoch, or each image in every other epoch.",
    )
    translate: int = Field(
        default=4, ge=0, le=16, description="Pixels an image may be shifted by in each direction; a crop after padding."
    )
    padding: Padding = Field(default="reflect", description="What a shifted image shows beyond its edge.")
    cutout: int = Field(
        default=0,
        ge=0,
        le=IMAGE_SIZE,
        description="Side of the square blanked at a random place, at 32 pixels; 0 is none.",
    )
    batch_norm_momentum: float = Field(
        default=0.1, gt=0, le=1, description="Weight of the newest batch in the running statistics of batch norm."
    )
    precision: Precision = Field(
        default="auto",
        description="Arithmetic of convolutions while training. auto: bfloat16 where the processor has it in hardware.",
    )
    views: Views = Field(
        default="plain",
        description="Publish the mean of the logits over the plain image, over it and its mirror image, or over six "
        "views, those two and two shifts of them by a pixel. Multiplies the cost of a prediction.",
    )
    validate_every: int = Field(
        default=1, ge=1, description="Epochs between validations; the last is always validated."
    )

    @model_validator(mode="before")
    @classmethod
    def _read_first_form(cls, values: Any) -> Any:
        """Recipes stored before there were `views` say `test_time_flip`."""
        if isinstance(values, dict) and "test_time_flip" in values:
            values = dict(values)
            values.setdefault("views", "mirrored" if values.pop("test_time_flip") else "plain")
        return values

    @model_validator(mode="after")
    def _check_resolutions(self) -> "Recipe":
        starts = [phase.start for phase in self.resolutions]
        if not starts or starts[0] != 0 or sorted(set(starts)) != starts:
            raise ValueError(f"resolutions must begin with start 0 and have rising starts, got {starts}")
        return self

    def with_overrides(self, overrides: Mapping[str, Any]) -> "Recipe":
        """The recipe with some fields replaced. Raises ConfigError naming a field that is unknown or out of range."""
        try:
            return Recipe.model_validate({**self.model_dump(), **overrides})
        except ValidationError as error:
            raise ConfigError(f"Recipe {self.name!r} with {dict(overrides)} is not valid: {error}") from error


def _speed(name: str, epochs: int, **changes: Any) -> Recipe:
    """A recipe in the manner of airbench (Jordan, arXiv:2404.00498); its rates hold for any length of the training."""
    values = {
        "batch_size": 1000,
        "resolutions": [{"start": 0, "size": 24}, {"start": 0.6, "size": 32}],
        "optimizer": "muon",
        "learning_rate": 0.18,
        "head_learning_rate": 1e-5,
        "bias_learning_rate": 0.053,
        "warmup": 0.0,
        "momentum": 0.85,
        "weight_decay": 0.2,
        "label_smoothing": 0.2,
        "flip": "alternating",
        "translate": 2,
        "batch_norm_momentum": 0.4,
        "views": "mirrored",
        "validate_every": 4,
    }
    return Recipe.model_validate({"name": name, "network": "speednet", "epochs": epochs, **values, **changes})


DEFAULT_RECIPE = "fast"

RECIPES: dict[str, Recipe] = {
    recipe.name: recipe
    for recipe in (
        Recipe(
            name="seed",
            network="resnet18-imagenet",
            epochs=10,
            batch_size=32,
            learning_rate=0.01,
            schedule="cosine",
            schedule_interval="epoch",
            warmup=0.0,
            momentum=0.9,
            nesterov=False,
            weight_decay=5e-4,
            decay_norm_and_bias=True,
            flip="random",
            translate=4,
            padding="zero",
            precision="float32",
        ),
        Recipe(
            name="resnet18",
            network="resnet18-imagenet",
            epochs=5,
            batch_size=512,
            optimizer="muon",
            learning_rate=0.14,
            warmup=0.1,
            weight_decay=5e-4,
            label_smoothing=0.1,
            flip="alternating",
            translate=2,
            views="mirrored",
            validate_every=5,
        ),
        _speed("quick", epochs=3, batch_size=500, validate_every=3),
        _speed("fast", epochs=5, batch_size=500, depth=3, learning_rate=0.16, validate_every=5),
        _speed("good", epochs=8, depth=3),
        _speed("better", epochs=14, depth=3, learning_rate=0.16),
        _speed(
            "best",
            epochs=14,
            width=128,
            widening=3,
            depth=3,
            learning_rate=0.16,
            head_learning_rate=4.5e-6,
            cutout=8,
        ),
    )
}


def get_recipe(name: str, overrides: Mapping[str, Any] | None = None) -> Recipe:
    """A recipe by name, with fields replaced. Raises ConfigError naming the choices for an unknown name."""
    if name not in RECIPES:
        raise ConfigError(f"Recipe {name!r} does not exist: choose one of {', '.join(sorted(RECIPES))}.")
    return RECIPES[name].with_overrides(overrides or {})
