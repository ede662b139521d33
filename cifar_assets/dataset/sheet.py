"""A picture of sample images: one row per class."""

import io

import numpy as np
from PIL import Image, ImageDraw

from cifar_assets.contracts import CLASSES, IMAGE_SIZE
from cifar_assets.dataset.versions.reader import SplitReader

_SCALE = 2
_GAP = 2
_LABEL_WIDTH = 84
_CELL = IMAGE_SIZE * _SCALE + _GAP


def sample_sheet(reader: SplitReader, per_class: int = 10) -> bytes:
    """A PNG with the first images of each class, labelled. The same version gives the same picture."""
    sheet = Image.new("RGB", (_LABEL_WIDTH + per_class * _CELL, len(CLASSES) * _CELL), "white")
    draw = ImageDraw.Draw(sheet)
    for label, name in enumerate(CLASSES):
        top = label * _CELL
        draw.text((4, top + _CELL // 2 - 6), name, fill="black")
        chosen = np.flatnonzero(reader.labels == label)[:per_class]
        for column, image in enumerate(reader.take(chosen)):
            tile = Image.fromarray(np.ascontiguousarray(image.transpose(1, 2, 0)))
            side = IMAGE_SIZE * _SCALE
            sheet.paste(tile.resize((side, side), Image.Resampling.NEAREST), (_LABEL_WIDTH + column * _CELL, top))
    buffer = io.BytesIO()
    sheet.save(buffer, "PNG", optimize=True)
    return buffer.getvalue()
