"""raw_dataset, processed_dataset and trained_model on a real cluster by `dagster asset materialize`.

Needs the images of images.mk in the cluster. The trainings are small; docs/kubernetes.md has the figures of a real one.
"""

import json
import os
import shutil
import subprocess
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import dagster as dg
import pytest
from mlflow.tracking import MlflowClient

from cifar_assets.assets.record import data_version
from cifar_assets.contracts import MODEL_NAME
from cifar_assets.model_package import METRICS_FILE, PERFORMANCE_FILE, ModelManifest, read_json, read_manifest
from resources.kubernetes.naming import RUN_ID_LABEL
from resources.mlflow.resource import RUN_ID_TAG
from resources.object_store.s3 import S3Store
from tests.cluster.conftest import job_plurals
from tests.cluster.kinds import K8S, TRAIN_JOB, JobKind, brief
from tests.cluster.kubectl import PATIENCE, kubectl, wait_for
from tests.cluster.platform import PLATFORM_NAMESPACE, Platform
from tests.cluster.queue import QUEUE, other_work, queue_with
from tests.fixtures.cifar10 import PROCESSED_DATASET, RAW_DATASET, TRAINED_MODEL
from tests.fixtures.workspace import ROOT, Workspace

DATA = "cifar10/raw_dataset,cifar10/processed_dataset"
MODEL = "cifar10/trained_model"
OVERRIDES = {
    "optimizer": "sgd",
    "width": 8,
    "epochs": 4,
    "batch_size": 32,
    "learning_rate": 0.1,
    "validate_every": 1,
}
COMMAND_SECONDS = 900
"""Far longer than any command takes."""
POD = {"cpu": "200m", "memory": "2Gi"}
SECOND = {
    "PyTorchJob": "training.kubeflow.org/replica-type=worker,training.kubeflow.org/job-role!=master",
    "TrainJob": "jobset.sigs.k8s.io/jobset-name,batch.kubernetes.io/job-completion-index=1",
}
"""Labels of the second pod of a training."""


def training(**changes: Any) -> dict[str, Any]:
    config = {
        "recipe": "resnet18",
        "overrides": OVERRIDES,
        "execution": {"threads": 1, "checkpoint_every_steps": 10},
        "scale": POD,
    }
    return {"trained_model": {**config, **changes}}


@pytest.fixture(scope="module")
def cluster(platform: Platform, tmp_path_factory: pytest.TempPathFactory) -> Workspace:
    """A Dagster outside the cluster, with materialized data."""
    made = workspace_in(tmp_path_factory.mktemp("cluster"), platform.environment())
    materialized(made, DATA)
    return made


@pytest.fixture(scope="module")
def trained(cluster: Workspace) -> str:
    """A first training. Returns its output."""
    return materialized(cluster, MODEL, training())


@pytest.fixture(scope="module")
def models(platform: Platform) -> S3Store:
    return platform.store().at("models")


@pytest.fixture
def jobs_removed(platform: Platform) -> Iterator[None]:
    yield
    jobs = ",".join(job_plurals())
    kubectl("-n", platform.namespace, "delete", jobs, "-l", RUN_ID_LABEL, "--wait=true", PATIENCE)


@pytest.fixture
def trainer_kind(kind: JobKind, platform: Platform, jobs_removed: None) -> dict[str, str]:
    """Environment of a Dagster that trains with this kind of job."""
    if kind is TRAIN_JOB:
        kubectl("apply", "--server-side", "-k", str(K8S / "trainjob"))
    return {"TRAINER_KIND": kind.setting}


@pytest.fixture(scope="module")
def two_processes(tmp_path_factory: pytest.TempPathFactory) -> str:
    """Digest of the model that two local processes train."""
    local = workspace_in(tmp_path_factory.mktemp("local"), {"DAGSTER_DEPLOYMENT": "local"})
    materialized(local, f"{DATA},{MODEL}", training(scale={"nproc_per_node": 2}))
    return _latest_digest(local)


