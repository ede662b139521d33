"""Pictures of sample images."""

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageDraw

from cifar_assets.dataset.formats.images import png_bytes, to_pillow
from cifar_assets.dataset.versions.reader import SplitReader

_SCALE = 2
_MAX_SIDE = 64
_MAX_CLASS_ROWS = 20
_GAP = 2
_LABEL_WIDTH = 84
_CAPTION_HEIGHT = 14
_MAX_CAPTIONS = 200


def sample_sheet(reader: SplitReader, per_class: int = 10) -> bytes:
    """A PNG with the first images of each class, labeled. The same version gives the same picture.

    Of many classes, the first image of each of up to 200.
    """
    classes, side = reader.manifest.classes, min(reader.manifest.image_size * _SCALE, _MAX_SIDE)
    if len(classes) > _MAX_CLASS_ROWS:
        firsts = [np.flatnonzero(reader.labels == label)[:1] for label in range(min(len(classes), _MAX_CAPTIONS))]
        images = [reader.take(first)[0] if len(first) else None for first in firsts]
        return captioned_sheet(images, classes[: len(images)])
    cell = side + _GAP
    sheet = Image.new("RGB", (_LABEL_WIDTH + per_class * cell, len(classes) * cell), "white")
    draw = ImageDraw.Draw(sheet)
    for label, name in enumerate(classes):
        top = label * cell
        draw.text((4, top + cell // 2 - 6), name, fill="black")
        chosen = np.flatnonzero(reader.labels == label)[:per_class]
        for column, image in enumerate(reader.take(chosen)):
            sheet.paste(_tile(image, side), (_LABEL_WIDTH + column * cell, top))
    return png_bytes(sheet)


def captioned_sheet(images: Sequence[NDArray[np.uint8] | None], captions: Sequence[str], columns: int = 10) -> bytes:
    """A PNG with the images (3, size, size), each above its caption. An image of None stays white."""
    side = min(max((image.shape[1] for image in images if image is not None), default=32) * _SCALE, _MAX_SIDE)
    width, height = side + 3 * _GAP, side + _CAPTION_HEIGHT
    sheet = Image.new("RGB", (columns * width, -(-len(images) // columns) * height), "white")
    draw = ImageDraw.Draw(sheet)
    for number, (image, caption) in enumerate(zip(images, captions, strict=True)):
        place = (number % columns * width, number // columns * height)
        if image is not None:
            sheet.paste(_tile(image, side), place)
        draw.text((place[0], place[1] + side), caption[:11], fill="black")
    return png_bytes(sheet)


def _tile(image: NDArray[np.uint8], side: int) -> Image.Image:
    tile = to_pillow(image)
    return tile.resize((side, side), Image.Resampling.NEAREST if side >= tile.width else Image.Resampling.BICUBIC)
