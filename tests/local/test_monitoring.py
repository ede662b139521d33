"""The record of served traffic with real servers: what they write and when, and that drift is found in it."""

import json
from collections.abc import Callable
from datetime import UTC, datetime, timedelta
from pathlib import Path

import dagster as dg
import numpy as np
import pytest

from cifar_assets.dataset.versions.reader import open_split
from cifar_assets.traffic.records import Traffic, read_traffic
from resources.inference_service import DeployRequest, LocalInferenceService
from resources.inference_service.client import InferenceClient
from resources.object_store import FolderStore
from resources.object_store.resource import LocalObjectStore
from tests.fixtures.cifar10 import served_traffic_asset as served_traffic
from tests.fixtures.cifar10 import served_traffic_checks
from tests.fixtures.ports import free_port
from tests.fixtures.tiny_data import store_tiny_data
from tests.fixtures.workspace import wait_until
from tests.unit.serving.server_process import run_server
from tests.unit.serving.tiny_model import store_tiny_model

PREDICT = "/v1/models/cifar10:predict"


def recorded(folder: Path) -> list[Traffic]:
    now = datetime.now(UTC)
    return read_traffic(FolderStore(folder), now - timedelta(hours=1), now + timedelta(hours=1))


def test_a_server_records_until_it_has_drained(tmp_path: Path) -> None:
    uri, digest = store_tiny_model(FolderStore(tmp_path / "models"))
    images = np.random.default_rng(0).integers(0, 256, (3, 3, 32, 32), dtype=np.uint8)
    options = ("--record-uri", (tmp_path / "traffic").as_uri(), "--record-fraction", "1", "--record-interval", "3600")
    with run_server(uri, digest, tmp_path, *options) as server:
        body = json.dumps({"instances": images[:2].tolist()}).encode()
        answer = server.post(PREDICT, body, X_Request_Id="my-request")
        assert answer.headers["X-Request-Id"] == "my-request"
        assert server.post(PREDICT, b"{}").status == 400
        assert InferenceClient(server.url, timeout=300).predict_arrays(images).model_digest == digest
        traced = InferenceClient(server.url, timeout=300, is_traffic=True).predict_arrays(images[2:])
        assert recorded(tmp_path / "traffic") == []
    (traffic,) = recorded(tmp_path / "traffic")
    assert traffic.table["request_id"].to_pylist()[:2] == ["my-request", "my-request"]
    np.testing.assert_array_equal([traffic.image(row) for row in range(3)], images)
    np.testing.assert_allclose(traffic.probabilities[2:], traced.probabilities, rtol=1e-5)
    assert traffic.info.responses == {"200": 2, "400": 1}
    assert traffic.info.model_digest == digest


def test_a_server_whose_store_is_away_answers_and_goes(tmp_path: Path) -> None:
    uri, digest = store_tiny_model(FolderStore(tmp_path / "models"))
    (tmp_path / "traffic").write_text("not a folder")
    options = ("--record-uri", (tmp_path / "traffic").as_uri(), "--record-fraction", "1", "--record-interval", "0.01")
    with run_server(uri, digest, tmp_path, *options) as server:
        client = InferenceClient(server.url, timeout=300, is_traffic=True)
        while b'outcome="store_failed"' not in server.get("/metrics").body:
            client.predict_arrays(np.zeros((1, 3, 32, 32), np.uint8))
    assert server.process.returncode == 0
    assert "Answers are not recorded until the object store works again" in server.log


def test_the_local_deployment_replaces_a_server_whose_options_changed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("CIFAR_SERVING_LINGER", "0.2")
    uri, digest = store_tiny_model(FolderStore(tmp_path / "models"))
    place = {"state_dir": str(tmp_path / "serving"), "port": free_port(), "startup_timeout_seconds": 400}
    on = {"record_uri": (tmp_path / "traffic").as_uri(), "record_fraction": "1"}
    service, recording = (
        LocalInferenceService(server_module="cifar_assets.serving", options=options, **place) for options in ({}, on)
    )
    request = DeployRequest(uri, digest, "1")
    try:
        assert [each.deploy(request).changed for each in (service, service, recording, recording)] == [
            True,
            False,
            True,
            False,
        ]
        client = InferenceClient(f"http://127.0.0.1:{service.port}", timeout=300, is_traffic=True)
        client.predict_arrays(np.zeros((1, 3, 32, 32), np.uint8))
    finally:
        service.delete()
    (traffic,) = recorded(tmp_path / "traffic")
    assert len(traffic) == 1  # and not the test requests of the deployment


def test_darkened_pictures_are_found_and_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CIFAR_SERVING_LINGER", "0.2")
    store = LocalObjectStore(path=str(tmp_path / "store"))
    data = store_tiny_data(store.root(), test=600)
    uri, digest = store_tiny_model(store.models, dataset=data.processed)
    serving = LocalInferenceService(
        server_module="cifar_assets.serving",
        state_dir=str(tmp_path / "serving"),
        port=free_port(),
        startup_timeout_seconds=400,
        options={"record_uri": store.traffic.uri(), "record_fraction": "1", "record_interval": "0.1"},
    )
    images = open_split(store.processed, data.processed, "test").take(np.arange(0, 600, 2))

    def send(change: Callable[[np.ndarray], np.ndarray], total: int) -> None:
        client.predict_arrays(change(images))
        written = tmp_path / "store" / "served-traffic"
        wait_until(lambda: sum(map(len, recorded(written))) == total, "the records")

    def watch() -> tuple[dg.AssetMaterialization, dg.AssetCheckEvaluation]:
        resources = {"object_store": store, "serving": serving}
        done = dg.materialize([served_traffic, served_traffic_checks], resources=resources)
        (made,) = done.asset_materializations_for_node(served_traffic.node_def.name)
        (evaluation,) = done.get_asset_check_evaluations()
        return made, evaluation

    try:
        client = InferenceClient(serving.deploy(DeployRequest(uri, digest, "1")).url, timeout=300, is_traffic=True)
        send(lambda images: images[:100], 100)
        made, evaluation = watch()
        assert evaluation.passed
        assert "100 distinct images were recorded, at least 200 are needed" in str(evaluation.description)
        send(lambda images: images[100:], 300)
        made, evaluation = watch()
        assert evaluation.passed
        assert "No drift in 300 images" in str(evaluation.description)
        assert made.metadata["num_requests"].value == 6
        assert "data:image/png" in str(made.metadata["least_certain"].value)
        send(lambda images: images // 2, 600)
        _, evaluation = watch()
        assert not evaluation.passed
        assert evaluation.severity == dg.AssetCheckSeverity.WARN
        assert "Pictures are darker (brightness 0." in str(evaluation.description)
        assert "data:image/png" in str(evaluation.metadata["pictures"].value)
    finally:
        serving.delete()
