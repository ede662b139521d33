"""The committed manifests against the real API server, its CRDs and webhooks; the Role against the real RBAC."""

import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import dagster as dg
import pytest
import yaml
from kubernetes import client as k8s

from cifar_assets.deployment import trainer_for
from resources.kubernetes.job import JobClient
from resources.object_store.resource import LocalObjectStore
from tests.cluster.conftest import Minio
from tests.cluster.kinds import K8S, TRAIN_JOB, JobKind, brief, is_installed
from tests.cluster.kubectl import kubectl, temporary_namespace, wait_for
from tests.cluster.story import ClusterStory
from tests.fixtures.settings import settings_of

GPU = "nvidia.com/gpu"
GPU_LABEL = "nvidia.com/gpu.present"
GPU_TAINT = f"{GPU}=present:NoSchedule"


def objects_in(folder: str, namespace: str) -> list[dict[str, Any]]:
    """The output of `kubectl kustomize`, moved into one existing namespace."""
    documents = [document for document in yaml.safe_load_all(kubectl("kustomize", str(K8S / folder))) if document]
    found = [document for document in documents if document["kind"] != "Namespace"]
    for document in found:
        document["metadata"]["namespace"] = namespace
        for subject in document.get("subjects", []):
            subject["namespace"] = namespace
    return found


@pytest.mark.parametrize(
    "folder", ["overlays/minikube", "overlays/gpu", "overlays/seaweedfs", "pytorchjob", "trainjob"]
)
def test_api_server_accepts_every_object(folder: str, core: Any) -> None:
    if folder == "trainjob" and not is_installed(TRAIN_JOB.client.group):
        pytest.skip("the cluster does not have Kubeflow Trainer")
    with temporary_namespace("dry-run") as namespace:
        objects = objects_in(folder, namespace)
        text = yaml.safe_dump_all(objects)
        answer = kubectl("apply", "--server-side", "--dry-run=server", "--validate=strict", "-f", "-", text=text)
    assert len(answer.splitlines()) == len(objects)


@pytest.fixture(scope="module")
def gpu_trainings(core: Any) -> dict[str, str]:
    """The settings of the overlay `gpu`."""
    (settings,) = [
        document["data"]
        for document in yaml.safe_load_all(kubectl("kustomize", str(K8S / "overlays/gpu")))
        if document["kind"] == "ConfigMap" and "TRAINER_JOB" in document["data"]
    ]
    return settings


def test_api_server_accepts_a_training_on_a_gpu(kind: JobKind, gpu_trainings: dict[str, str]) -> None:
    trainer = trainer_for(settings_of(gpu_trainings), LocalObjectStore())
    with temporary_namespace("dry-run") as namespace:
        kind.prepare(namespace, "cifar-trainer")
        manifest = kind.pipes.build_manifest(getattr(trainer, kind.key), name="training", namespace=namespace)
        kubectl("create", "--dry-run=server", "--validate=strict", "-f", "-", text=yaml.safe_dump(manifest))


@pytest.fixture
def limited(
    kind: JobKind, namespace: str, core: Any, jobs: JobClient[Any], minio: Minio, tmp_path: Path, no_jobs_left: None
) -> Iterator[ClusterStory]:
    """A story that has only the rights of the service account `dagster`."""
    objects = [each for folder in ("access", "trainjob") for each in objects_in(folder, namespace)]
    access = [each for each in objects if each["kind"] in ("ServiceAccount", "Role", "RoleBinding")]
    kubectl("apply", "--server-side", "-f", "-", text=yaml.safe_dump_all(access))
    api = k8s.ApiClient(core.api_client.configuration)
    api.set_default_header("Impersonate-User", f"system:serviceaccount:{namespace}:dagster")
    with dg.DagsterInstance.local_temp(str(tmp_path)) as instance:
        limited_client = kind.client(k8s.CustomObjectsApi(api), k8s.CoreV1Api(api))
        yield ClusterStory(kind, namespace, core, jobs, minio, instance, client=limited_client)


@brief
def test_role_is_enough_to_run_and_see_a_job(limited: ClusterStory) -> None:
    config = limited.config("epochs", "3", service_account_name="trainer")
    with limited.run(config) as result:
        assert result.success
    assert f"{limited.kind.replicas[0]}: rank 0 epoch 2" in limited.lines