def test_the_model_is_in_the_store_and_in_mlflow(
    cluster: Workspace, trained: str, models: S3Store, platform: Platform
) -> None:
    digest, manifest = _latest_model(cluster, models)
    assert read_json(models.at(digest), manifest, METRICS_FILE)["test_accuracy"] > 0.5
    client = MlflowClient(platform.mlflow_uri)
    experiment = client.get_experiment_by_name("cifar10")
    assert experiment is not None
    with cluster.instance() as instance:
        run_id = instance.get_runs(limit=1)[0].run_id
    (run,) = client.search_runs([experiment.experiment_id], filter_string=f"tags.{RUN_ID_TAG} = '{run_id}'")
    assert run.info.status == "FINISHED"
    assert len(client.get_metric_history(run.info.run_id, "validation_accuracy")) == OVERRIDES["epochs"]
    assert client.list_artifacts(run.info.run_id)
    versions = client.search_model_versions(f"name = '{MODEL_NAME}' and tags.model_digest = '{digest}'")
    assert run.info.run_id in {version.run_id for version in versions}


def test_epochs_and_logs_are_in_the_run(cluster: Workspace, trained: str) -> None:
    with cluster.instance() as instance:
        observed = instance.fetch_observations(TRAINED_MODEL, limit=10).records
        finished = instance.get_latest_materialization_event(TRAINED_MODEL)
    assert finished is not None
    assert len(observed) == OVERRIDES["epochs"]
    assert min(record.timestamp for record in observed) < finished.timestamp
    assert f"[master-0] Epoch {OVERRIDES['epochs']}/{OVERRIDES['epochs']}" in trained


def test_keys_metadata_and_checks_are_those_of_the_local_deployment(
    cluster: Workspace, trained: str, tmp_path: Path
) -> None:
    local = workspace_in(tmp_path, {"DAGSTER_DEPLOYMENT": "local"})
    materialized(local, f"{DATA},{MODEL}", training())
    assert _shown(cluster) == _shown(local)


def test_model_below_the_threshold_is_rejected(cluster: Workspace, trained: str, platform: Platform) -> None:
    alone = cluster.materialize("cifar10/inference_service", ACCURACY_THRESHOLD="1")
    assert alone.returncode != 0
    assert "Not deployed: " in alone.stdout
    both = cluster.materialize(f"{MODEL},cifar10/inference_service", training(reuse=True), ACCURACY_THRESHOLD="1")
    assert both.returncode != 0
    assert "accuracy_threshold" in both.stdout
    assert "serves model" not in both.stdout
    assert kubectl("-n", platform.namespace, "get", "inferenceservices", "-o", "name", "--ignore-not-found") == ""


@brief
def test_master_and_worker_train_like_one_process(
    cluster: Workspace,
    trained: str,
    models: S3Store,
    platform: Platform,
    kind: JobKind,
    trainer_kind: dict[str, str],
    two_processes: str,
) -> None:
    """The model is that of two local processes, also with the second pod deleted during an epoch."""
    alone = _accuracy(*_latest_model(cluster, models), models)
    two = training(scale={**POD, "replicas": 2})
    output = materialized(cluster, MODEL, two, **trainer_kind)
    assert f"[{kind.replicas[1]}] Process 2 of 2 has joined over gloo" in output
    undisturbed, manifest = _latest_model(cluster, models)
    assert _accuracy(undisturbed, manifest, models) == pytest.approx(alone, abs=0.1)
    assert undisturbed == two_processes

    process = _start_until_checkpoint(cluster, models, two, trainer_kind)
    kubectl("-n", platform.namespace, "delete", "pod", "-l", SECOND[kind.name], "--wait=false")
    output, _ = process.communicate(timeout=COMMAND_SECONDS)
    assert process.returncode == 0, output
    assert _latest_digest(cluster) == undisturbed
    assert _latest(cluster).metadata["resumed_from"].value != "the start"


@pytest.mark.thorough
def test_preempted_training_makes_the_same_model(
    cluster: Workspace,
    trained: str,
    models: S3Store,
    platform: Platform,
    kind: JobKind,
    trainer_kind: dict[str, str],
) -> None:
    materialized(cluster, MODEL, training(), **trainer_kind)
    undisturbed = _latest_digest(cluster)
    job = json.loads(platform.environment()["TRAINER_JOB"])
    queued = {**trainer_kind, "TRAINER_JOB": json.dumps({**job, "queue": QUEUE})}
    with queue_with(platform.namespace, cpu="300m"):
        process = _start_until_checkpoint(cluster, models, training(), queued)
        with other_work(platform.namespace, "200m", urgent=True):
            running = ("-l", kind.client.pod_label, "--field-selector=status.phase=Running")
            pods = ("-n", platform.namespace, "get", "pods", *running, "-o", "name")
            wait_for("the end of the training's pods", lambda: not kubectl(*pods))
        output, _ = process.communicate(timeout=COMMAND_SECONDS)
        assert process.returncode == 0, output
    assert _latest_digest(cluster) == undisturbed
    metadata = _latest(cluster).metadata
    assert metadata["resumed_from"].value != "the start"
    assert float(str(metadata[f"{kind.key}_queue_seconds"].value)) > 0


