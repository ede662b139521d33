"""Derives the format, class and split of a file from its name."""

import re
from collections.abc import Iterable
from functools import lru_cache
from pathlib import PurePosixPath
from typing import Literal

from cifar_assets.contracts import CLASSES

ARCHIVE_SUFFIXES = (".tar.gz", ".tgz", ".tar")
PICTURE_SUFFIXES = (".png", ".jpg", ".jpeg", ".jfif", ".bmp", ".gif", ".webp", ".tif", ".tiff", ".avif", ".heic")
"""File name suffixes of pictures, including those of refused formats: such a file is an error, not ignored."""

SPLIT_FOLDERS: dict[str, Literal["train", "validation", "test"]] = {
    "train": "train",
    "validation": "validation",
    "valid": "validation",
    "val": "validation",
    "test": "test",
}
"""Names of folders of a split, in lower case."""
_MOST_OF_OTHERS = 5
"""Classes that another data set may share with CIFAR-10."""
_SPLIT = re.compile(
    rf"(?:^|(?<=/))({'|'.join(SPLIT_FOLDERS)})(?:/|(?:[-_.]?\d+(?:[-_.]of[-_.]\d+)?(?:[-_.][0-9a-f]{{16}})?)?\.parquet$)"
)


def suffix_of(name: str) -> str:
    """The file name's suffix in lower case, `.tar.gz` as one."""
    lower = name.lower()
    return next((suffix for suffix in ARCHIVE_SUFFIXES if lower.endswith(suffix)), PurePosixPath(lower).suffix)


def split_of(name: str) -> Literal["train", "validation", "test"] | None:
    """The split that a path names: with a folder `test/`, or as `test.parquet`, `test-00000-of-00001.parquet`."""
    named = {SPLIT_FOLDERS[word] for word in _SPLIT.findall(name.lower())}
    order: tuple[Literal["test", "validation", "train"], ...] = ("test", "validation", "train")
    return next((split for split in order if split in named), None)


def folder_name(name: str) -> str:
    """The name of a class as the name of a folder."""
    return name.replace("/", "_")


def class_of(name: str, classes: tuple[str, ...]) -> int | None:
    """The label from the nearest parent folder with a class name, or None. Case counts only where it must."""
    exact, lower = _labels_by_folder(classes)
    found = (exact.get(part, lower.get(part.lower())) for part in reversed(name.split("/")[:-1]))
    return next((label for label in found if label is not None), None)


@lru_cache
def _labels_by_folder(classes: tuple[str, ...]) -> tuple[dict[str, int], dict[str, int]]:
    exact = {folder_name(name): label for label, name in enumerate(classes)}
    return exact, {folder.lower(): label for folder, label in exact.items()}


def class_folders(names: Iterable[str]) -> tuple[str, ...]:
    """Class names of pictures in class folders, sorted: the first folder below those of a split or of all pictures.

    With more than five folders of CIFAR-10's names in any case and at any depth, it is CIFAR-10: all of its names.
    """
    paths = [name.split("/")[:-1] for name in names]
    if len({part.lower() for path in paths for part in path} & set(CLASSES)) > _MOST_OF_OTHERS:
        return CLASSES
    for number, path in enumerate(paths):
        splits = [place for place, part in enumerate(path) if part.lower() in SPLIT_FOLDERS]
        paths[number] = path[splits[-1] + 1 :] if splits else path
    paths = [path for path in paths if path]
    while paths and all(len(path) > 1 and path[0] == paths[0][0] for path in paths):
        paths = [path[1:] for path in paths]
    return tuple(sorted({path[0] for path in paths}))
