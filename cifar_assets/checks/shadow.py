"""How a model that is not served yet answers the pictures that the served model was sent."""

from collections import Counter
from datetime import UTC, datetime, timedelta

import dagster as dg
import numpy as np
from numpy.typing import NDArray
from pydantic import Field

from cifar_assets.assets.metadata import picture, table
from cifar_assets.contracts import ImageSpec
from cifar_assets.dataset.sheet import captioned_sheet
from cifar_assets.model_package import ONNX_FILE, read_file, read_manifest, verify_package
from cifar_assets.traffic.records import Traffic, read_traffic
from resources.object_store import ObjectStore
from resources.object_store.resource import ObjectStoreResource
from resources.verdict import Verdict

_BATCH_IMAGES = 64
_MAX_IMAGES = 2000
_NUM_PICTURES = 40
_NUM_ROWS = 20


class ShadowConfig(dg.Config):
    """Which recorded pictures a model answers, and how often it must agree."""

    hours: float = Field(default=24.0, gt=0, le=24 * 366, description="Pictures of so many hours before now.")
    min_images: int = Field(default=50, ge=1, description="With fewer distinct pictures, nothing is compared.")
    min_agreement: float = Field(
        default=0.8, ge=0, le=1, description="Lowest allowed fraction of pictures with the same predicted class."
    )


def judge_shadow(
    object_store: ObjectStoreResource, digest: str, config: ShadowConfig, public_keys: str | None = None
) -> Verdict:
    """Lets the model answer the distinct pictures, at most 2,000, that the served model got most recently.

    The record is replayed, so no client waits for a second answer and nothing runs beside the service. Raises
    IntegrityError for a damaged model, or one that none of the public keys verifies, and DataError if it does not load.
    """
    end = datetime.now(UTC) + timedelta(seconds=1)  # with what was just written
    start = end - timedelta(hours=config.hours)
    recorded = [each for each in read_traffic(object_store.traffic, start, end) if len(each)]
    if not recorded:
        return Verdict(True, "Not compared: nothing was recorded.")
    traffic = recorded[-1]
    if traffic.info.model_digest == digest:
        return Verdict(True, "Not compared: this is the model that was served.")
    rows = traffic.distinct_pictures()[-_MAX_IMAGES:]
    if len(rows) < config.min_images:
        text = f"Not compared: {len(rows)} distinct pictures were recorded, at least {config.min_images} are needed."
        return Verdict(True, text, {"num_images": len(rows)})
    images = np.stack([image for row in rows if (image := traffic.image(int(row))) is not None])
    spec, predicted = _predict(object_store.models, digest, public_keys, images)
    if spec != traffic.info.images:
        return Verdict(True, "Not compared: the served model has other classes or another image size.")
    return compare_models(traffic, rows, predicted, config.min_agreement)


def _predict(
    models: ObjectStore, digest: str, public_keys: str | None, images: NDArray[np.uint8]
) -> tuple[ImageSpec, NDArray[np.int64]]:
    """The model's classes and image size, and its predicted class of each image."""
    from cifar_assets.serving.classifier import Classifier  # onnxruntime is slow to import

    package = models.at(digest)
    manifest = read_manifest(package, digest)
    if public_keys:
        verify_package(package, digest, public_keys)
    candidate = Classifier(read_file(package, manifest, ONNX_FILE), manifest, source=package.uri(ONNX_FILE))
    spec = manifest.spec
    if images.shape[1:] != spec.image_shape:
        return spec, np.empty(0, np.int64)
    starts = range(0, len(images), _BATCH_IMAGES)
    return spec, np.concatenate(
        [candidate.run(images[start : start + _BATCH_IMAGES]).argmax(axis=1) for start in starts]
    )


def compare_models(
    traffic: Traffic, rows: NDArray[np.int64], predicted: NDArray[np.int64], min_agreement: float
) -> Verdict:
    """The verdict on the predicted classes for these rows of the traffic."""
    served = traffic.probabilities[rows].argmax(axis=1)
    differing = np.flatnonzero(served != predicted)
    classes = traffic.info.images.classes
    changes = Counter((classes[served[each]], classes[predicted[each]]) for each in differing)
    agreement = 1 - len(differing) / len(rows)
    numbers = {
        "num_images": len(rows),
        "agreement": agreement,
        "served_digest": traffic.info.model_digest,
        "changes": table(
            {"served": before, "candidate": after, "num_images": number}
            for (before, after), number in changes.most_common(_NUM_ROWS)
        ),
    }
    shown = differing[:_NUM_PICTURES]
    if len(shown):
        images = [traffic.image(int(rows[each])) for each in shown]
        captions = [f"{classes[served[each]][:5]}>{classes[predicted[each]][:5]}" for each in shown]
        numbers["pictures"] = picture(
            "pictures that are classified differently", lambda: captioned_sheet(images, captions)
        )
    text = (
        f"Predicts the same class as the served model {traffic.info.model_digest[:12]} for {agreement:.1%} of "
        f"{len(rows)} recorded pictures, at least {min_agreement:.0%} expected."
    )
    return Verdict(agreement >= min_agreement, text, numbers)
