"""KServeInferenceService in Knative mode on a real cluster: canaries, promotion, rollback, scaling to zero and back."""

import os
from collections import Counter
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import pytest
from kubernetes import client as k8s

from cifar_assets.serving.comparison import find_canary_fault
from resources.errors import DeployError
from resources.inference_service import DeployRequest
from resources.inference_service.client import InferenceClient
from tests.cluster.conftest import Minio
from tests.cluster.kubectl import PATIENCE, PATIENCE_SECONDS, kubectl, missing_images, wait_for
from tests.cluster.serving_story import Models, grant_access, left_behind, service, store_models

IMAGE = os.environ.get("TEST_SERVERLESS_IMAGE", "dev.local/cifar-server:dev")
"""Knative asks registries for the digest of a tag, except for names that begin with dev.local and the like."""


@pytest.fixture(scope="module")
def models(namespace: str, minio: Minio, core: Any) -> Models:
    names: Any = k8s.ApisApi(core.api_client).get_api_versions()
    groups = {group.name for group in names.groups}
    if not {"serving.kserve.io", "serving.knative.dev"} <= groups:
        pytest.skip("the cluster has no Knative Serving beside KServe")
    if missing_images(IMAGE):
        pytest.skip(
            f"the cluster lacks {IMAGE}: make -f images/images.mk image-server REGISTRY=dev.local LOAD=..., or name "
            "one that it can pull in TEST_SERVERLESS_IMAGE"
        )
    grant_access(namespace)
    return store_models(minio.store())


@pytest.fixture
def nothing_serves(namespace: str) -> Iterator[None]:
    yield
    kubectl("-n", namespace, "delete", "inferenceservices", "--all", "--wait=true", PATIENCE)
    wait_for("removal of the service", lambda: not left_behind(namespace))


def num_pods(namespace: str) -> int:
    selector = ["-l", "serving.kserve.io/inferenceservice", "--field-selector", "status.phase=Running"]
    return len(kubectl("-n", namespace, "get", "pods", *selector, "-o", "name").split())


def test_canary_promotion_rollback_and_scale_to_zero(
    namespace: str, minio: Minio, models: Models, nothing_serves: None
) -> None:
    serving = service(namespace, image=IMAGE, mode="Knative", min_replicas=0, max_replicas=2, canary_percent=20)
    assert serving.deploy(models.first).previous_digest is None
    root = minio.store()
    shares: Counter[str] = Counter()

    def judged(request: DeployRequest) -> DeployRequest:
        def find_fault(canary: InferenceClient) -> str | None:
            status = serving.status()
            assert status.url is not None
            client = InferenceClient(status.url, headers=status.headers)
            shares.update(client.served_model().model_digest for _ in range(100))
            return find_canary_fault(canary, root.at("models"), root.at("processed-data"), request.model_digest)

        return replace(request, find_fault=find_fault)

    promoted = serving.deploy(judged(models.second))
    assert promoted.previous_digest == models.first.model_digest
    # 20 of 100 expected; five standard deviations either way.
    assert 1 <= shares[models.second.model_digest] <= 40
    client = InferenceClient(promoted.url, timeout=PATIENCE_SECONDS, headers=promoted.headers)
    assert {client.served_model().model_digest for _ in range(20)} == {models.second.model_digest}

    with pytest.raises(DeployError, match="test images right"):
        serving.deploy(judged(models.boastful))
    assert {client.served_model().model_digest for _ in range(20)} == {models.second.model_digest}

    wait_for("scaling to zero", lambda: num_pods(namespace) == 0)
    assert client.served_model().model_digest == models.second.model_digest
    assert num_pods(namespace) >= 1
