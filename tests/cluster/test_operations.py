"""docs/operations.md: its commands, as printed, on a platform with Dagster and a deployed model."""

import io
import secrets
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
from mlflow.tracking import MlflowClient
from PIL import Image

from cifar_assets.contracts import LANDING_PREFIX
from resources.object_store import RAW_BUCKET
from resources.object_store.setup import ALL_BUCKETS
from tests.cluster import page
from tests.cluster.deployed_dagster import PASSING, deployed, install
from tests.cluster.kinds import is_installed
from tests.cluster.kubectl import PATIENCE, kubectl, wait_for
from tests.cluster.platform import NAMESPACE, PLATFORM_NAMESPACE, Platform, install_platform, is_kept
from tests.cluster.webserver import FINISHED, Run, Webserver
from tests.fixtures.ports import free_port
from tests.fixtures.s3 import S3Server

PAGE = "operations.md"
ASSETS = ("raw_dataset", "processed_dataset", "trained_model", "inference_service")
RETRAIN_SECONDS = 900
"""Far longer than a retraining takes."""


@pytest.fixture(scope="module")
def dagster(platform: Platform) -> Iterator[Webserver]:
    if not is_installed("serving.kserve.io"):
        pytest.skip("the cluster has no KServe")
    try:
        with deployed(platform, PASSING) as webserver:
            yield webserver
    finally:
        kubectl("-n", NAMESPACE, "delete", "inferenceservices,pytorchjobs", "--all", PATIENCE)


def retrained_on_a_picture(dagster: Webserver, platform: Platform) -> Run:
    """The landing sensor's run for a new picture, which deployed its model."""
    if is_kept():
        pytest.skip("this test deletes the platform")
    before = {run.id for run in dagster.runs()}
    buffer = io.BytesIO()
    Image.frombytes("RGB", (32, 32), secrets.token_bytes(32 * 32 * 3)).save(buffer, "PNG")
    platform.store().write(f"{RAW_BUCKET}/{LANDING_PREFIX}cat/camera.png", buffer.getvalue())
    run = wait_for("the sensor's run", lambda: next((run for run in dagster.runs() if run.id not in before), None))
    wait_until_succeeded(dagster, run.id)
    worker = ("job", "-l", f"dagster/run-id={run.id}")
    kubectl("-n", NAMESPACE, "wait", "--for=condition=complete", *worker, PATIENCE)  # it uploads its logs last
    return run


def wait_until_succeeded(dagster: Webserver, run_id: str) -> None:
    wait_for(f"the end of run {run_id}", lambda: dagster.run(run_id).status in FINISHED, RETRAIN_SECONDS)
    assert dagster.run(run_id).status == "SUCCESS", dagster.failures(run_id)


def everything_kept(dagster: Webserver, platform: Platform) -> dict[str, Any]:
    """What a user would miss."""
    mlflow = MlflowClient(platform.mlflow_uri)
    experiments = [each.experiment_id for each in mlflow.search_experiments()]
    store = platform.store()
    return {
        "runs": {(run.id, run.status) for run in dagster.runs()},
        "materializations": {name: dagster.materializations(f"cifar10/{name}") for name in ASSETS},
        "cursor": dagster.cursor("landing_sensor"),
        "objects": {bucket: {(o.key, o.size) for o in store.at(bucket).list()} for bucket in ALL_BUCKETS},
        "MLflow's runs": {run.info.run_id: run.data.metrics for run in mlflow.search_runs(experiments)},
        "registered models": {
            (version.name, version.version, version.run_id, *version.aliases)
            for version in mlflow.search_model_versions()
        },
    }


def replace_platform() -> None:
    """Delete both namespaces, and with them all volumes, and install the platform and Dagster again."""
    kubectl("delete", "namespace", NAMESPACE, PLATFORM_NAMESPACE, PATIENCE)
    install_platform()
    install(PASSING)


def wait_until_loaded(dagster: Webserver) -> None:
    """The webserver and the code location may just have started."""

    def is_loaded() -> bool:
        with suppress(OSError, AssertionError):
            return dagster.locations() == {"cifar": "RepositoryLocation"}
        return False

    wait_for("the code location", is_loaded)


def commands(heading: str, backup: S3Server) -> str:
    """Those of a section, with a backup server on loopback and a free port in place of 9000."""
    (text,) = page.blocks(heading, PAGE)
    port = free_port()
    for printed, used in (
        ("https://backup.example.com", backup.endpoint),
        ("AWS_ACCESS_KEY_ID=...", f"AWS_ACCESS_KEY_ID={backup.access_key}"),
        ("AWS_SECRET_ACCESS_KEY=...", f"AWS_SECRET_ACCESS_KEY={backup.secret_key}"),
        ("svc/minio 9000", f"svc/minio {port}:9000"),
        ("localhost:9000", f"localhost:{port}"),
    ):
        assert printed in text
        text = text.replace(printed, used)
    return text


@pytest.mark.thorough
@pytest.mark.s3
def test_a_restored_backup_has_everything(
    dagster: Webserver, platform: Platform, s3_server: S3Server, tmp_path: Path
) -> None:
    """After both namespaces, and with them all volumes, were deleted."""
    run = retrained_on_a_picture(dagster, platform)
    before = everything_kept(dagster, platform)
    assert before["cursor"]
    assert before["registered models"]
    page.run(commands("Backup", s3_server), tmp_path)

    replace_platform()
    (folder,) = (tmp_path / "backup").iterdir()
    page.run(commands("Restore", s3_server).replace("2026-11-27", folder.name), tmp_path)
    wait_until_loaded(dagster)
    assert everything_kept(dagster, platform) == before
    ticks = dagster.num_ticks("landing_sensor")
    wait_for("two more looks", lambda: dagster.num_ticks("landing_sensor") >= ticks + 2)
    assert len(dagster.runs()) == len(before["runs"])
    assert any(text for text, _ in dagster.compute_logs(run.id).values())
    wait_until_succeeded(dagster, dagster.launch("deploy"))
