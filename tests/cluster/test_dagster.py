"""k8s/dagster on a real cluster, used through the webserver and the object store.

Needs `make -f images/images.mk image-dagster image-trainer postgres-image LOAD=...`.
"""

import io
import json
import secrets
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from typing import Any

import dagster as dg
import pytest
import yaml
from PIL import Image
from playwright.sync_api import expect

from cifar_assets.contracts import LANDING_PREFIX
from resources.kubernetes.naming import RUN_ID_LABEL
from resources.object_store import RAW_BUCKET
from resources.object_store.setup import ALL_BUCKETS
from tests.cluster import page
from tests.cluster.conftest import dump
from tests.cluster.deployed_dagster import IMAGES, deployed
from tests.cluster.kinds import K8S, is_installed
from tests.cluster.kubectl import PATIENCE, forwarded, is_listening, kubectl, missing_images, wait_for
from tests.cluster.platform import OVERLAY, PLATFORM_NAMESPACE, Platform
from tests.cluster.webserver import FINISHED, Run, Webserver
from tests.fixtures.browser import NEEDS_CHROMIUM, open_browser
from tests.fixtures.ports import free_port
from tests.local.test_browser import PATIENCE_MS

MONITORING = str(K8S / "monitoring")
RAW, PROCESSED = "cifar10/raw_dataset", "cifar10/processed_dataset"
LANDED_KEY = f"{RAW_BUCKET}/{LANDING_PREFIX}cat/camera.png"
NUM_SYNTHETIC = 7000
STORE_PORTS = (9000, 9001)
PLATFORM_INSIDE = ("-n", PLATFORM_NAMESPACE)
NOTE = b"stored by MLflow"


@pytest.fixture(scope="module")
def dagster(platform: Platform) -> Iterator[Webserver]:
    """Dagster in the platform's namespace; removed at the end."""
    with deployed(platform) as webserver:
        yield webserver


@pytest.fixture(autouse=True)
def explained(platform: Platform, request: pytest.FixtureRequest) -> Iterator[None]:
    """Prints the namespace's state, which pytest shows for a failed test."""
    yield
    if request.session.testsfailed:
        print(dump(platform.namespace))
        with suppress(RuntimeError):  # if there is no daemon
            print(kubectl("-n", platform.namespace, "logs", "deploy/dagster-daemon", "--tail=60"))


def noise() -> bytes:
    """A picture that is not in any version yet."""
    buffer = io.BytesIO()
    Image.frombytes("RGB", (32, 32), secrets.token_bytes(32 * 32 * 3)).save(buffer, "PNG")
    return buffer.getvalue()


def run_workers(platform: Platform, run_id: str) -> list[dict[str, Any]]:
    answer = kubectl("-n", platform.namespace, "get", "pods", "-l", f"dagster/run-id={run_id}", "-o", "json")
    return json.loads(answer)["items"]


@contextmanager
def canceled_afterwards(dagster: Webserver, run_id: str) -> Iterator[None]:
    """Cleans up: the webserver cancels a run that has not ended."""
    try:
        yield
    finally:
        # Dagster refuses to cancel a run whose worker is about to start.
        wait_for(f"run {run_id} to start", lambda: dagster.run(run_id).status in ("STARTED", *FINISHED))
        if dagster.run(run_id).status not in FINISHED:
            dagster.cancel(run_id)
        wait_for(f"the end of run {run_id}", lambda: dagster.run(run_id).status in FINISHED)


@pytest.fixture(scope="module")
def finished_run(dagster: Webserver) -> str:
    """A run of raw_dataset that has ended, described by everything that Dagster knows about it."""
    wait_for("the code location", lambda: dagster.locations() == {"cifar": "RepositoryLocation"})
    run_id = dagster.materialize(RAW, config={"loggers": {"console": {"config": {"log_level": "DEBUG"}}}})
    with canceled_afterwards(dagster, run_id):
        wait_for("the run's end", lambda: dagster.run(run_id).status in FINISHED)
    return run_id


def test_ui_daemon_and_code_location_are_healthy(dagster: Webserver) -> None:
    assert json.loads(dagster.get("/server_info"))["dagster_webserver_version"] == dg.__version__
    wait_for("the code location", lambda: dagster.locations() == {"cifar": "RepositoryLocation"})
    wait_for("healthy daemons", lambda: not dagster.unhealthy_daemons())


def test_run_is_a_job_with_output_in_the_object_store(
    dagster: Webserver, platform: Platform, finished_run: str
) -> None:
    assert dagster.run(finished_run).status == "SUCCESS"
    (pod,) = run_workers(platform, finished_run)
    assert pod["metadata"]["ownerReferences"][0]["kind"] == "Job"
    assert pod["spec"]["serviceAccountName"] == "dagster"
    assert pod["spec"]["containers"][0]["image"] == IMAGES[0]
    made = dagster.materialization(RAW, finished_run)
    assert made
    assert made["dagster/row_count"] == NUM_SYNTHETIC
    ((text, where),) = dagster.compute_logs(finished_run).values()
    assert "STEP_SUCCESS" in text
    assert where.startswith("s3://dagster-logs/")
    assert platform.store().read(where.removeprefix("s3://")).decode() == text


