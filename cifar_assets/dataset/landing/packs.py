"""Landed images packed into objects, a few dozen in each: a new image makes one small pack written again, not all."""

import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Literal

import numpy as np
from pydantic import BaseModel

from cifar_assets.dataset.formats.encoded import pack_images
from cifar_assets.dataset.index import ObjectIndex, save_index
from cifar_assets.dataset.landing.landed import LandedImage
from cifar_assets.dataset.objects import RawObject, is_stored, read_state, store_object
from cifar_assets.dataset.versions.grouping import grouped
from resources.digests import sha256_file, sha256_json
from resources.errors import IntegrityError, ObjectChangedError
from resources.object_store import ObjectStore

PACKS_PREFIX = "packs/"


class PackState(BaseModel):
    """The object that a set of images was packed into, so that they need not be read again."""

    version: Literal[1] = 1
    item: RawObject


def pack_landed_images(raw: ObjectStore, images: Sequence[LandedImage], resize: bool) -> list[RawObject]:
    """Objects that hold the images; the same ones for the same images, however they landed.

    ObjectChangedError for an image that is no longer the one that was judged: the next build judges it again.
    """
    groups = grouped(images, lambda image: image.sha256, lambda image: 1)
    return [_pack(raw, sorted(group, key=lambda image: image.member), resize) for group in groups]


def _pack(raw: ObjectStore, images: Sequence[LandedImage], resize: bool) -> RawObject:
    state_key = f"{PACKS_PREFIX}{sha256_json([image.member for image in images])}.json"
    state = read_state(raw, state_key, PackState)
    if state and is_stored(raw, state.item.key, state.item.sha256, state.item.size):
        return state.item
    with tempfile.TemporaryDirectory(prefix="cifar-pack-") as folder:
        path = Path(folder, "images.tar")
        pack_images(path, ((image.member, _read(raw, image)) for image in images))
        sha256 = sha256_file(path)
        item = RawObject(
            key=store_object(raw, path, sha256, ".tar"),
            sha256=sha256,
            size=path.stat().st_size,
            format="images",
            role="landed",
            split="train",
            rows=len(images),
        )
    save_index(raw, sha256, "train", resize, _index(images))
    raw.write(state_key, PackState(item=item).model_dump_json().encode())
    return item


def _index(images: Sequence[LandedImage]) -> ObjectIndex:
    """The pack's index, from what was found out about each image when it was judged."""
    parts = [image.index() for image in images]
    digests, labels, splits = (
        np.concatenate([getattr(part, name) for part in parts]) for name in ("digests", "labels", "splits")
    )
    return ObjectIndex(digests, labels, splits, {})


def _read(raw: ObjectStore, image: LandedImage) -> bytes:
    try:
        return raw.read_verified(image.key, image.sha256)
    except IntegrityError as error:
        raise ObjectChangedError(
            f"{raw.uri(image.key)} was replaced while it was being packed: build the raw dataset again.", transient=True
        ) from error
