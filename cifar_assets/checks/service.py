"""Checks of the running service, queried over HTTP as a user would."""

import time
from collections.abc import Iterator
from functools import cache
from itertools import islice

import dagster as dg
import numpy as np
from pydantic import Field

from cifar_assets.assets.binding import data_set_checks
from cifar_assets.assets.keys import INFERENCE_SERVICE, key_of
from cifar_assets.assets.record import evaluations, materialized_digest
from cifar_assets.checks.results import answers, declare
from cifar_assets.data_set import DataSet
from cifar_assets.dataset.versions.reader import open_split
from cifar_assets.model_package import read_manifest
from cifar_assets.serving.comparison import compare_answers
from resources.errors import ConfigError
from resources.inference_service import InferenceServiceResource, ServiceStatus
from resources.inference_service.client import InferenceClient, ServerError
from resources.object_store.resource import ObjectStoreResource
from resources.verdict import Verdict


class ServiceCheckConfig(dg.Config):
    """How the service is queried, and the bounds that apply."""

    num_images: int = Field(default=256, ge=1, le=10_000, description="Number of test images to send.")
    num_timed_requests: int = Field(default=20, ge=5, le=1000, description="Number of single-image requests to time.")
    slowdown_bound: float = Field(
        default=5.0,
        gt=1,
        description="Largest allowed median latency, as a multiple of the lowest median measured before.",
    )


SERVICE_CHECKS = declare(
    INFERENCE_SERVICE,
    failing={
        "serves_the_model": "The endpoint is ready and reports the digest that was deployed. If it fails, see the "
        "reason in the description and materialize inference_service again.",
        "answers_as_evaluated": "On held-out images the service is as accurate as the stored model, within the "
        "sampling error. If it fails, the service prepares images or runs the model differently than training does: "
        "roll back.",
    },
    warning={
        "latency": "A single request is not much slower than before. If it fails, look for load, a larger model or "
        "less CPU.",
    },
)


@data_set_checks(SERVICE_CHECKS)
def inference_service_checks(
    data_set: DataSet,
    context: dg.AssetCheckExecutionContext,
    config: ServiceCheckConfig,
    object_store: ObjectStoreResource,
    serving: InferenceServiceResource,
) -> Iterator[dg.AssetCheckResult]:
    """Results for the model that is served now."""
    checks, service = SERVICE_CHECKS(data_set), key_of(data_set, INFERENCE_SERVICE)
    try:
        digest = materialized_digest(context, service)
    except ConfigError as error:  # on a new instance the schedule runs before the first deployment
        nothing = Verdict(False, str(error))
        yield from answers(context, checks, "none", {check.name: lambda: nothing for check in checks})
        return
    status = cache(serving.status)

    def answers_as_evaluated() -> Verdict:
        client = _client(status(), digest)
        found = compare_answers(client, object_store.models, object_store.processed, digest, config.num_images)
        return Verdict(found.passed, str(found), {"accuracy": found.accuracy})

    def latency() -> Verdict:
        client = _client(status(), digest)
        manifest = read_manifest(object_store.models.at(digest), digest)
        image = open_split(object_store.processed, manifest.dataset_digest, "test").take([0])
        before = evaluations(context.instance, dg.AssetCheckKey(service, "latency"))
        return _latency(before, client, image, config)

    judges = {
        "serves_the_model": lambda: serves_the_model(status(), digest),
        "answers_as_evaluated": answers_as_evaluated,
        "latency": latency,
    }
    yield from answers(context, checks, digest, judges)


def serves_the_model(status: ServiceStatus, digest: str) -> Verdict:
    """The endpoint is ready and reports the digest."""
    found = f"{status.url} serves {status.model_digest}" if status.ready else f"there is no response: {status.reason}"
    return Verdict(status.ready and status.model_digest == digest, f"Deployed was {digest}; {found}.")


def _client(status: ServiceStatus, digest: str) -> InferenceClient:
    right = serves_the_model(status, digest)
    if not right.passed or status.url is None:
        raise ServerError(right.reason)
    return InferenceClient(status.url, headers=status.headers)


def _latency(
    executions: Iterator[tuple[dg.AssetCheckEvaluation, str]],
    client: InferenceClient,
    image: np.ndarray,
    config: ServiceCheckConfig,
) -> Verdict:
    """Compares the median with the lowest one that earlier executions of this check measured."""
    times = []
    for _ in range(config.num_timed_requests):
        started = time.perf_counter()
        client.predict_arrays(image)
        times.append(time.perf_counter() - started)
    median = float(np.median(times)) * 1000
    recent = (each.metadata.get("median_milliseconds") for each, _ in islice(executions, 50))
    before = [float(found.value) for found in recent if found and isinstance(found.value, int | float)]
    allowed = min(before, default=median) * config.slowdown_bound
    limit = f"{config.slowdown_bound:g} times the lowest median before" if before else "first measurement"
    return Verdict(
        median <= allowed,
        f"Median of {len(times)} requests {median:.1f} ms; allowed {allowed:.1f} ms ({limit}).",
        {"median_milliseconds": median},
    )
