"""docs/operations.md: its commands, as printed, on a platform with Dagster and a deployed model."""

import io
import re
import secrets
import shutil
import subprocess
import time
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

import pytest
from mlflow.tracking import MlflowClient
from PIL import Image

from cifar_assets.contracts import LANDING_PREFIX
from resources.errors import ExplainedError
from resources.object_store import RAW_BUCKET
from resources.object_store.s3 import S3Store
from resources.object_store.s3_settings import S3Connection
from resources.object_store.setup import ALL_BUCKETS
from tests.cluster import page
from tests.cluster.deployed_dagster import PASSING, deployed, install
from tests.cluster.kinds import PYTORCH_JOB, is_installed
from tests.cluster.kubectl import PATIENCE, kubectl, missing_images, temporary_namespace, wait_for
from tests.cluster.platform import (
    NAMESPACE,
    OVERLAY,
    PLATFORM_NAMESPACE,
    STORE,
    Platform,
    install_platform,
    is_kept,
    secret,
)
from tests.cluster.serving_story import DAGSTER_IMAGE, SERVER_IMAGE, asking
from tests.cluster.webserver import FINISHED, Run, Webserver
from tests.fixtures.ports import free_port
from tests.fixtures.s3 import S3Server

PAGE = "operations.md"
KINDS = {"run", "materialization", "cursor", "object", "MLflow's run", "registered model", "alias"}
ASSETS = ("raw_dataset", "processed_dataset", "trained_model", "inference_service")
TRAINING = {
    "recipe": "resnet18",
    "overrides": {"optimizer": "sgd", "width": 8, "epochs": 2, "batch_size": 64},
    "execution": {"threads": 1},
    "scale": {"cpu": "200m", "memory": "2Gi"},
}
EARLIER = "589e551"
"""Commit of the release to upgrade from. The trainer is the present one: two of them need much disk space."""
EARLIER_TAG = "before"
EARLIER_IMAGES = [
    image.replace(":dev", f":{EARLIER_TAG}") for image in (DAGSTER_IMAGE, SERVER_IMAGE, "localhost/cifar-mlflow:dev")
]
EARLIER_COMMAND = (
    f"git worktree add earlier {EARLIER}; "
    f"make -C earlier -f images/images.mk image-dagster image-server image-mlflow TAG={EARLIER_TAG} LOAD=..."
)
RETRAIN_SECONDS = 900
"""Far longer than a retraining takes."""


@pytest.fixture(scope="module")
def dagster(platform: Platform) -> Iterator[Webserver]:
    if not is_installed("serving.kserve.io"):
        pytest.skip("the cluster has no KServe")
    try:
        with deployed(platform, PASSING) as webserver:
            wait_until_loaded(webserver)
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


def launch_retraining(dagster: Webserver, seed: int) -> str:
    return dagster.launch("retrain", {"ops": {"cifar10__trained_model": {"config": {**TRAINING, "seed": seed}}}})


def trainings(phase: str) -> list[str]:
    """Pods of trainings in this phase."""
    pods = ("-n", NAMESPACE, "get", "pods", "-l", PYTORCH_JOB.client.pod_label, "-o", "name")
    return kubectl(*pods, f"--field-selector=status.phase={phase}").split()


def wait_until_succeeded(dagster: Webserver, run_id: str) -> None:
    wait_for(f"the end of run {run_id}", lambda: dagster.run(run_id).status in FINISHED, RETRAIN_SECONDS)
    assert dagster.run(run_id).status == "SUCCESS", dagster.failures(run_id)


def everything_kept(dagster: Webserver, platform: Platform) -> set[tuple[object, ...]]:
    """What a user would miss, each with its kind."""
    mlflow = MlflowClient(platform.mlflow_uri)
    experiments = [each.experiment_id for each in mlflow.search_experiments()]
    versions = mlflow.search_model_versions()
    store = platform.store()
    return {
        *(("run", run.id, run.status) for run in dagster.runs()),
        *(("materialization", name, *made) for name in ASSETS for made in dagster.materializations(f"cifar10/{name}")),
        ("cursor", dagster.cursor("landing_sensor")),
        *(("object", bucket, o.key, o.size) for bucket in ALL_BUCKETS for o in store.at(bucket).list()),
        *(
            ("MLflow's run", run.info.run_id, *sorted(run.data.metrics.items()))
            for run in mlflow.search_runs(experiments)
        ),
        *(("registered model", version.name, version.version, version.run_id) for version in versions),
        *(("alias", alias, version.name, version.version) for version in versions for alias in version.aliases),
    }


