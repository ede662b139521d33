"""Recipes: everything that determines the trained weights, apart from data and seed. No torch."""

import logging
from collections.abc import Collection, Iterable, Mapping
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from cifar_assets.contracts import Extended, ImageSpec
from resources.errors import ConfigError

_LOG = logging.getLogger(__name__)

Views = Literal["plain", "mirrored"]
Precision = Literal["auto", "float32", "bfloat16"]

DEFAULT_RECIPE = "fast"
_RENAMED = {"seed": "baseline"}
_SPEEDNET_MAP = 8
"""Pixels after its first layer that three stages can halve."""
_FEW_IMAGES, _LEAST_STEPS = 5000, 200
"""Recipes are made for 50,000 images. With fewer than a tenth, they take at least this number of steps."""
FULL_SIZE = 32
"""The image size that a recipe's numbers of pixels are for. They scale with the images."""


class ResolutionPhase(BaseModel):
    """A phase of the training with a fixed image size."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    start: float = Field(ge=0, lt=1, description="Fraction of the steps after which the phase begins.")
    size: int | None = Field(
        default=None,
        ge=8,
        le=FULL_SIZE,
        description="Height and width in pixels that images of 32 pixels are scaled down to, and others in proportion. "
        "Without it they stay.",
    )

    def size_of(self, image_size: int) -> int:
        """Height and width in pixels of images of this size."""
        if self.size is None or image_size == FULL_SIZE:
            return self.size or image_size
        return min(image_size, 4 * round(self.size * image_size / FULL_SIZE / 4))


class Recipe(Extended):
    """A complete description of a training. Each field can be overridden separately."""

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)
    added_fields = ("freeze", "body_rate")

    name: str = Field(
        min_length=1, max_length=60, description="The recipe's name in records; has no effect on the training."
    )
    network: Literal["resnet18", "speednet"] = Field(description="torchvision's ResNet-18, or a small, fast network.")
    width: int = Field(default=64, ge=4, le=256, description="Channels of the network's first stage.")
    widening: int = Field(
        default=4, ge=1, le=8, description="Channels of a speednet's later stages, in units of `width`."
    )
    depth: int = Field(default=2, ge=2, le=4, description="Convolutions in each stage of a speednet.")
    epochs: int = Field(ge=1, le=1000, description="Number of passes over the training images.")
    batch_size: int = Field(ge=2, le=8192, description="Images per optimizer step, summed over all processes.")
    resolutions: tuple[ResolutionPhase, ...] = Field(
        default=(ResolutionPhase(start=0),),
        description="Image sizes over the course of the training, in order of their start. Tests use the full size.",
    )
    optimizer: Literal["sgd", "muon"] = Field(
        default="sgd",
        description="muon: Muon for the convolutions, SGD for a ResNet's stem, the head, biases and batch norm.",
    )
    learning_rate: float = Field(gt=0, lt=3e38, description="Peak learning rate of Muon or, without it, of SGD.")
    head_learning_rate: float = Field(
        default=1e-4,
        gt=0,
        lt=3e34,
        description="With muon, SGD's peak learning rate for stem and head, divided by the batch size.",
    )
    bias_learning_rate: float = Field(
        default=1e-4,
        gt=0,
        lt=3e34,
        description="With muon, SGD's peak learning rate for biases and batch norm, divided by the batch size.",
    )
    schedule: Literal["cosine", "triangle"] = Field(
        default="triangle", description="How the learning rate falls to 0: as a half cosine, or linearly."
    )
    schedule_interval: Literal["step", "epoch"] = Field(default="step", description="When the learning rate changes.")
    warmup: float = Field(
        default=0.2, ge=0, lt=1, description="Fraction of the training in which the learning rate rises."
    )
    momentum: float = Field(default=0.9, ge=0, lt=1, description="Momentum of SGD.")
    nesterov: bool = Field(default=True, description="Use Nesterov momentum.")
    weight_decay: float = Field(default=5e-4, ge=0, lt=3e38, description="L2 penalty of SGD.")
    decay_norm_and_bias: bool = Field(default=False, description="Whether weight decay includes batch norm and biases.")
    label_smoothing: float = Field(
        default=0.0, ge=0, lt=1, description="Label smoothing: fraction of the target spread over all classes."
    )
    flip: Literal["none", "random", "alternating"] = Field(
        default="random", description="Mirroring: none, at random per image and epoch, or in every other epoch."
    )
    translate: int = Field(
        default=4, ge=0, le=16, description="Pixels an image of 32 may be shifted by in each direction."
    )
    padding: Literal["zero", "reflect"] = Field(default="reflect", description="Fill of the area beyond the edge.")
    cutout: int = Field(
        default=0,
        ge=0,
        le=FULL_SIZE,
        description="Side in pixels of the square blanked at a random place of an image of 32 pixels.",
    )
    batch_norm_momentum: float = Field(
        default=0.1, gt=0, le=1, description="Weight of the newest batch in the running statistics of batch norm."
    )
    precision: Precision = Field(
        default="auto", description="Precision of convolutions. auto: bfloat16 if the hardware supports it."
    )
    views: Views = Field(
        default="plain",
        description="Publish the logits of the image, or the mean with its mirror image's, at twice the cost.",
    )
    validate_every: int = Field(
        default=1, ge=1, description="Epochs between validations; the last epoch is always validated."
    )
    freeze: int = Field(
        default=0,
        ge=0,
        le=5,
        description="First stages of a ResNet that keep the weights of `start_from`: 1 the stem, 2 to 5 also layer1 to "
        "layer4.",
    )
    body_rate: float = Field(
        default=1.0,
        gt=0,
        le=1,
        description="Learning rates of all but the head, in units of their own. Below 1, it needs `start_from`.",
    )

    @property
    def needs_start(self) -> bool:
        """Whether it only makes sense with weights to start from."""
        return self.freeze > 0 or self.body_rate < 1

    @model_validator(mode="after")
    def _check_resolutions(self) -> "Recipe":
        starts = [phase.start for phase in self.resolutions]
        if not starts or starts[0] != 0 or sorted(set(starts)) != starts:
            raise ValueError(f"resolutions must begin with start 0 and have increasing starts, got {starts}")
        return self

    def reach(self, image_size: int) -> int:
        """Pixels that an image of this size may be shifted by."""
        return -(-self.translate * image_size // FULL_SIZE)

    def fitted(self, num_images: int, given: Collection[str] = ()) -> "Recipe":
        """This recipe for so many training images: for few, smaller batches and more epochs, so that it learns.

        Fields that were `given` stay.
        """
        if not 0 < num_images < _FEW_IMAGES:
            return self
        batch = self.batch_size if "batch_size" in given else min(self.batch_size, max(32, num_images // 8))
        epochs = self.epochs if "epochs" in given else max(self.epochs, -(-_LEAST_STEPS // -(-num_images // batch)))
        if (batch, epochs) != (self.batch_size, self.epochs):
            _LOG.info(
                "The dataset has only %d training images: recipe %s takes batches of %d instead of %d, and %d epochs "
                "instead of %d.",
                *(num_images, self.name, batch, self.batch_size, epochs, self.epochs),
            )
        return self.model_copy(update={"batch_size": batch, "epochs": epochs})

    def check_fits(self, images: ImageSpec, num_images: int | None = None) -> None:
        """Raise ConfigError if this recipe cannot train on these images, of which so many are for training."""
        num_classes = len(images.classes)
        if num_classes < 2:
            raise ConfigError(f"The dataset has {num_classes} class: a classifier needs at least two.")
        if num_images and num_images < num_classes:
            raise ConfigError(
                f"The dataset has {num_classes} classes and only {num_images} training images: add images to its "
                "source."
            )
        smallest = min(phase.size_of(images.image_size) for phase in self.resolutions)
        stride = stem_stride(images.image_size)
        least = stride * (_SPEEDNET_MAP - 1) + stride + 1
        if self.network == "speednet" and smallest < least:
            raise ConfigError(
                f"Recipe {self.name!r} trains at {smallest} pixels; for images of {images.image_size} pixels, a "
                f"speednet needs at least {least}. Choose the network resnet18, or larger images."
            )


def stem_stride(image_size: int) -> int:
    """Stride of a speednet's first layer, so that its stages see large images as they see those of 32 pixels."""
    return max(1, round(image_size / FULL_SIZE))


