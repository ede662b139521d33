"""KServeInferenceService in Knative mode on a real cluster: canaries, promotion, rollback, scaling to zero and back."""

import os
from collections.abc import Iterator
from typing import Any

import pytest
from kubernetes import client as k8s

from resources.inference_service.client import InferenceClient
from tests.cluster.conftest import Minio
from tests.cluster.kubectl import PATIENCE, PATIENCE_SECONDS, kubectl, missing_images, wait_for
from tests.cluster.serving_story import Models, grant_access, left_behind, promote_and_withdraw, service, store_models

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
    first = serving.deploy(models.first)
    assert first.previous_digest is None
    client = InferenceClient(first.url, timeout=PATIENCE_SECONDS, headers=first.headers)
    promote_and_withdraw(serving, models, minio.store(), client)

    wait_for("scaling to zero", lambda: num_pods(namespace) == 0)
    assert client.served_model().model_digest == models.second.model_digest
    assert num_pods(namespace) >= 1
