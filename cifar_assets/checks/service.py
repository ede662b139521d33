"""Checks of the running service, asked over HTTP as a user would."""

import time
from collections.abc import Iterator

import dagster as dg
import numpy as np
from pydantic import Field

from cifar_assets.assets.keys import INFERENCE_SERVICE
from cifar_assets.assets.upstream import materialized_digest
from cifar_assets.checks.results import WARN, only_selected, result, spec
from cifar_assets.dataset.reader import SplitReader, open_split
from cifar_assets.model_package import METRICS_FILE, read_json, read_manifest
from cifar_assets.serving.client import InferenceClient, ServerError
from cifar_assets.serving.comparison import compare_answers
from resources.inference_service import InferenceServiceResource
from resources.object_store import ObjectStoreResource

LATENCY_CHECK = dg.AssetCheckKey(INFERENCE_SERVICE, "latency")


class ServiceCheckConfig(dg.Config):
    """How the service is asked, and what is allowed."""

    num_images: int = Field(default=256, ge=1, le=10_000, description="Test images to ask about.")
    num_timed_requests: int = Field(default=20, ge=5, le=1000, description="Single-image requests to time.")
    slowdown_bound: float = Field(
        default=5.0, gt=1, description="Median latency allowed, as a multiple of the lowest median measured before."
    )


@dg.multi_asset_check(
    name="inference_service_checks",
    can_subset=True,
    specs=[
        spec(
            INFERENCE_SERVICE,
            "serves_the_model",
            "The endpoint is ready and names the digest that was deployed. When it fails materialize inference_service "
            "again; the reason is in the description.",
        ),
        spec(
            INFERENCE_SERVICE,
            "answers_as_evaluated",
            "On held-out images the service is as accurate as the stored model was, within what that many images can "
            "tell. When it fails requests are prepared, or the model is run, in another way than in training: roll "
            "back.",
        ),
        spec(
            INFERENCE_SERVICE,
            "latency",
            "A single request is not much slower than it was before. When it fails look for load, for a larger model "
            "or for less CPU.",
        ),
    ],
)
@only_selected
def inference_service_checks(
    context: dg.AssetCheckExecutionContext,
    config: ServiceCheckConfig,
    object_store: ObjectStoreResource,
    serving: InferenceServiceResource,
) -> Iterator[dg.AssetCheckResult]:
    """Three verdicts on what answers now."""
    digest = materialized_digest(context, INFERENCE_SERVICE)
    status = serving.status()
    right = status.ready and status.model_digest == digest
    found = f"{status.url} serves {status.model_digest}" if status.ready else f"nothing answers: {status.reason}"
    yield result(INFERENCE_SERVICE, "serves_the_model", right, f"Deployed was {digest}; {found}.")
    if not right or status.url is None:
        yield result(INFERENCE_SERVICE, "answers_as_evaluated", False, f"Not asked, since {found}.")
        yield result(INFERENCE_SERVICE, "latency", False, f"Not asked, since {found}.", severity=WARN)
        return
    package = object_store.models.at(digest)
    manifest = read_manifest(package, digest)
    expected = float(read_json(package, manifest, METRICS_FILE)["test_accuracy"])
    test = open_split(object_store.processed, manifest.dataset_digest, "test")
    client = InferenceClient(status.url, headers=status.headers)
    yield _answers(client, test, expected, config.num_images)
    yield _latency(context, client, test, config)


def _answers(client: InferenceClient, test: SplitReader, expected: float, num_images: int) -> dg.AssetCheckResult:
    try:
        found = compare_answers(client, test, expected, num_images)
    except ServerError as error:
        return result(INFERENCE_SERVICE, "answers_as_evaluated", False, str(error))
    return result(INFERENCE_SERVICE, "answers_as_evaluated", found.passed, str(found), accuracy=found.accuracy)


def _latency(
    context: dg.AssetCheckExecutionContext, client: InferenceClient, test: SplitReader, config: ServiceCheckConfig
) -> dg.AssetCheckResult:
    image = test.take([0])
    times = []
    try:
        for _ in range(config.num_timed_requests):
            started = time.perf_counter()
            client.predict_arrays(image)
            times.append(time.perf_counter() - started)
    except ServerError as error:
        return result(INFERENCE_SERVICE, "latency", False, str(error), severity=WARN)
    median = float(np.median(times)) * 1000
    before = _medians_before(context.instance)
    allowed = min(before, default=median) * config.slowdown_bound
    return result(
        INFERENCE_SERVICE,
        "latency",
        median <= allowed,
        f"Median of {len(times)} requests {median:.1f} ms; allowed {allowed:.1f} ms"
        + (f", {config.slowdown_bound:g} times the lowest median before." if before else " (first measurement)."),
        severity=WARN,
        median_milliseconds=median,
    )


_RECENT = 50


def _medians_before(instance: dg.DagsterInstance) -> list[float]:
    """Medians that earlier executions of this check measured, in milliseconds."""
    medians = []
    for record in instance.event_log_storage.get_asset_check_execution_history(LATENCY_CHECK, limit=_RECENT):
        event = record.event.dagster_event if record.event else None
        is_evaluation = event and event.event_type == dg.DagsterEventType.ASSET_CHECK_EVALUATION
        evaluation = event.asset_check_evaluation_data if event and is_evaluation else None
        value = evaluation.metadata.get("median_milliseconds") if evaluation else None
        if value is not None and isinstance(value.value, int | float):
            medians.append(float(value.value))
    return medians