# In the manner of airbench (Jordan, arXiv:2404.00498); the learning rates suit a training of any length.
_SPEEDNET = {
    "network": "speednet",
    "depth": 3,
    "batch_size": 1000,
    "resolutions": [{"start": 0, "size": 24}, {"start": 0.6}],
    "optimizer": "muon",
    "learning_rate": 0.16,
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
_RESNET18 = {
    "network": "resnet18",
    "epochs": 5,
    "batch_size": 512,
    "optimizer": "muon",
    "learning_rate": 0.14,
    "warmup": 0.1,
    "label_smoothing": 0.1,
    "flip": "alternating",
    "translate": 2,
    "views": "mirrored",
    "validate_every": 5,
}
_FINETUNE = {**_RESNET18, "body_rate": 0.1}
# The configuration of the pipeline that this project replaces.
_BASELINE = {
    "network": "resnet18",
    "epochs": 10,
    "batch_size": 32,
    "learning_rate": 0.01,
    "schedule": "cosine",
    "schedule_interval": "epoch",
    "warmup": 0.0,
    "nesterov": False,
    "decay_norm_and_bias": True,
    "padding": "zero",
    "precision": "float32",
}
_SHORT = {**_SPEEDNET, "depth": 2, "batch_size": 500, "learning_rate": 0.18}
_LARGE = {"width": 96, "widening": 4, "head_learning_rate": 4.5e-6, "cutout": 8}

RECIPES: dict[str, Recipe] = {
    name: Recipe.model_validate({"name": name, **fields})
    for name, fields in {
        "baseline": _BASELINE,
        "resnet18": _RESNET18,
        "finetune": _FINETUNE,
        "quick": {**_SHORT, "epochs": 3, "validate_every": 3},
        "fast": {**_SHORT, "epochs": 5, "validate_every": 5},
        "good": {**_SPEEDNET, "epochs": 8, "learning_rate": 0.18},
        "better": {**_SPEEDNET, "epochs": 14},
        "best": {**_SPEEDNET, "epochs": 18, "learning_rate": 0.2, **_LARGE},
    }.items()
}


def set_fields(setting: str, given: Mapping[str, Any], allowed: Iterable[str]) -> dict[str, Any]:
    """The fields that have a value: null means left out. ConfigError names those that cannot be set there."""
    if unknown := sorted(set(given) - set(allowed)):
        raise ConfigError(f"{setting}: {', '.join(unknown)} cannot be set. Choose from {', '.join(sorted(allowed))}.")
    return {name: value for name, value in given.items() if value is not None}


def get_recipe(name: str, overrides: Mapping[str, Any] | None = None) -> Recipe:
    """A recipe by name, with fields replaced. Raises ConfigError naming the choices, or the invalid field."""
    if name in _RENAMED:
        _LOG.warning("The recipe %r is now called %r: change the name in your config.", name, _RENAMED[name])
        name = _RENAMED[name]
    if name not in RECIPES:
        raise ConfigError(f"Recipe {name!r} does not exist: choose one of {', '.join(sorted(RECIPES))}.")
    fields = set_fields("overrides", overrides or {}, Recipe.model_fields.keys() - {"name"})
    try:
        return Recipe.model_validate({**RECIPES[name].model_dump(), **fields})
    except ValidationError as error:
        raise ConfigError(f"Recipe {name!r} with {fields} is not valid: {error}") from error
