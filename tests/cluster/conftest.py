"""A temporary namespace with an object store, on the cluster that KUBECONFIG names.

Stories need the image of tests/cluster/story_image: `make -f images/images.mk story-image LOAD=...`.
"""

import os
import shutil
import subprocess
from collections.abc import Collection, Iterator
from typing import Any

import pytest
import yaml
from kubernetes import client as k8s
from kubernetes import config as k8s_config

from resources.kubernetes.job import JobClient
from resources.object_store.s3 import S3Store
from resources.object_store.s3_settings import S3Connection
from tests.cluster.kinds import EVERY_STORY, KINDS, STORE_SECRET, JobKind, is_installed
from tests.cluster.kubectl import PATIENCE, forwarded, kubectl, temporary_namespace, wait_for
from tests.cluster.platform import NAMESPACE, PLATFORM_NAMESPACE, Platform, is_kept
from tests.fixtures.ports import free_port

MINIO_IMAGE = os.environ.get("TEST_MINIO_IMAGE", "quay.io/minio/minio:RELEASE.2025-09-07T16-13-09Z")
_KEYS = {"access_key": "story-access", "secret_key": "story-secret-key"}


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        if "tests/cluster" in str(item.path):
            item.add_marker(pytest.mark.cluster)
            item.add_marker(pytest.mark.timeout(1800))  # longer than all waits of a passing test


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(item: pytest.Item) -> Iterator[None]:
    """Adds the namespace's state to the report of a failed test."""
    report: Any = yield
    name = getattr(item, "funcargs", {}).get("namespace")
    if report.when != "teardown" and report.failed and name:
        report.sections.append((f"state of namespace {name}", dump(name)))
    return report


def dump(namespace: str) -> str:
    parts, jobs = [], ",".join(job_plurals())
    for arguments in (
        ["get", f"pods,{jobs},services", "-o", "wide"],
        ["get", "events", "--sort-by=.lastTimestamp"],
        ["get", jobs, "-o", "yaml"],
    ):
        command = ["kubectl", "--request-timeout=30s", "-n", namespace, *arguments]
        done = subprocess.run(command, capture_output=True, text=True)
        parts.append(f"$ {' '.join(command)}\n{done.stdout}{done.stderr}"[-20_000:])
    return "\n".join(parts)


@pytest.fixture(scope="session")
def core() -> Any:
    """The cluster's API. Skips, with the reason, if there is none or it lacks the training operator."""
    if not shutil.which("kubectl"):
        pytest.skip("no kubectl")
    try:
        api = k8s_config.new_client_from_config()
        version: Any = k8s.VersionApi(api).get_code(_request_timeout=30)
    except Exception as error:
        pytest.skip(f"no cluster answers (KUBECONFIG={os.environ.get('KUBECONFIG')}): {str(error)[:200]}")
    names: Any = k8s.ApisApi(api).get_api_versions()
    if "kubeflow.org" not in {group.name for group in names.groups}:
        pytest.skip(f"the cluster (Kubernetes {version.git_version}) has no training operator")
    return k8s.CoreV1Api(api)


@pytest.fixture(params=EVERY_STORY)
def kind(request: pytest.FixtureRequest, core: Any) -> JobKind:
    """The kind of job of a story; skips if the cluster lacks it."""
    kind: JobKind = request.param
    if not is_installed(kind.client.group):
        pytest.skip(f"the cluster does not have {kind.client.operator}")
    return kind


@pytest.fixture
def jobs(kind: JobKind, namespace: str) -> JobClient[Any]:
    """Client of the kind, with what its stories need in the namespace."""
    kind.prepare(namespace)
    return kind.client.production()


def job_plurals() -> list[str]:
    """The kinds of job that the cluster has, as kubectl names them."""
    return [f"{each.client.plural}.{each.client.group}" for each in KINDS if is_installed(each.client.group)]


def everything(*, outside: Collection[str] = ()) -> set[str]:
    """Namespace, kind and name of what a test could leave behind, outside of these namespaces."""
    kinds = "namespaces,persistentvolumes,persistentvolumeclaims,clusterroles,clusterrolebindings"
    line = r'jsonpath={range .items[*]}{.metadata.namespace}/{.kind}/{.metadata.name}{"\n"}{end}'
    found = kubectl("get", ",".join([kinds, *job_plurals()]), "-A", "-o", line, "--ignore-not-found").split()
    return {each for each in found if each.partition("/")[0] not in outside}


@pytest.fixture(scope="session")
def namespace(core: Any) -> Iterator[str]:
    others = (NAMESPACE, PLATFORM_NAMESPACE)  # the fixture `platform` empties these, perhaps later
    before = everything(outside=others)
    with temporary_namespace("pytorch-job-test") as name:
        yield name
    left = everything(outside=others) - before
    wait_for(f"removal of {left}", lambda: everything(outside=others) <= before)


