"""The committed manifests against the real API server, its CRDs and webhooks; the Role against the real RBAC."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import dagster as dg
import pytest
import yaml
from kubernetes import client as k8s

from resources.kubernetes.job import JobClient
from tests.cluster.conftest import Minio
from tests.cluster.kinds import K8S, TRAIN_JOB, JobKind, brief, is_installed
from tests.cluster.kubectl import kubectl, temporary_namespace
from tests.cluster.story import ClusterStory


def objects_in(folder: str, namespace: str) -> list[dict[str, Any]]:
    """The output of `kubectl kustomize`, moved into one existing namespace."""
    documents = [document for document in yaml.safe_load_all(kubectl("kustomize", str(K8S / folder))) if document]
    found = [document for document in documents if document["kind"] != "Namespace"]
    for document in found:
        document["metadata"]["namespace"] = namespace
        for subject in document.get("subjects", []):
            subject["namespace"] = namespace
    return found


@pytest.mark.parametrize("folder", ["overlays/minikube", "overlays/gpu", "pytorchjob", "trainjob"])
def test_api_server_accepts_every_object(folder: str, core: Any) -> None:
    if folder == "trainjob" and not is_installed(TRAIN_JOB.client.group):
        pytest.skip("the cluster does not have Kubeflow Trainer")
    with temporary_namespace("dry-run") as namespace:
        objects = objects_in(folder, namespace)
        text = yaml.safe_dump_all(objects)
        answer = kubectl("apply", "--server-side", "--dry-run=server", "--validate=strict", "-f", "-", text=text)
    assert len(answer.splitlines()) == len(objects)


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