@pytest.mark.browser
@NEEDS_CHROMIUM
def test_a_browser_shows_the_run_and_its_output(dagster: Webserver, finished_run: str) -> None:
    with open_browser() as browser:
        page = browser.new_page(viewport={"width": 1500, "height": 1000})
        page.set_default_timeout(PATIENCE_MS)
        page.goto(f"{dagster.url}/runs/{finished_run}")
        expect(page.get_by_text("Success", exact=True).first).to_be_visible(timeout=PATIENCE_MS)
        page.get_by_text("stderr", exact=True).click()
        page.get_by_placeholder("Select a step").click()
        page.get_by_text("cifar10__raw_dataset").last.click()
        expect(page.get_by_text("STEP_SUCCESS").first).to_be_visible(timeout=PATIENCE_MS)


@pytest.mark.parametrize(
    ("overlay", "kept", "external"),
    [
        ("external-postgres", "deployment.apps/dagster-daemon", "dagster-postgresql"),
        ("external-store", "configmap/cifar-platform", "deployment.apps"),
    ],
)
def test_api_server_accepts_the_overlays_for_external_servers(
    dagster: Webserver, overlay: str, kept: str, external: str
) -> None:
    dry = ["--dry-run=server", "--validate=strict", "--force-conflicts"]
    answer = kubectl("apply", "--server-side", *dry, "-k", str(page.ROOT / "k8s/overlays" / overlay))
    assert kept in answer
    assert external not in answer


def test_exporter_shows_the_state_of_the_daemon(dagster: Webserver, platform: Platform) -> None:
    """All of k8s/monitoring, except what needs the Prometheus Operator if the cluster lacks it."""
    wait_for("healthy daemons", lambda: not dagster.unhealthy_daemons())
    objects = list(yaml.safe_load_all(kubectl("kustomize", MONITORING)))
    if not is_installed("monitoring.coreos.com"):
        objects = [each for each in objects if not each["apiVersion"].startswith("monitoring.coreos.com/")]
    manifest = yaml.safe_dump_all(objects)
    kubectl("apply", "--server-side", "-f", "-", text=manifest)
    try:
        kubectl("-n", platform.namespace, "rollout", "status", "deploy/dagster-exporter", PATIENCE)
        port = free_port()
        with forwarded(platform.namespace, "deploy/dagster-exporter", port, 9464):
            exporter = Webserver(f"http://127.0.0.1:{port}")

            def shows_the_daemon() -> bool:
                with suppress(OSError):  # it does not listen yet
                    return "dagster_daemon_heartbeat_timestamp_seconds{" in exporter.get("/metrics")
                return False

            wait_for("the daemon's heartbeat", shows_the_daemon)
    finally:
        kubectl("delete", "-f", "-", PATIENCE, text=manifest)


def test_a_killed_run_worker_fails_its_run_and_another_run_takes_over(dagster: Webserver, platform: Platform) -> None:
    run_id = dagster.materialize(RAW, PROCESSED)
    wait_for("the start", lambda: dagster.run(run_id).status == "STARTED")
    (pod,) = run_workers(platform, run_id)
    kubectl("-n", platform.namespace, "delete", "pod", pod["metadata"]["name"], "--grace-period=0", "--force")
    wait_for("the run's end", lambda: dagster.run(run_id).status in FINISHED)
    assert dagster.run(run_id).status == "FAILURE"
    retry: Run = wait_for("the retry", lambda: next((run for run in dagster.runs() if run.parent == run_id), None))
    with canceled_afterwards(dagster, retry.id):
        assert retry.tags["dagster/retry_number"] == "1"
        wait_for("the retry's worker", lambda: run_workers(platform, retry.id))
    assert dagster.run(retry.id).status == "CANCELED"
    wait_for("the removal of its pod", lambda: not run_workers(platform, retry.id))