class Minio:
    """An object store in the namespace, reached through a forwarded port."""

    def __init__(self, namespace: str, port: int):
        self.namespace = namespace
        self.port = port

    def apply(self) -> None:
        pod_env = [
            {"name": "MINIO_ROOT_USER", "value": _KEYS["access_key"]},
            {"name": "MINIO_ROOT_PASSWORD", "value": _KEYS["secret_key"]},
        ]
        container = {"name": "minio", "image": MINIO_IMAGE, "args": ["server", "/data"], "env": pod_env}
        container["volumeMounts"] = [{"name": "data", "mountPath": "/data"}]
        container["readinessProbe"] = {"tcpSocket": {"port": 9000}, "periodSeconds": 1}
        container["resources"] = {"requests": {"cpu": "50m", "memory": "128Mi"}}
        labels = {"app": "minio"}
        secret = {
            "AWS_ENDPOINT_URL": f"http://minio.{self.namespace}.svc:9000",
            "AWS_ACCESS_KEY_ID": _KEYS["access_key"],
            "AWS_SECRET_ACCESS_KEY": _KEYS["secret_key"],
        }
        claim = {"accessModes": ["ReadWriteOnce"], "resources": {"requests": {"storage": "1Gi"}}}
        volume = {"name": "data", "persistentVolumeClaim": {"claimName": "minio"}}
        template = {"metadata": {"labels": labels}, "spec": {"containers": [container], "volumes": [volume]}}
        objects = [
            {"apiVersion": "v1", "kind": "Secret", "metadata": {"name": STORE_SECRET}, "stringData": secret},
            {"apiVersion": "v1", "kind": "PersistentVolumeClaim", "metadata": {"name": "minio"}, "spec": claim},
            {
                "apiVersion": "v1",
                "kind": "Service",
                "metadata": {"name": "minio"},
                "spec": {"selector": labels, "ports": [{"port": 9000}]},
            },
            {
                "apiVersion": "apps/v1",
                "kind": "Deployment",
                "metadata": {"name": "minio"},
                "spec": {"selector": {"matchLabels": labels}, "template": template, "strategy": {"type": "Recreate"}},
            },
        ]
        kubectl("-n", self.namespace, "apply", "-f", "-", text=yaml.safe_dump_all(objects))

    def wait_until_ready(self) -> None:
        kubectl("-n", self.namespace, "rollout", "status", "deploy/minio", PATIENCE)

    def scale(self, replicas: int) -> None:
        kubectl("-n", self.namespace, "scale", "deploy/minio", f"--replicas={replicas}")

    @property
    def endpoint(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    def store(self) -> S3Store:
        return S3Store(S3Connection(self.endpoint, _KEYS["access_key"], _KEYS["secret_key"]))

    def environment(self) -> dict[str, str]:
        return {
            "AWS_ENDPOINT_URL": self.endpoint,
            "AWS_ACCESS_KEY_ID": _KEYS["access_key"],
            "AWS_SECRET_ACCESS_KEY": _KEYS["secret_key"],
        }


@pytest.fixture(scope="session")
def minio(namespace: str) -> Iterator[Minio]:
    server = Minio(namespace, free_port())
    server.apply()
    server.wait_until_ready()
    with forwarded(namespace, "svc/minio", server.port, 9000):
        server.store().ensure_buckets(["stories"])
        yield server


@pytest.fixture
def no_jobs_left(namespace: str, core: Any) -> Iterator[None]:
    """Deletes the jobs of a test, so that the next one has the whole node."""
    yield
    kubectl("-n", namespace, "delete", ",".join(job_plurals()), "--all", "--wait=true", PATIENCE)
    for kind in KINDS:
        selector = ["-l", kind.client.pod_label, "--ignore-not-found"]
        kubectl("-n", namespace, "delete", "pods", *selector, "--grace-period=0", "--force")
        wait_for("removal of pods", lambda kind=kind: not pods_of(core, namespace, kind))


def pods_of(core: Any, namespace: str, kind: JobKind) -> list[Any]:
    return core.list_namespaced_pod(namespace, label_selector=kind.client.pod_label).items


@pytest.fixture(scope="session")
def platform(core: Any) -> Iterator[Platform]:
    """MinIO and MLflow of the overlay `minikube`, and the namespace for Dagster and its jobs."""
    before = everything()
    with Platform.deployed() as deployed:
        yield deployed
    if not is_kept():
        wait_for(f"removal of {everything() - before}", lambda: everything() <= before)
