"""Recorded pictures that are worth a label, as a batch for `python -m cifar_assets.labelling`."""

from collections.abc import Sequence
from collections.abc import Set as AbstractSet
from datetime import UTC, datetime
from typing import Any

import dagster as dg
import numpy as np
from numpy.typing import NDArray
from pydantic import Field

from cifar_assets.assets import metadata
from cifar_assets.assets.binding import data_set_asset
from cifar_assets.assets.common import retrying_infrastructure_faults
from cifar_assets.assets.keys import SERVED_TRAFFIC, key_of
from cifar_assets.assets.record import VERSION_METADATA, evaluations, materialized_digest
from cifar_assets.checks.drift import DRIFTED
from cifar_assets.data_set import DataSet
from cifar_assets.dataset.formats.images import pixel_digest, png_bytes, to_pillow
from cifar_assets.dataset.sheet import captioned_sheet
from cifar_assets.labelling.batches import (
    Batch,
    Label,
    Picture,
    Reason,
    land_feedback,
    pictures_known,
    pictures_labeled,
    write_batch,
)
from cifar_assets.traffic.records import Feedback, Place, Traffic, read_window
from resources.object_store import ObjectStore
from resources.object_store.resource import ObjectStoreResource


class PicturesToLabelConfig(dg.Config):
    """How much there is to label."""

    num_pictures: int = Field(
        default=50, ge=1, le=1000, description="Most pictures of a batch; up to half of them because they drifted."
    )


@data_set_asset(group="monitoring", kinds={"s3"}, tags={"layer": "monitoring"}, deps=[SERVED_TRAFFIC])
def pictures_to_label(
    data_set: DataSet,
    context: dg.AssetExecutionContext,
    config: PicturesToLabelConfig,
    object_store: ObjectStoreResource,
) -> dg.MaterializeResult:
    """A batch of recorded pictures: those that drifted according to the check, and the least certain ones.

    Pictures of earlier batches are left out. Those whose class a program told the server land with that label instead.
    In a run that also materializes `served_traffic`, this waits for the check.
    """
    with retrying_infrastructure_faults():
        raw, traffic_key = object_store.raw, key_of(data_set, SERVED_TRAFFIC)
        window = materialized_digest(context, traffic_key)
        by_model = read_window(object_store.traffic, window)
        told = land_told(raw, by_model)
        drifted = [place for place in _drifted(context.instance, traffic_key, window) if place not in told]
        name = f"{datetime.now(UTC):%Y-%m-%dT%H%M%S}"
        chosen = choose(by_model[-1], drifted, told, pictures_known(raw), config.num_pictures) if by_model else []
        pictures = [picture for picture, _ in chosen]
        if pictures:
            info = by_model[-1].info
            batch = Batch(model_digest=info.model_digest, classes=info.images.classes, pictures=tuple(pictures))
            write_batch(raw, name, batch, [png_bytes(to_pillow(image)) for _, image in chosen])
        command = "python -m cifar_assets.labelling"
        if not data_set.is_default:
            command += f" --data-set {data_set.name}"
        captions = [f"{each.guess} {each.confidence:.0%}" for each in pictures]
        return dg.MaterializeResult(
            data_version=dg.DataVersion(name if pictures else "none"),
            metadata={
                "num_pictures": len(pictures),
                "num_drifted": sum(each.reason == "drifted" for each in pictures),
                "num_landed_from_feedback": len(told),
                "next": command if pictures else "nothing to label",
                "pictures": metadata.picture("", lambda: captioned_sheet([image for _, image in chosen], captions)),
            },
        )


def choose(
    traffic: Traffic, drifted: Sequence[Place], told: AbstractSet[Place], known: AbstractSet[str], num_pictures: int
) -> list[tuple[Picture, NDArray[np.uint8]]]:
    """Pictures with their pixels, no two of them the same. Not those whose class was told, or whose file is known."""
    classes, probabilities, places = traffic.info.images.classes, traffic.probabilities, traffic.places
    row_of = {place: row for row, place in enumerate(places)}
    found: dict[str, tuple[Picture, NDArray[np.uint8]]] = {}

    def add(rows: Sequence[int], reason: Reason, limit: int) -> None:
        for row in rows:
            image = None if len(found) == limit or places[row] in told else traffic.image(row)
            if image is None or (file := f"{pixel_digest(image)}.png") in known | found.keys():
                continue
            request_id, index = places[row]
            guess, confidence = classes[probabilities[row].argmax()], float(probabilities[row].max())
            picture = Picture(
                file=file, request_id=request_id, index=index, guess=guess, confidence=confidence, reason=reason
            )
            found[file] = picture, image

    add([row_of[place] for place in drifted if place in row_of], "drifted", num_pictures // 2)
    add(np.argsort(probabilities.max(axis=1), kind="stable").tolist(), "uncertain", num_pictures)
    return list(found.values())


def _drifted(instance: dg.DagsterInstance, traffic: dg.AssetKey, window: str) -> list[Place]:
    """Places that the newest evaluation of the check names; none if that is of another window."""
    found = next((each.metadata for each, _ in evaluations(instance, dg.AssetCheckKey(traffic, "drift"))), {})
    if DRIFTED not in found or found[VERSION_METADATA].value != window:
        return []
    value: Any = found[DRIFTED].value
    return [(request_id, index) for request_id, index in value]


def land_told(raw: ObjectStore, by_model: Sequence[Traffic]) -> set[Place]:
    """Land the recorded pictures that have feedback; returns their places.

    If the same pixels have several labels, the last one counts. Left out are pixels that a person labeled in a batch,
    labels that are not among the classes, and records of models with other classes or another image size.
    """
    if not by_model:
        return set()
    images, by_person = by_model[-1].info.images, pictures_labeled(raw)
    told = {
        each.place: each
        for each in sorted((each for traffic in by_model for each in traffic.info.feedback), key=lambda each: each.time)
        if each.label in images.classes
    }
    found: list[tuple[Feedback, str, NDArray[np.uint8]]] = []
    for traffic in by_model:
        rows = enumerate(traffic.places) if traffic.info.images == images else ()
        for row, place in rows:
            image = traffic.image(row) if place in told else None
            if image is not None and (file := f"{pixel_digest(image)}.png") not in by_person:
                found.append((told[place], file, image))
    last = {file: (feedback, image) for feedback, file, image in sorted(found, key=lambda each: each[0].time)}
    for file, (feedback, image) in last.items():
        label = Label(label=feedback.label, by="feedback", time=datetime.fromtimestamp(feedback.time, UTC))
        land_feedback(raw, file, images.classes, (png_bytes(to_pillow(image)), feedback.request_id, label))
    return {feedback.place for feedback, _, _ in found}
