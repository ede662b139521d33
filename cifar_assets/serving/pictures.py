"""The pictures of one request: what they will cost is known before the first one is decoded."""

import numpy as np
from numpy.typing import NDArray

from cifar_assets.dataset.formats.images import (
    ImageError,
    ImageTooLargeError,
    Picture,
    check_size,
    open_picture,
    picture_pixels,
)
from cifar_assets.serving.faults import RequestError
from cifar_assets.serving.settings import ServingLimits


class Pictures:
    """Pictures in the order of the request, pixels already or files still to be decoded."""

    def __init__(self, limits: ServingLimits):
        self.num_pixels = 0
        """Of the files; what decoding them costs."""
        self._limits = limits
        self._items: list[tuple[str, NDArray[np.uint8] | Picture]] = []

    def add_pixels(self, field: str, pixels: NDArray[np.uint8]) -> None:
        """Add pixels of shape (3, 32, 32)."""
        self._items.append((field, pixels))

    def add_file(self, field: str, data: bytes) -> None:
        """Add a picture file. RequestError for one that is not admitted, or with which the request costs too much."""
        try:
            picture = open_picture(data, self._limits.image)
        except ImageError as error:
            raise _fault(field, error) from error
        self.num_pixels += picture.width * picture.height
        if self.num_pixels > self._limits.max_pixels:
            limit = f"at most {self._limits.max_pixels} pixels in all pictures of a request"
            raise RequestError(field, limit, f"{self.num_pixels} up to this one", status=413)
        self._items.append((field, picture))

    def check_file_size(self, field: str, num_bytes: int) -> None:
        """Refuse a file that will be too long, for callers that know the length before the bytes."""
        try:
            check_size(num_bytes, self._limits.image)
        except ImageError as error:
            raise _fault(field, error) from error

    def decode(self) -> NDArray[np.uint8]:
        """All images, shape (N, 3, 32, 32). RequestError for a file that cannot be decoded."""
        images = [_pixels(field, item) for field, item in self._items]
        return images[0][np.newaxis] if len(images) == 1 else np.stack(images)


def check_count(field: str, num_images: int, limits: ServingLimits) -> None:
    """Refuse a request without an image, or with too many."""
    if num_images == 0:
        raise RequestError(field, "at least one image", "none")
    if num_images > limits.max_images:
        raise RequestError(field, f"at most {limits.max_images} images", str(num_images), status=413)


def _pixels(field: str, item: NDArray[np.uint8] | Picture) -> NDArray[np.uint8]:
    if not isinstance(item, Picture):
        return item
    try:
        return picture_pixels(item)
    except ImageError as error:
        raise _fault(field, error) from error


def _fault(field: str, error: ImageError) -> RequestError:
    status = 413 if isinstance(error, ImageTooLargeError) else 400
    return RequestError(field, error.expected, error.received, status=status)
