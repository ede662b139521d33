"""The record of served traffic in a cluster: the server's pod writes it, and Dagster reads it with its own rights."""

import json
from collections.abc import Iterator
from datetime import UTC, datetime, timedelta
from typing import Any

import dagster as dg
import numpy as np
import pytest

from cifar_assets.assets.served_traffic import served_traffic
from cifar_assets.checks.drift import served_traffic_checks
from cifar_assets.checks.shadow import ShadowConfig, judge_shadow
from cifar_assets.deployment import resources_for
from cifar_assets.settings import Settings
from cifar_assets.traffic.records import read_traffic
from resources.inference_service.client import InferenceClient
from tests.cluster.kubectl import PATIENCE, kubectl, wait_for
from tests.cluster.platform import Platform
from tests.cluster.serving_story import store_model

NUM_IMAGES = 60


@pytest.fixture
def resources(platform: Platform, monkeypatch: pytest.MonkeyPatch) -> Iterator[dict[str, Any]]:
    """Dagster's resources, outside the cluster, for a service that records everything."""
    if "serving.kserve.io" not in kubectl("api-versions"):
        pytest.skip("the cluster has no KServe")
    server = {"cpu": "50m", "max_replicas": 1, "env": {"CIFAR_SERVING_RECORD_INTERVAL": "1"}}
    recording = {"RECORDED_FRACTION": "1", "SERVER_SETTINGS": json.dumps(server)}
    for name, value in {**platform.environment(), **recording}.items():
        monkeypatch.setenv(name, value)
    yield resources_for(Settings())
    kubectl("-n", platform.namespace, "delete", "inferenceservices", "--all", "--wait=true", PATIENCE)


def test_dagster_reads_what_the_pod_recorded(platform: Platform, resources: dict[str, Any]) -> None:
    given = {name: resources[name] for name in ("object_store", "serving")}
    store, serving = (resource.process_config_and_initialize() for resource in given.values())
    served, candidate = (store_model(platform.store(), seed, str(seed)) for seed in (1, 2))
    deployed = serving.deploy(served)
    images = np.random.default_rng(0).integers(0, 256, (NUM_IMAGES, 3, 32, 32), dtype=np.uint8)
    answered = InferenceClient(deployed.url, is_traffic=True).predict_arrays(images)
    assert answered.model_digest == served.model_digest

    def num_recorded() -> int:
        now = datetime.now(UTC)
        return sum(map(len, read_traffic(store.traffic, now - timedelta(hours=1), now + timedelta(hours=1))))

    wait_for("the record", lambda: num_recorded() == NUM_IMAGES)
    done = dg.materialize([served_traffic, served_traffic_checks], resources=given)
    (made,) = done.asset_materializations_for_node(served_traffic.node_def.name)
    assert made.metadata["dagster/row_count"].value == NUM_IMAGES
    (drift,) = done.get_asset_check_evaluations()
    assert drift.passed
    assert f"{NUM_IMAGES} distinct images were recorded" in str(drift.description)
    shadow = judge_shadow(store, candidate.model_digest, ShadowConfig())
    assert f"of {NUM_IMAGES} recorded pictures" in shadow.reason
