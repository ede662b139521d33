"""Derives the format, class and split of a file from its name."""

import re
from pathlib import PurePosixPath

from cifar_assets.contracts import CLASSES

ARCHIVE_SUFFIXES = (".tar.gz", ".tgz", ".tar")
PICTURE_SUFFIXES = (".png", ".jpg", ".jpeg", ".jfif", ".bmp", ".gif", ".webp", ".tif", ".tiff", ".avif", ".heic")
"""File name suffixes of pictures, including those of refused formats: such a file is an error, not ignored."""

_TEST = re.compile(r"(^|/)test(/|([-_.]?\d+([-_.]of[-_.]\d+)?([-_.][0-9a-f]{16})?)?\.parquet$)")


def suffix_of(name: str) -> str:
    """The file name's suffix in lower case, `.tar.gz` as one."""
    lower = name.lower()
    return next((suffix for suffix in ARCHIVE_SUFFIXES if lower.endswith(suffix)), PurePosixPath(lower).suffix)


def is_test(name: str) -> bool:
    """Whether a path names test data: in a folder `test/`, or `test.parquet`, `test-00000-of-00001.parquet`."""
    return bool(_TEST.search(name.lower()))


def class_of(name: str) -> int | None:
    """The label from the nearest parent folder with a class name, or None."""
    return next((CLASSES.index(part) for part in reversed(name.lower().split("/")[:-1]) if part in CLASSES), None)
