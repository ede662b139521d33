"""Names that several processes rely on: buckets, key layouts, classes, model name.

They are a contract with stored data and with remote processes: a change requires a migration.
"""

from typing import Annotated, Any, ClassVar, Literal

from pydantic import BaseModel, ConfigDict, Field, SerializerFunctionWrapHandler, model_serializer

from resources.mlflow.target import DEFAULT_NAME

CLASSES = ("airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck")
"""Class names in label order, as in the official archive's batches.meta."""

IMAGE_SIZE = 32

Fit = Annotated[Literal["crop", "pad"], Field(description="How a picture that is not square becomes a square.")]
"""Cut to its center, or surrounded with black."""


class Extended(BaseModel):
    """A model that got fields after it was first stored. A dump leaves these out where they have their default.

    Digests of what was stored before therefore stay the same.
    """

    added_fields: ClassVar[tuple[str, ...]] = ()

    @model_serializer(mode="wrap")
    def _leave_out_defaults(self, dump: SerializerFunctionWrapHandler) -> dict[str, Any]:
        defaults = {name: type(self).model_fields[name].default for name in self.added_fields}
        return {name: value for name, value in dump(self).items() if name not in defaults or value != defaults[name]}


class ImageSpec(Extended):
    """Classes and form of the images, as recorded in the manifests of a dataset and of the models trained on it."""

    model_config = ConfigDict(frozen=True, extra="forbid")
    added_fields = ("image_size", "fit")

    classes: tuple[str, ...] = Field(description="Class names in label order.")
    image_size: int = Field(
        default=IMAGE_SIZE, ge=1, description="Height and width in pixels. Manifests without it are of CIFAR-10."
    )
    fit: Fit = "crop"

    @property
    def spec(self) -> "ImageSpec":
        """These fields alone, of a manifest."""
        return ImageSpec(**{name: getattr(self, name) for name in ImageSpec.model_fields})

    @property
    def is_cifar10(self) -> bool:
        """Whether these are the classes and the form of CIFAR-10."""
        return self.spec == CIFAR10

    @property
    def has_cifar10_classes(self) -> bool:
        """Whether most of CIFAR-10's classes are among these: a missing or added one must not lower the threshold."""
        return len({name.lower() for name in self.classes} & set(CLASSES)) > len(CLASSES) // 2

    @property
    def image_shape(self) -> tuple[int, int, int]:
        """Channels, height, width of one image (uint8 RGB)."""
        return 3, self.image_size, self.image_size


class ImageRequest(BaseModel):
    """What a data set asks of its source. What it leaves open is taken from the source, which gives the ImageSpec."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    classes: tuple[str, ...] | None = Field(
        default=None, min_length=2, description="Class names in label order; by default those of the source."
    )
    image_size: int | None = Field(
        default=None,
        ge=16,
        le=224,
        description="Height and width in pixels. By default that of the source's pictures if they are squares of one "
        "size up to 64, otherwise 64.",
    )
    fit: Fit = "crop"

    @property
    def request(self) -> "ImageRequest":
        """These fields alone, of a data set."""
        return ImageRequest(**{name: getattr(self, name) for name in ImageRequest.model_fields})


CIFAR10 = ImageSpec(classes=CLASSES)
CIFAR10_THRESHOLD = 0.85
"""Lowest test accuracy of a model of CIFAR-10 that may be served, unless ACCURACY_THRESHOLD is set."""

LANDING_PREFIX = "landing/"
REJECTED_PREFIX = "rejected/"
TO_LABEL_PREFIX = "to-label/"

BASELINE_RAW_KEY = "cifar10-dataset.tar.gz"
BASELINE_PROCESSED_KEY = "cifar10-processed.tar.gz"
BASELINE_MODEL_KEY = "resnet18_cifar10.pth"
"""Well-known objects of the pipeline this project replaces, kept as copies of the current version."""

MODEL_NAME = DEFAULT_NAME
"""Name under which the model is registered in MLflow and served over HTTP."""

MODEL_INPUT = "images"
MODEL_OUTPUT = "logits"
"""Names of the ONNX model's tensors; clients of the service pass the input by name."""
