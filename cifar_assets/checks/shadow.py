"""How a model that is not served yet answers the pictures that the served model was sent."""

import math
import timeit
from collections import Counter
from collections.abc import Sequence
from contextlib import suppress
from datetime import UTC, datetime, timedelta
from typing import TYPE_CHECKING

import dagster as dg
import numpy as np
from numpy.typing import NDArray
from pydantic import Field

from cifar_assets.assets.metadata import picture, table
from cifar_assets.dataset.index import pixel_digests
from cifar_assets.dataset.sheet import captioned_sheet
from cifar_assets.dataset.versions.reader import open_split
from cifar_assets.labelling.batches import labels_given
from cifar_assets.model_package import ONNX_FILE, ModelManifest, read_file, read_manifest, verify_package
from cifar_assets.traffic.records import Traffic, read_traffic
from resources.errors import ExplainedError
from resources.object_store import ObjectStore
from resources.object_store.resource import ObjectStoreResource
from resources.verdict import Verdict

if TYPE_CHECKING:
    from cifar_assets.serving.classifier import Classifier

_BATCH_IMAGES = 64
_MAX_IMAGES = 2000
_NUM_PICTURES = 40
_NUM_ROWS = 20
_ALPHA = 0.05
"""A model that is right less often fails the check if chance explains that with a lower probability."""


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
    model, manifest = _load(object_store.models, digest, public_keys)
    if manifest.spec != traffic.info.images:
        return Verdict(True, "Not compared: the served model has other classes or another image size.")
    starts = range(0, len(images), _BATCH_IMAGES)
    predicted = [model.run(images[start : start + _BATCH_IMAGES]).argmax(axis=1) for start in starts]
    labels = _labels(object_store, recorded, rows, images, manifest)
    verdict = compare_models(traffic, rows, np.concatenate(predicted), labels, config.min_agreement)
    latency = {"latency_ms": _latency_ms(model, images[:1])}
    with suppress(ExplainedError):  # the served model may be gone from the store, or damaged
        served, _ = _load(object_store.models, traffic.info.model_digest, public_keys)
        latency["served_latency_ms"] = _latency_ms(served, images[:1])
    return Verdict(verdict.passed, verdict.reason, {**verdict.numbers, **latency})


def _load(models: ObjectStore, digest: str, public_keys: str | None) -> tuple["Classifier", ModelManifest]:
    from cifar_assets.serving.classifier import Classifier  # onnxruntime is slow to import

    package = models.at(digest)
    manifest = read_manifest(package, digest)
    if public_keys:
        verify_package(package, digest, public_keys)
    return Classifier(read_file(package, manifest, ONNX_FILE), manifest, source=package.uri(ONNX_FILE)), manifest


def _latency_ms(model: "Classifier", image: NDArray[np.uint8]) -> float:
    """Of the model alone, for one picture, in this process: its fastest of several."""
    return 1000 * min(timeit.repeat(lambda: model.run(image), number=1, repeat=20))


def _labels(
    object_store: ObjectStoreResource,
    recorded: Sequence[Traffic],
    rows: NDArray[np.int64],
    images: NDArray[np.uint8],
    manifest: ModelManifest,
) -> NDArray[np.int64]:
    """Classes of the images in these rows of the last traffic; -1 if it is not known or the model was trained on it."""
    traffic = recorded[-1]
    feedback = {each.place: each.label for model in recorded for each in model.info.feedback}
    told = {**labels_given(object_store.raw), **feedback}
    pixels = traffic.table["pixels"].to_pylist()  # a picture that was sent twice is labeled once
    by_pixels = {pixels[row]: told[place] for row, place in enumerate(traffic.places) if place in told}
    position = {name: index for index, name in enumerate(manifest.classes)}
    labels = np.array([position.get(by_pixels.get(pixels[row], ""), -1) for row in rows])
    if labels.max() >= 0:
        split = open_split(object_store.processed, manifest.dataset_digest, "train")
        trained_on = {digest.tobytes() for digest in split.digests}
        labels[[digest.tobytes() in trained_on for digest in pixel_digests(images)]] = -1
    return labels


def mcnemar(num_better: int, num_worse: int) -> float:
    """Two-sided exact p-value that two models are right equally often.

    The numbers are of images that only one of them classifies correctly (McNemar 1947, with the binomial distribution).
    """
    total = num_better + num_worse
    tail = sum(math.comb(total, each) for each in range(min(num_better, num_worse) + 1))
    return min(1.0, 2 * tail / 2**total)


def compare_models(
    traffic: Traffic,
    rows: NDArray[np.int64],
    predicted: NDArray[np.int64],
    labels: NDArray[np.int64],
    min_agreement: float,
) -> Verdict:
    """The verdict on the predicted classes for these rows of the traffic. A label of -1 is not known."""
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
    num_better = int(np.count_nonzero((predicted == labels) & (served != labels)))
    num_worse = int(np.count_nonzero((served == labels) & (predicted != labels)))
    p_value = mcnemar(num_better, num_worse)
    if num_labeled := int(np.count_nonzero(labels >= 0)):
        text += (
            f" Of {num_labeled} pictures with a label that it was not trained on, {num_better} are right only with it, "
            f"{num_worse} only with the served model (p {p_value:.2g})."
        )
        numbers |= {"num_labeled": num_labeled, "only_this_right": num_better, "only_served_right": num_worse}
    is_worse = num_worse > num_better and p_value < _ALPHA
    return Verdict(agreement >= min_agreement and not is_worse, text, numbers)
