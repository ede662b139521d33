"""The classes and sizes that a source declares, and what a data set makes of them."""

from typing import Literal

from pydantic import BaseModel, ConfigDict

from cifar_assets.contracts import CLASSES, ImageRequest, ImageSpec
from cifar_assets.dataset.formats.images import SOURCE_LIMITS, ImageError, open_picture
from resources.errors import DataError

MAX_CLASSES = 1_000
_LEAST_SIZE, _USUAL_SIZE = 16, 64
_NAMED = 10


class Survey(BaseModel):
    """The class names that a file declares, and the sizes of its pictures."""

    model_config = ConfigDict(extra="forbid")

    version: Literal[2] = 2  # in the first format, the highest label was that of the first rows
    classes: tuple[str, ...] | None = None
    highest_label: int = -1
    """Of a file without class names; -1 if it is not known."""
    smallest: tuple[int, int] | None = None
    """Width and height of the picture with the fewest pixels."""
    largest: tuple[int, int] | None = None

    def add(self, data: bytes) -> None:
        """Count a picture in. One that cannot be read is not counted: reading its row says why."""
        try:
            picture = open_picture(data, SOURCE_LIMITS)
        except ImageError:
            return
        size = picture.width, picture.height
        self.smallest = min(self.smallest or size, size, key=_order)
        self.largest = max(self.largest or size, size, key=_order)


def settle(
    wanted: ImageRequest, found: Survey, given: tuple[str, ...] | None, name: str, kind: str
) -> tuple[ImageSpec, list[str]]:
    """The images that a request makes of a source, and what was assumed. DataError if the source has other classes."""
    assumed: list[str] = []
    declared = given or found.classes
    classes = wanted.classes or declared
    if classes is None:
        classes, sentence = _unnamed_classes(found.highest_label, name)
        assumed.append(sentence)
    elif wanted.classes is None:
        shown = ", ".join(classes[:_NAMED]) + (", ..." if len(classes) > _NAMED else "")
        origin = "from the folder names" if kind == "images" else "as the source names them"
        assumed.append(f"{len(classes)} classes, {origin}: {shown}")
    check_classes(classes, declared, name)
    size = wanted.image_size
    if size is None:
        size, sentence = _own_size(found, wanted.fit)
        assumed.append(sentence)
    return ImageSpec(classes=classes, image_size=size, fit=wanted.fit), assumed


def check_classes(classes: tuple[str, ...], declared: tuple[str, ...] | None, where: str) -> None:
    """DataError if a file declares other classes than these, or if these cannot be told apart."""
    if declared is not None and declared != classes:
        raise DataError(
            f"{where} declares the classes {_shown(declared)}; expected {_shown(classes)}. Labels would mean other "
            "classes."
        )
    is_clear = len(set(classes)) == len(classes) and all(name.strip() for name in classes)
    if not is_clear or not 2 <= len(classes) <= MAX_CLASSES:
        raise DataError(
            f"{where}: expected 2 to {MAX_CLASSES:,} class names that are different and not empty, got "
            f"{_shown(classes)}. Correct them in the source."
        )


def _unnamed_classes(highest_label: int, name: str) -> tuple[tuple[str, ...], str]:
    if highest_label == len(CLASSES) - 1:
        return CLASSES, f"labels 0 to {highest_label} without names in the source: the classes are those of CIFAR-10"
    if not 1 <= highest_label < MAX_CLASSES:
        found = f"its highest label is {highest_label}" if highest_label >= 0 else "it has no labels"
        raise DataError(
            f"{name} does not name its classes, and {found}; expected 2 to {MAX_CLASSES:,} classes. Correct the "
            "labels, or declare `classes`."
        )
    classes = tuple(map(str, range(highest_label + 1)))
    return classes, f"{len(classes)} classes without names in the source: they are called 0 to {highest_label}"


def _own_size(found: Survey, fit: str) -> tuple[int, str]:
    if found.smallest is None or found.largest is None:
        return _USUAL_SIZE, f"pictures are scaled to {_USUAL_SIZE}x{_USUAL_SIZE}"
    (width, height), (largest_width, largest_height) = found.smallest, found.largest
    if found.smallest == found.largest and _LEAST_SIZE <= width == height <= _USUAL_SIZE:
        return width, f"pictures keep their size of {width}x{height}"
    range_ = f"{width}x{height}"
    if found.smallest != found.largest:
        range_ += f" to {largest_width}x{largest_height}"
    how = "cropped to squares" if fit == "crop" else "padded to squares"
    return _USUAL_SIZE, f"pictures of {range_} are {how} and scaled to {_USUAL_SIZE}x{_USUAL_SIZE}"


def _shown(classes: tuple[str, ...]) -> str:
    return f"({', '.join(map(repr, classes[:_NAMED]))}{', ...' if len(classes) > _NAMED else ''})"


def _order(size: tuple[int, int]) -> tuple[int, int]:
    return size[0] * size[1], size[0]