def test_role_is_enough_to_explain_and_replace_a_failure(limited: ClusterStory) -> None:
    config = limited.config("fail", "3", once=True)
    with limited.run(config) as first:
        assert not first.success
        with limited.run(config, parent=first) as second:
            assert not second.success
    assert len(limited.names()) == 1


def test_role_is_enough_to_cancel(limited: ClusterStory) -> None:
    limited.when(limited.running, limited.cancel)
    with limited.run(limited.config("epochs", "600")) as result:
        assert limited.status(result) == dg.DagsterRunStatus.CANCELED
    assert limited.names() == []


@pytest.fixture
def set_gpus(core: Any) -> Iterator[Callable[[int], None]]:
    """Sets the number of GPUs of one node, labeled and tainted as nodes with GPUs are.

    The GPUs are an extended resource without a device plugin: scheduling and admission are real, no device appears.
    """
    node = next(each.metadata.name for each in core.list_node().items if not each.spec.unschedulable)
    paths = [f"/status/{kind}/{GPU.replace('/', '~1')}" for kind in ("capacity", "allocatable")]

    def change(operation: str, **value: str) -> None:
        changes = [{"op": operation, "path": path, **value} for path in paths]
        kubectl("patch", "node", node, "--subresource=status", "--type=json", f"--patch={json.dumps(changes)}")

    def set_number(count: int) -> None:
        change("add", value=str(count))
        wait_for("the GPUs", lambda: core.read_node(node).status.allocatable.get(GPU) == str(count))

    kubectl("label", "node", node, f"{GPU_LABEL}=true")
    kubectl("taint", "node", node, GPU_TAINT)
    try:
        yield set_number
    finally:
        kubectl("taint", "node", node, f"{GPU_TAINT}-")
        kubectl("label", "node", node, f"{GPU_LABEL}-")
        if GPU in core.read_node(node).status.capacity:
            change("remove")


def test_training_of_the_overlay_gpu_waits_for_a_node_with_a_free_gpu(
    limited: ClusterStory, gpu_trainings: dict[str, str], set_gpus: Callable[[int], None]
) -> None:
    """Only the requests for CPU and memory, which a small node may lack, are not those of the overlay."""
    settings = json.loads(gpu_trainings["TRAINER_JOB"])
    small = {name: value for name, value in settings.items() if name not in ("cpu", "memory")}
    no_gpu = limited.failure(limited.config("epochs", "1", **small))
    set_gpus(1)
    with limited.run(limited.config("epochs", "2", **small)) as result:
        assert result.success
    one_is_not_enough = limited.failure(limited.config("epochs", "600", **small, replicas=2))
    for error in (no_gpu, one_is_not_enough):
        assert "unschedulable" in error
        assert f"Insufficient {GPU}" in error


@pytest.mark.parametrize(
    "question",
    [
        ["create", "pods"],
        ["get", "secrets"],
        ["create", "pods/exec"],
        ["update", "pytorchjobs.kubeflow.org"],
        ["deletecollection", "pytorchjobs.kubeflow.org"],
        ["update", "trainjobs.trainer.kubeflow.org"],
        ["create", "jobsets.jobset.x-k8s.io"],
    ],
    ids=" ".join,
)
def test_role_allows_nothing_else(limited: ClusterStory, question: list[str]) -> None:
    account = f"system:serviceaccount:{limited.namespace}:dagster"
    review = {
        "apiVersion": "authorization.k8s.io/v1",
        "kind": "SubjectAccessReview",
        "spec": {"user": account, "resourceAttributes": _attributes(limited.namespace, *question)},
    }
    answer = yaml.safe_load(kubectl("create", "-f", "-", "-o", "yaml", text=yaml.safe_dump(review)))
    assert answer["status"]["allowed"] is False


def _attributes(namespace: str, verb: str, resource: str) -> dict[str, str]:
    name, _, group = resource.partition(".")
    kind, _, subresource = name.partition("/")
    return {"namespace": namespace, "verb": verb, "resource": kind, "group": group, "subresource": subresource}