def test_training_continues_without_mlflow(cluster: Workspace, models: S3Store, jobs_removed: None) -> None:
    _scale_mlflow(0)
    try:
        output = materialized(cluster, MODEL, training(seed=1))
    finally:
        _scale_mlflow(1)
    assert "Not sent to MLflow" in output
    digest, manifest = _latest_model(cluster, models)
    assert _accuracy(digest, manifest, models) > 0.5
    assert json.loads(models.read(f"{digest}/{PERFORMANCE_FILE}"))["mlflow_unsent"]


def workspace_in(folder: Path, environment: Mapping[str, str]) -> Workspace:
    shutil.copy(ROOT / "dagster.yaml", folder)
    common = {"PYTHONPATH": str(ROOT), "CIFAR10_SOURCE": "synthetic", "ACCURACY_THRESHOLD": "0.3"}
    return Workspace(folder, {**common, **environment})


def materialized(workspace: Workspace, select: str, config: Mapping[str, Any] | None = None, **environment: str) -> str:
    done = workspace.materialize(select, config, **environment)
    assert done.returncode == 0, done.stdout
    return done.stdout


def _start_until_checkpoint(
    workspace: Workspace, models: S3Store, config: Mapping[str, Any], environment: Mapping[str, str]
) -> subprocess.Popen[str]:
    """A training that has written a checkpoint and continues."""
    checkpoints = models.at("checkpoints")
    before = {info.key for info in checkpoints.list()}
    process = subprocess.Popen(
        workspace.materialize_command(MODEL, config),
        cwd=workspace.folder,
        env={**os.environ, **workspace.environment, **environment},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    wait_for("a checkpoint", lambda: {info.key for info in checkpoints.list()} - before, COMMAND_SECONDS)
    return process


def _latest(workspace: Workspace) -> dg.AssetMaterialization:
    with workspace.instance() as instance:
        event = instance.get_latest_materialization_event(TRAINED_MODEL)
    assert event is not None
    assert event.asset_materialization is not None
    return event.asset_materialization


def _latest_digest(workspace: Workspace) -> str:
    digest = data_version(_latest(workspace))
    assert digest is not None
    return digest


def _latest_model(workspace: Workspace, models: S3Store) -> tuple[str, ModelManifest]:
    digest = _latest_digest(workspace)
    return digest, read_manifest(models.at(digest), digest)


def _accuracy(digest: str, manifest: ModelManifest, models: S3Store) -> float:
    return read_json(models.at(digest), manifest, METRICS_FILE)["test_accuracy"]


def _shown(workspace: Workspace) -> dict[str, Any]:
    """Names of the metadata and checks that the UI shows for each asset."""
    shown: dict[str, Any] = {}
    with workspace.instance() as instance:
        for key in (RAW_DATASET, PROCESSED_DATASET, TRAINED_MODEL):
            event = instance.get_latest_materialization_event(key)
            assert event is not None
            assert event.asset_materialization is not None
            shown[key.to_user_string()] = sorted(event.asset_materialization.metadata)
        for run in instance.get_runs():
            for entry in instance.all_logs(run.run_id, of_type=dg.DagsterEventType.ASSET_CHECK_EVALUATION):
                evaluation = entry.get_dagster_event().asset_check_evaluation_data
                shown[f"{evaluation.asset_key.to_user_string()}:{evaluation.check_name}"] = sorted(evaluation.metadata)
    return shown


def _scale_mlflow(replicas: int) -> None:
    kubectl("-n", PLATFORM_NAMESPACE, "scale", "deploy/mlflow", f"--replicas={replicas}")
    if replicas:
        kubectl("-n", PLATFORM_NAMESPACE, "rollout", "status", "deploy/mlflow", PATIENCE)
    else:
        kubectl(
            "-n", PLATFORM_NAMESPACE, "wait", "--for=delete", "pod", "-l", "app.kubernetes.io/name=mlflow", PATIENCE
        )