def test_landed_data_is_trained_on_and_rejected_model_is_not_deployed(dagster: Webserver, platform: Platform) -> None:
    """The gate's threshold is 100 % here; docs/dagster_in_the_cluster.md shows a model that passes."""
    before = {run.id for run in dagster.runs()}
    store = platform.store()
    store.write(LANDED_KEY, noise())
    try:
        run: Run = wait_for(
            "the sensor's run",
            lambda: next((run for run in dagster.runs() if run.id not in before and run.job == "retrain"), None),
        )
        with canceled_afterwards(dagster, run.id):
            assert run.tags["dagster/sensor_name"] == "landing_sensor"
            made = wait_for("the raw dataset", lambda: dagster.materialization(RAW, run.id))
            assert made["dagster/row_count"] == NUM_SYNTHETIC + 1
            wait_for("the verdict", lambda: dagster.run(run.id).status in FINISHED, 900)
        refused = dagster.run(run.id)
        assert refused.status == "FAILURE"
        assert dagster.check_passed(run.id, "accuracy_threshold") is False
        assert refused.steps.get("cifar10__inference_service", "SKIPPED") == "SKIPPED"
        sensors = ("deploy_when_trained", "landing_sensor")
        seen = {sensor: dagster.num_ticks(sensor) for sensor in sensors}
        wait_for("two more looks", lambda: all(dagster.num_ticks(sensor) >= seen[sensor] + 2 for sensor in sensors))
        assert {run.id for run in dagster.runs()} - before == {refused.id}
        if "serving.kserve.io" in kubectl("api-versions"):
            assert kubectl("-n", platform.namespace, "get", "inferenceservices", "-o", "name") == ""
    finally:
        store.delete(LANDED_KEY)
        kubectl("-n", platform.namespace, "delete", "pytorchjobs", "-l", RUN_ID_LABEL, "--wait=true", PATIENCE)


@pytest.fixture
def movable(platform: Platform) -> Iterator[Platform]:
    """The platform with MinIO, which it has again at the end, without data."""
    if OVERLAY == "seaweedfs":
        pytest.skip("the platform has SeaweedFS already")
    if missing := missing_images("docker.io/chrislusf/seaweedfs:4.53"):
        pytest.skip(f"the cluster lacks {missing[0]}")
    if taken := [port for port in STORE_PORTS if is_listening(port)]:
        pytest.skip(f"the commands forward the ports {STORE_PORTS}, of which {taken} are in use")
    yield platform
    added = ("deploy/seaweedfs", "pvc/seaweedfs", "job/store-setup")
    kubectl(*PLATFORM_INSIDE, "delete", *added, "--ignore-not-found", PATIENCE)
    kubectl("apply", "--server-side", "-k", str(page.ROOT / f"k8s/overlays/{OVERLAY}"))
    kubectl(*PLATFORM_INSIDE, "wait", "--for=condition=complete", "job/store-setup", PATIENCE)
    kubectl(*PLATFORM_INSIDE, "scale", "deploy/mlflow", "--replicas=1")


def stored(platform: Platform) -> dict[str, int]:
    """Size of every object."""
    store = platform.store()
    return {f"{bucket}/{info.key}": info.size for bucket in ALL_BUCKETS for info in store.bucket(bucket).list()}


def mlflow_artifact(content: bytes | None = None) -> bytes:
    """Read an artifact through MLflow's proxy; first store it if it has content."""
    port = free_port()
    with forwarded(PLATFORM_NAMESPACE, "svc/mlflow", port, 5000):
        address = f"http://127.0.0.1:{port}/api/2.0/mlflow-artifacts/artifacts/1/note.txt"
        if content:
            urllib.request.urlopen(urllib.request.Request(address, content, method="PUT"), timeout=60).close()
        with urllib.request.urlopen(address, timeout=60) as answer:
            return answer.read()


@pytest.mark.thorough
def test_commands_of_the_docs_move_all_data_to_seaweedfs(
    dagster: Webserver, movable: Platform, finished_run: str
) -> None:
    ((output, _),) = dagster.compute_logs(finished_run).values()
    assert mlflow_artifact(NOTE) == NOTE
    before = stored(movable)

    move, start_again, delete_minio = page.blocks("Moving the data", "object_stores.md")
    copied = page.run(move)
    assert f"raw-data: {sum(key.startswith('raw-data/') for key in before)} objects" in copied
    page.run(start_again)
    page.run(delete_minio)
    kubectl(*PLATFORM_INSIDE, "rollout", "status", "deploy/mlflow", PATIENCE)
    for name in ("code", "webserver", "daemon"):
        kubectl("-n", movable.namespace, "rollout", "status", f"deploy/dagster-{name}", PATIENCE)
    assert not kubectl(*PLATFORM_INSIDE, "get", "deploy/minio", "pvc/minio", "--ignore-not-found")

    after = stored(movable)
    assert {key: size for key, size in after.items() if key in before} == before
    assert mlflow_artifact() == NOTE
    wait_for("the code location", lambda: dagster.locations() == {"cifar": "RepositoryLocation"})
    assert [text for text, _ in dagster.compute_logs(finished_run).values()] == [output]
    second = dagster.materialize(PROCESSED)
    wait_for("the run's end", lambda: dagster.run(second).status in FINISHED)
    assert dagster.run(second).status == "SUCCESS"
    made = dagster.materialization(PROCESSED, second)
    assert made
    assert made["dagster/row_count"] == NUM_SYNTHETIC