def replace_platform(checkout: Path = page.ROOT, overlay: Path = PASSING) -> None:
    """Delete both namespaces, and with them all volumes, and install the platform and Dagster again."""
    kubectl("delete", "namespace", NAMESPACE, PLATFORM_NAMESPACE, PATIENCE)
    install_platform(checkout)
    install(overlay)


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
    assert {kind for kind, *_ in before} == KINDS
    assert ("cursor", None) not in before
    page.run(commands("Backup", s3_server), tmp_path)

    replace_platform()
    (folder,) = (tmp_path / "backup").iterdir()
    page.run(commands("Restore", s3_server).replace("2026-11-27", folder.name), tmp_path)
    wait_until_loaded(dagster)
    assert everything_kept(dagster, platform) == before
    ticks = dagster.num_ticks("landing_sensor")
    wait_for("two more looks", lambda: dagster.num_ticks("landing_sensor") >= ticks + 2)
    assert {("run", run.id, run.status) for run in dagster.runs()} <= before
    assert any(text for text, _ in dagster.compute_logs(run.id).values())
    wait_until_succeeded(dagster, dagster.launch("deploy"))


@pytest.mark.thorough
def test_upgrade_keeps_everything_and_the_service_answers(
    dagster: Webserver, platform: Platform, tmp_path: Path
) -> None:
    """From the images and manifests of the commit EARLIER."""
    if missing := missing_images(*EARLIER_IMAGES):
        pytest.skip(f"the cluster lacks {' and '.join(missing)}: {EARLIER_COMMAND}")
    checkout = earlier_checkout(tmp_path)
    replace_platform(checkout, checkout / PASSING.relative_to(page.ROOT))
    wait_until_loaded(dagster)
    retrained_on_a_picture(dagster, platform)
    before = everything_kept(dagster, platform)
    with temporary_namespace("asker") as namespace:
        kubectl("label", "namespace", namespace, "cifar/asks-model=true")
        with asking(namespace, f"http://cifar10-predictor.{NAMESPACE}.svc") as tally:
            in_progress = launch_retraining(dagster, seed=1)
            wait_for("its training", lambda: trainings("Running"))
            dagster_overlay = str(PASSING.relative_to(page.ROOT))
            page.run(on_this_platform("Upgrading").replace("k8s/dagster", dagster_overlay))
            wait_until_loaded(dagster)
            wait_until_succeeded(dagster, in_progress)
            lost = before - everything_kept(dagster, platform)
            assert {kind for kind, *_ in lost} <= {"alias"}, "the new model has the champion's alias"
            wait_until_succeeded(dagster, launch_retraining(dagster, seed=2))
    assert not tally.failures
    assert len(tally.answers) == 3, "three models answered"


def on_this_platform(heading: str) -> str:
    """The commands of a section, for the overlay and the object store of the tests."""
    (text,) = page.blocks(heading, PAGE)
    return text.replace("overlays/minikube", f"overlays/{OVERLAY}").replace("deploy/minio", f"deploy/{STORE}")


@pytest.mark.thorough
def test_rotated_keys_are_rejected(dagster: Webserver, platform: Platform, served: None) -> None:
    roles = [(NAMESPACE, f"object-store-{role}") for role in ("dagster", "trainer", "server", "pipeline")]
    holders = [*roles, (PLATFORM_NAMESPACE, "object-store"), (PLATFORM_NAMESPACE, "object-store-mlflow")]
    old = [secret(*holder) for holder in holders]
    page.run(on_this_platform("Rotating the keys"))
    for keys in old:
        connection = S3Connection(platform.store_url, keys["AWS_ACCESS_KEY_ID"], keys["AWS_SECRET_ACCESS_KEY"])
        with pytest.raises(ExplainedError, match="does not belong to"):
            S3Store(connection).read("models/any")
    wait_until_loaded(dagster)
    wait_until_succeeded(dagster, launch_retraining(dagster, seed=20))


