"""Served traffic in a cluster: a pod records it, Dagster reads it with its own rights and learns from labels for it."""

import json
import shutil
from collections.abc import Iterator, Mapping
from datetime import UTC, datetime, timedelta
from typing import Any

import dagster as dg
import numpy as np
import pytest
import urllib3

from cifar_assets.assets.record import evaluations
from cifar_assets.checks.shadow import ShadowConfig, judge_shadow
from cifar_assets.contracts import LANDING_PREFIX, TO_LABEL_PREFIX
from cifar_assets.dataset.formats.images import pixel_digest
from cifar_assets.dataset.versions.reader import open_split
from cifar_assets.demo import FOUR_ASSETS
from cifar_assets.demo_loop import label_newest
from cifar_assets.deployment import resources_for
from cifar_assets.serving.feedback import FEEDBACK_PATH
from cifar_assets.settings import Settings
from cifar_assets.traffic.records import Traffic, read_traffic
from resources.inference_service.client import InferenceClient
from resources.object_store import RAW_BUCKET, TRAFFIC_BUCKET, ObjectStore
from tests.cluster.kubectl import PATIENCE, kubectl, wait_for
from tests.cluster.platform import Platform
from tests.cluster.serving_story import store_model
from tests.fixtures.cifar10 import INFERENCE_SERVICE, RAW_DATASET, SERVED_TRAFFIC, served_traffic_checks
from tests.fixtures.cifar10 import served_traffic_asset as served_traffic
from tests.fixtures.tiny_data import write_drawn_images
from tests.fixtures.workspace import ROOT, SMALL_TRAINING, Workspace

NUM_IMAGES = 60
NUM_DARK = 300
NUM_LABELED = 20
RETRAIN_SECONDS = 900
"""Far longer than the retraining takes."""


@pytest.fixture
def environment(platform: Platform, monkeypatch: pytest.MonkeyPatch) -> Iterator[Mapping[str, str]]:
    """Of a Dagster outside the cluster whose service records everything and takes feedback; this process has it too."""
    if "serving.kserve.io" not in kubectl("api-versions"):
        pytest.skip("the cluster has no KServe")
    env = {"CIFAR_SERVING_RECORD_INTERVAL": "1", "CIFAR_SERVING_FEEDBACK": "true"}
    recording = {"RECORDED_FRACTION": "1", "SERVER_SETTINGS": json.dumps({"cpu": "50m", "max_replicas": 1, "env": env})}
    made = {**platform.environment(), **recording}
    for name, value in made.items():
        monkeypatch.setenv(name, value)
    yield made
    kubectl("-n", platform.namespace, "delete", "inferenceservices", "--all", "--wait=true", PATIENCE)
    remove(platform.store().at(TRAFFIC_BUCKET))


@pytest.fixture
def resources(environment: Mapping[str, str]) -> dict[str, Any]:
    """Those of the environment that are used here."""
    made = resources_for(Settings())
    return {name: made[name] for name in ("object_store", "serving")}


@pytest.fixture
def workspace(
    environment: Mapping[str, str], platform: Platform, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Workspace]:
    """A Dagster with a small dataset. What it lands is removed, so that other tests do not train on it."""
    folder, source = (tmp_path_factory.mktemp(name) for name in ("workspace", "source"))
    shutil.copy(ROOT / "dagster.yaml", folder)
    write_drawn_images(source, train=2000, test=600)
    training = {**SMALL_TRAINING, "scale": {"cpu": "200m", "memory": "2Gi"}}
    more = {"CIFAR10_SOURCE": str(source), "ACCURACY_THRESHOLD": "0", "RETRAIN_CONFIG": json.dumps(training)}
    yield Workspace(folder, {**environment, "PYTHONPATH": str(ROOT), **more})
    for prefix in (LANDING_PREFIX, TO_LABEL_PREFIX):
        remove(platform.store().at(RAW_BUCKET), prefix)


def remove(store: ObjectStore, prefix: str = "") -> None:
    for info in list(store.list(prefix)):
        store.delete(info.key)


def recorded(store: ObjectStore, model_digest: str) -> list[Traffic]:
    """What the model answered, if anything was recorded yet."""
    now = datetime.now(UTC)
    found = read_traffic(store, now - timedelta(hours=1), now + timedelta(hours=1))
    return [each for each in found if each.info.model_digest == model_digest]


def wait_until_recorded(store: ObjectStore, model_digest: str, num_images: int) -> None:
    wait_for("the record", lambda: sum(map(len, recorded(store, model_digest))) == num_images)


