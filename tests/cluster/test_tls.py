"""k8s/overlays/tls with a real cert-manager, in two namespaces of its own.

Needs cert-manager, and `make -f images/images.mk image-dagster image-mlflow LOAD=...`.
"""

import json
import re
import subprocess
import urllib.request
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import yaml

from resources.errors import StoreError
from resources.object_store.s3 import S3Store
from resources.object_store.s3_settings import S3Connection
from tests.cluster.kinds import K8S, is_installed
from tests.cluster.kubectl import PATIENCE, forwarded, kubectl, missing_images, temporary_namespace
from tests.cluster.platform import secret
from tests.fixtures.ports import free_port

IMAGES = ("localhost/cifar-dagster:dev", "localhost/cifar-mlflow:dev")


@dataclass(frozen=True)
class SecurePlatform:
    namespace: str
    platform: str
    authority: Path
    """The authority's certificate, as docs/kubernetes.md copies it."""


@pytest.fixture(scope="module")
def secure(core: Any, tmp_path_factory: pytest.TempPathFactory) -> Iterator[SecurePlatform]:
    """The overlay, in namespaces with other names."""
    if not is_installed("cert-manager.io"):
        pytest.skip("the cluster has no cert-manager")
    if missing := missing_images(*IMAGES):
        pytest.skip(f"the cluster lacks {' and '.join(missing)}")
    with temporary_namespace("tls") as namespace, temporary_namespace("tls-platform") as platform:
        text = kubectl("kustomize", str(K8S / "overlays/tls"))
        text = re.sub(r"((?:namespace|metadata\.name): |minio\.)cifar-platform\b", rf"\g<1>{platform}", text)
        text = re.sub(r"((?:namespace|metadata\.name): )cifar$", rf"\g<1>{namespace}", text, flags=re.MULTILINE)
        objects = [o for o in yaml.safe_load_all(text) if o["kind"] != "Namespace"]
        subprocess.run([str(K8S / "create-secrets"), platform, namespace], check=True)
        kubectl("apply", "--server-side", "-f", "-", text=yaml.safe_dump_all(objects))
        inside = ["-n", platform]
        kubectl(*inside, "wait", "--for=condition=Ready", "certificate/minio", PATIENCE)
        authority = tmp_path_factory.mktemp("authority") / "ca.crt"
        authority.write_text(secret(platform, "minio-tls")["ca.crt"])
        kubectl("-n", namespace, "create", "configmap", "cifar-ca", f"--from-file={authority}")
        kubectl(*inside, "wait", "--for=condition=complete", "job/store-setup", PATIENCE)
        kubectl(*inside, "rollout", "status", "deploy/mlflow", PATIENCE)
        yield SecurePlatform(namespace, platform, authority)


@pytest.mark.thorough
def test_store_setup_mlflow_and_a_client_outside_verify_minio(
    secure: SecurePlatform, monkeypatch: pytest.MonkeyPatch
) -> None:
    keys = secret(secure.platform, "object-store")
    minio, mlflow = free_port(), free_port()
    connection = S3Connection(
        f"https://localhost:{minio}", keys["AWS_ACCESS_KEY_ID"], keys["AWS_SECRET_ACCESS_KEY"], pause_seconds=0
    )
    with (
        forwarded(secure.platform, "svc/minio", minio, 9000),
        forwarded(secure.platform, "svc/mlflow", mlflow, 5000),
    ):
        address = f"http://127.0.0.1:{mlflow}/api/2.0/mlflow-artifacts/artifacts/1/note.txt"
        urllib.request.urlopen(urllib.request.Request(address, b"from MLflow", method="PUT"), timeout=60).close()
        monkeypatch.setenv("AWS_CA_BUNDLE", str(secure.authority))
        assert S3Store(connection).read("mlflow/1/note.txt") == b"from MLflow"
        monkeypatch.delenv("AWS_CA_BUNDLE")
        with pytest.raises(StoreError, match="AWS_CA_BUNDLE"):
            S3Store(connection).read("mlflow/1/note.txt")


@pytest.mark.thorough
def test_a_pod_of_dagster_verifies_minio(secure: SecurePlatform) -> None:
    patch = yaml.safe_load((K8S / "dagster/pods.patch.yaml").read_text())["spec"]["template"]["spec"]
    (wait,) = patch["initContainers"]
    command = (
        "from resources.object_store.s3 import S3Store; S3Store.from_environment().ensure_buckets(['dagster-logs'])"
    )
    sources = [source for source in wait["envFrom"] if source.get("configMapRef", {}).get("name") != "dagster-settings"]
    container = {**wait, "image": IMAGES[0], "command": ["python", "-c", command], "envFrom": sources}
    volumes = [volume for volume in patch["volumes"] if volume["name"] == "ca"]
    spec = {"restartPolicy": "Never", "securityContext": patch["securityContext"], "volumes": volumes}
    # The policies of k8s/access let pods of a training reach MinIO; those for Dagster are in k8s/dagster.
    metadata = {"name": "client", "labels": {"training.kubeflow.org/job-name": "story"}}
    pod = {"apiVersion": "v1", "kind": "Pod", "metadata": metadata, "spec": {**spec, "containers": [container]}}
    inside = ["-n", secure.namespace]
    kubectl(*inside, "apply", "-f", "-", text=json.dumps(pod))
    try:
        kubectl(*inside, "wait", "--for=jsonpath={.status.phase}=Succeeded", "pod/client", PATIENCE)
    except RuntimeError as error:
        pytest.fail(f"{error}\n{kubectl(*inside, 'logs', 'client')}")
