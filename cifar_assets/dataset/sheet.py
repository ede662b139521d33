"""A picture of sample images: one row per class."""

import io

import numpy as np
from PIL import Image, ImageDraw

from cifar_assets.dataset.versions.reader import SplitReader

_SCALE = 2
_GAP = 2
_LABEL_WIDTH = 84


def sample_sheet(reader: SplitReader, per_class: int = 10) -> bytes:
    """A PNG with the first images of each class, labeled. The same version gives the same picture."""
    classes, side = reader.manifest.classes, reader.manifest.image_size * _SCALE
    cell = side + _GAP
    sheet = Image.new("RGB", (_LABEL_WIDTH + per_class * cell, len(classes) * cell), "white")
    draw = ImageDraw.Draw(sheet)
    for label, name in enumerate(classes):
        top = label * cell
        draw.text((4, top + cell // 2 - 6), name, fill="black")
        chosen = np.flatnonzero(reader.labels == label)[:per_class]
        for column, image in enumerate(reader.take(chosen)):
            tile = Image.fromarray(np.ascontiguousarray(image.transpose(1, 2, 0)))
            sheet.paste(tile.resize((side, side), Image.Resampling.NEAREST), (_LABEL_WIDTH + column * cell, top))
    buffer = io.BytesIO()
    sheet.save(buffer, "PNG", optimize=True)
    return buffer.getvalue()