def earlier_checkout(folder: Path) -> Path:
    """The files of the commit EARLIER, whose manifests name the images EARLIER_IMAGES."""
    archive = folder / "earlier.tar"
    done = subprocess.run(["git", "archive", "-o", archive, EARLIER], cwd=page.ROOT, capture_output=True, text=True)
    if done.returncode:
        pytest.skip(f"no commit {EARLIER} here: {done.stderr}")
    checkout = folder / "earlier"
    shutil.unpack_archive(archive, checkout, filter="data")
    shutil.copytree(PASSING, checkout / PASSING.relative_to(page.ROOT))
    for path in (checkout / "k8s").rglob("kustomization.yaml"):
        text = path.read_text()
        path.write_text(re.sub(r"(newTag: |cifar-server:)dev\b", rf"\1{EARLIER_TAG}", text))
    return checkout


@dataclass(frozen=True)
class Component:
    """A component that is scaled to zero for a minute."""

    namespace: str
    target: str
    phase: str = "Running"
    """Phase of the training's pod when the outage begins."""

    def scale(self, replicas: int) -> None:
        kubectl("-n", self.namespace, "scale", self.target, f"--replicas={replicas}")

    def wait_until_back(self) -> None:
        kubectl("-n", self.namespace, "rollout", "status", self.target, PATIENCE)


COMPONENTS = {
    "nothing": None,
    "object store": Component(PLATFORM_NAMESPACE, f"deploy/{STORE}"),
    "MLflow": Component(PLATFORM_NAMESPACE, "deploy/mlflow"),
    "Postgres": Component(NAMESPACE, "statefulset/dagster-postgresql"),
    "daemon": Component(NAMESPACE, "deploy/dagster-daemon"),
    "webserver": Component(NAMESPACE, "deploy/dagster-webserver"),
    "code location": Component(NAMESPACE, "deploy/dagster-code"),
    "training operator": Component(PYTORCH_JOB.operator[0], f"deploy/{PYTORCH_JOB.operator[1]}"),
    "KServe": Component("kserve", "deploy/kserve-controller-manager", "Succeeded"),
}
OUTAGE_SECONDS = 60


@pytest.fixture(scope="module")
def served(dagster: Webserver) -> None:
    """A model is served, so that a retraining replaces it."""
    wait_until_succeeded(dagster, launch_retraining(dagster, 0))


def ended(dagster: Webserver, run_id: str) -> Run | None:
    """The run after its end. None before, and while the webserver does not answer."""
    with suppress(OSError, AssertionError, LookupError):
        run = dagster.run(run_id)
        return run if run.status in FINISHED else None
    return None


@pytest.mark.thorough
@pytest.mark.parametrize("name", COMPONENTS)
def test_retraining_succeeds_despite_an_outage(dagster: Webserver, platform: Platform, served: None, name: str) -> None:
    """While its training runs, or while its model is deployed."""
    wait_until_loaded(dagster)
    kubectl("-n", NAMESPACE, "delete", "pytorchjobs", "--all", "--cascade=foreground", PATIENCE)
    run_id = launch_retraining(dagster, 1 + list(COMPONENTS).index(name))
    component = COMPONENTS[name]
    wait_for("the training", lambda: trainings(component.phase if component else "Running"))
    uids = ("-n", NAMESPACE, "get", "pytorchjobs", "-o", "jsonpath={.items[*].metadata.uid}")
    training = kubectl(*uids)
    if component:
        component.scale(0)
        try:
            time.sleep(OUTAGE_SECONDS)
        finally:
            component.scale(1)
            component.wait_until_back()
    run: Run = wait_for("the end", lambda: ended(dagster, run_id), RETRAIN_SECONDS)
    failures = "\n".join(dagster.failures(run_id))
    assert run.status == "SUCCESS", failures
    assert run.ended
    print(f"{name}: {run.ended - run.created:.0f} s\n{failures}")
    assert dagster.check_passed(run_id, "serves_the_model")
    assert kubectl(*uids) == training, "the training was not repeated"
