"""Whether the traffic of the served model differs from the test images of its dataset."""

from collections.abc import Iterator, Sequence
from functools import partial

import dagster as dg
import numpy as np
from pydantic import Field

from cifar_assets.assets.binding import data_set_checks
from cifar_assets.assets.keys import SERVED_TRAFFIC, key_of
from cifar_assets.assets.metadata import picture, table
from cifar_assets.assets.record import materialized_digest
from cifar_assets.checks.results import answers, declare
from cifar_assets.data_set import DataSet
from cifar_assets.dataset.sheet import captioned_sheet
from cifar_assets.dataset.versions.reader import open_split
from cifar_assets.model_package import read_manifest
from cifar_assets.traffic.drift import Comparison, Sample, compare_samples, find_drift
from cifar_assets.traffic.records import Traffic, read_window
from cifar_assets.traffic.statistics import image_statistics
from resources.inference_service import InferenceServiceResource
from resources.inference_service.client import InferenceClient, ServerError
from resources.object_store.resource import ObjectStoreResource
from resources.verdict import Verdict

_MAX_NAMED = 5
_NUM_PICTURES = 40
DRIFTED = "drifted"
"""Metadata with the places of the pictures that differ most."""


class DriftConfig(dg.Config):
    """Sizes of the samples, and the bounds that apply."""

    num_reference_images: int = Field(
        default=2000, ge=200, description="Test images that the service is asked about, for comparison."
    )
    min_images: int = Field(default=200, ge=50, description="With fewer distinct images, nothing is tested.")
    min_class_images: int = Field(
        default=50, ge=20, description="A class is tested with so many images or more that were classified as it."
    )
    alpha: float = Field(
        default=0.001, gt=0, lt=1, description="Probability of a false alarm, all tests of an execution together."
    )
    min_psi: float = Field(default=0.1, ge=0, description="Smallest population stability index that counts as drift.")


DRIFT_CHECKS = declare(
    SERVED_TRAFFIC,
    warning={
        "drift": "The pictures that the model gets are like the test images of its dataset. If it fails, look at them: "
        "fix what sends them, or label them and train on them.",
    },
    awaited=True,  # by pictures_to_label
)


@data_set_checks(DRIFT_CHECKS)
def served_traffic_checks(
    data_set: DataSet,
    context: dg.AssetCheckExecutionContext,
    config: DriftConfig,
    object_store: ObjectStoreResource,
    serving: InferenceServiceResource,
) -> Iterator[dg.AssetCheckResult]:
    """Compares recorded traffic of the served model with what it answers for test images of its dataset.

    Two-sample Kolmogorov-Smirnov tests are run on each class's probability (Rabanser et al. 2019, "Failing Loudly"),
    on the confidence and on brightness, contrast, saturation and sharpness, for all images and by predicted class.
    Drift is what remains significant after Bonferroni's correction and has a population stability index of at least
    `min_psi`: by convention (Siddiqi 2006), from 0.1 a shift is moderate, from 0.25 large. Identical images count once.
    """
    version = materialized_digest(context, key_of(data_set, SERVED_TRAFFIC))
    judge = partial(_judge_traffic, version, config, object_store, serving)
    yield from answers(context, DRIFT_CHECKS(data_set), version, {"drift": judge})


def _judge_traffic(
    window: str, config: DriftConfig, object_store: ObjectStoreResource, serving: InferenceServiceResource
) -> Verdict:
    by_model = read_window(object_store.traffic, window)
    if not by_model:
        return Verdict(True, "Not tested: nothing was recorded.")
    status = serving.status()
    traffic = next((each for each in by_model if each.info.model_digest == status.model_digest), None)
    if traffic is None or status.url is None:
        return Verdict(True, f"Not tested: nothing was recorded of the served model ({status.model_digest}).")
    all_images = Sample(traffic.probabilities, traffic.statistics)
    rows = all_images.distinct()
    if len(rows) < config.min_images:
        text = f"Not tested: {len(rows)} distinct images were recorded, at least {config.min_images} are needed."
        return Verdict(True, text, {"num_images": len(rows)})
    client = InferenceClient(status.url, headers=status.headers)
    reference = _reference(client, object_store, traffic, config.num_reference_images)
    return judge_drift(reference, all_images.take(rows), traffic, rows, config)


def _reference(client: InferenceClient, object_store: ObjectStoreResource, traffic: Traffic, num_images: int) -> Sample:
    """Test images of the model's dataset, spread evenly over the split, as the service classifies them."""
    digest = traffic.info.model_digest
    manifest = read_manifest(object_store.models.at(digest), digest)
    test = open_split(object_store.processed, manifest.dataset_digest, "test")
    images = test.take(test.spread(num_images))
    predictions = client.predict_arrays(images)
    if predictions.model_digest != digest:
        raise ServerError(f"The service now serves {predictions.model_digest}. Materialize served_traffic again.")
    return Sample(predictions.probabilities, image_statistics(images))


def judge_drift(reference: Sample, sample: Sample, traffic: Traffic, rows: np.ndarray, config: DriftConfig) -> Verdict:
    """The verdict on the sample, which has these rows of the traffic."""
    classes = traffic.info.images.classes
    comparisons = compare_samples(reference, sample, classes, min_class_images=config.min_class_images)
    found = find_drift(comparisons, alpha=config.alpha, min_psi=config.min_psi)
    largest = sorted(comparisons, key=lambda each: -each.psi)[:_NUM_PICTURES]
    numbers = {
        "num_images": len(sample),
        "num_reference_images": len(reference),
        "num_tests": len(comparisons),
        "num_drifted": len(found),
        "comparisons": table({**vars(each), "of_class": each.of_class or "all"} for each in largest),
    }
    if not found:
        worst = largest[0]
        text = f"No drift in {len(sample)} images; largest PSI {worst.psi:.2f} ({worst.name})."
        return Verdict(True, text, numbers)
    more = f" {len(found) - _MAX_NAMED} more properties differ." if len(found) > _MAX_NAMED else ""
    values, chosen = _most_different(found[0], sample, classes)
    captions = [f"{classes[sample.predicted[row]]} {values[row]:.2f}" for row in chosen]
    numbers["pictures"] = picture(
        "the pictures that differ most",
        lambda: captioned_sheet([traffic.image(int(rows[row])) for row in chosen], captions),
    )
    places = traffic.places
    numbers[DRIFTED] = dg.MetadataValue.json([list(places[rows[row]]) for row in chosen])
    return Verdict(False, " ".join(map(str, found[:_MAX_NAMED])) + more, numbers)


def _most_different(finding: Comparison, sample: Sample, classes: Sequence[str]) -> tuple[np.ndarray, np.ndarray]:
    """Values of the finding's property, and the rows with those furthest in its direction."""
    values = sample.properties.get(finding.name)
    if values is None:
        values = sample.probabilities[:, classes.index(finding.name)]
    order = np.argsort(values if finding.found < finding.expected else -values)
    if finding.of_class:
        order = order[sample.predicted[order] == classes.index(finding.of_class)]
    return values, order[:_NUM_PICTURES]