def test_dagster_reads_what_the_pod_recorded(platform: Platform, resources: dict[str, Any]) -> None:
    store, serving = (resource.process_config_and_initialize() for resource in resources.values())
    served, candidate = (store_model(platform.store(), seed, str(seed)) for seed in (1, 2))
    deployed = serving.deploy(served)
    images = np.random.default_rng(0).integers(0, 256, (NUM_IMAGES, 3, 32, 32), dtype=np.uint8)
    answered = InferenceClient(deployed.url, is_traffic=True).predict_arrays(images)
    assert answered.model_digest == served.model_digest
    wait_until_recorded(store.traffic, served.model_digest, NUM_IMAGES)
    done = dg.materialize([served_traffic, served_traffic_checks], resources=resources)
    (made,) = done.asset_materializations_for_node(served_traffic.node_def.name)
    assert made.metadata["dagster/row_count"].value == NUM_IMAGES
    (drift,) = done.get_asset_check_evaluations()
    assert drift.passed
    assert f"{NUM_IMAGES} distinct images were recorded" in str(drift.description)
    shadow = judge_shadow(store, candidate.model_digest, ShadowConfig())
    assert f"of {NUM_IMAGES} recorded pictures" in shadow.reason


def test_labels_for_darkened_pictures_lead_to_a_new_version(workspace: Workspace, resources: dict[str, Any]) -> None:
    """They are noticed, labeled by a person and by a program, and land; the sensor's run trains on them and deploys."""
    store, serving = (resource.process_config_and_initialize() for resource in resources.values())
    training = json.loads(workspace.environment["RETRAIN_CONFIG"])
    materialized(workspace, FOUR_ASSETS, {"trained_model": training})
    first = metadata(workspace, INFERENCE_SERVICE)
    split = open_split(store.processed, str(first["dataset_digest"]), "test")
    images = split.take(np.arange(NUM_DARK)) // 2
    names = [split.manifest.classes[label] for label in split.labels[:NUM_DARK]]
    status = serving.status()
    client = InferenceClient(status.url, headers=status.headers, is_traffic=True)
    digest = client.predict_arrays(images).model_digest
    assert digest == first["model_digest"]
    wait_until_recorded(store.traffic, digest, NUM_DARK)
    (traffic,) = recorded(store.traffic, digest)
    request_id, index = traffic.places[0]
    body = json.dumps({"request_id": request_id, "index": index, "label": names[0]})
    told = urllib3.request("POST", status.url + FEEDBACK_PATH, body=body, headers=status.headers)
    assert told.status == 202, told.data
    wait_for("the feedback", lambda: any(each.info.feedback for each in recorded(store.traffic, digest)))

    materialized(workspace, f'key:"{SERVED_TRAFFIC.to_user_string()}"+')
    with workspace.instance() as instance:
        drift, _ = next(evaluations(instance, dg.AssetCheckKey(SERVED_TRAFFIC, "drift")))
    assert not drift.passed
    assert "Pictures are darker" in str(drift.description)
    truth = {f"{pixel_digest(image)}.png": name for image, name in zip(images, names, strict=True)}
    assert label_newest(store.raw, truth, NUM_LABELED)["saved"] == NUM_LABELED

    with workspace.dagster_dev(), workspace.instance() as instance:

        def landing_runs() -> list[dg.DagsterRun]:
            return [run for run in instance.get_runs() if "landing" in run.tags]

        wait_for("the sensor's run", landing_runs)
        wait_for("its end", lambda: landing_runs()[0].is_finished, RETRAIN_SECONDS)
        log = (workspace.folder / "dev.log").read_text()[-5000:]
        assert [run.status for run in landing_runs()] == [dg.DagsterRunStatus.SUCCESS], log
    assert metadata(workspace, RAW_DATASET)["num_landed_accepted"] == NUM_LABELED + 1
    second = metadata(workspace, INFERENCE_SERVICE)
    assert second["model_digest"] != first["model_digest"]
    assert client.predict_arrays(images).model_digest == second["model_digest"]


def materialized(workspace: Workspace, select: str, config: Mapping[str, Any] | None = None) -> None:
    done = workspace.materialize(select, config)
    assert done.returncode == 0, done.stdout


def metadata(workspace: Workspace, key: dg.AssetKey) -> dict[str, Any]:
    """Of the asset's latest materialization."""
    with workspace.instance() as instance:
        event = instance.get_latest_materialization_event(key)
    assert event is not None
    assert event.asset_materialization is not None
    return {name: value.value for name, value in event.asset_materialization.metadata.items()}
