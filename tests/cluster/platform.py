"""The platform of k8s/overlays/minikube in a cluster, as docs/kubernetes.md sets it up."""

import os
import secrets
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import pytest
import yaml

from cifar_assets.object_store.s3 import S3Store
from tests.cluster.kubectl import forwarded, free_port, kubectl

OVERLAY = Path(__file__).parents[2] / "k8s" / "overlays" / "minikube"
NAMESPACE = "cifar"
PLATFORM_NAMESPACE = "cifar-platform"
KEEP_VARIABLE = "TEST_KEEP_PLATFORM"
_ACCESS_KEY = "cifar"


@dataclass(frozen=True)
class Platform:
    """A running platform, reached from here through forwarded ports."""

    secret_key: str
    store_port: int
    mlflow_port: int
    namespace: str = NAMESPACE
    """Where Dagster, its jobs and what serves are."""

    @classmethod
    @contextmanager
    def deployed(cls) -> Iterator["Platform"]:
        """Set it up, and remove it at the end. With TEST_KEEP_PLATFORM=1 it is left, and found again by the next call.

        Skips where the namespaces are someone else's.
        """
        found = kubectl("get", "namespaces", NAMESPACE, PLATFORM_NAMESPACE, "--ignore-not-found", "-o", "name")
        if found and not is_kept():
            pytest.skip(f"the cluster has {' and '.join(found.split())} already; {KEEP_VARIABLE}=1 tests in them")
        secret_key = _secret_key() if found else _apply()
        try:
            _wait_until_ready()
            platform = cls(secret_key, free_port(), free_port())
            with (
                forwarded(PLATFORM_NAMESPACE, "svc/minio", platform.store_port, 9000),
                forwarded(PLATFORM_NAMESPACE, "svc/mlflow", platform.mlflow_port, 5000),
            ):
                yield platform
        finally:
            if not is_kept():
                kubectl("delete", "namespace", NAMESPACE, PLATFORM_NAMESPACE, "--wait=true", "--timeout=200s")

    def store(self) -> S3Store:
        return S3Store.connect(f"http://127.0.0.1:{self.store_port}", _ACCESS_KEY, self.secret_key)

    @property
    def mlflow_uri(self) -> str:
        return f"http://127.0.0.1:{self.mlflow_port}"

    def environment(self) -> dict[str, str]:
        """For a Dagster that runs outside of the cluster."""
        settings = yaml.safe_load(kubectl("-n", NAMESPACE, "get", "configmap", "cifar-platform", "-o", "yaml"))["data"]
        return {
            **settings,
            "DAGSTER_DEPLOYMENT": "kubernetes",
            "AWS_ENDPOINT_URL": f"http://127.0.0.1:{self.store_port}",
            "AWS_ACCESS_KEY_ID": _ACCESS_KEY,
            "AWS_SECRET_ACCESS_KEY": self.secret_key,
            "MLFLOW_TRACKING_URI": self.mlflow_uri,
            "TRAINER_NAMESPACE": NAMESPACE,
            "TRAINER_STORE_ENDPOINT_URL": settings["AWS_ENDPOINT_URL"],
            "TRAINER_MLFLOW_TRACKING_URI": settings["MLFLOW_TRACKING_URI"],
        }


def is_kept() -> bool:
    return os.environ.get(KEEP_VARIABLE) == "1"


def _apply() -> str:
    secret_key = secrets.token_hex(20)
    for namespace in (PLATFORM_NAMESPACE, NAMESPACE):
        kubectl("create", "namespace", namespace)
        keys = {"AWS_ACCESS_KEY_ID": _ACCESS_KEY, "AWS_SECRET_ACCESS_KEY": secret_key}
        secret = {"apiVersion": "v1", "kind": "Secret", "metadata": {"name": "object-store"}, "stringData": keys}
        kubectl("-n", namespace, "create", "-f", "-", text=yaml.safe_dump(secret))
    kubectl("apply", "--server-side", "-k", str(OVERLAY))
    return secret_key


def _secret_key() -> str:
    template = "{{.data.AWS_SECRET_ACCESS_KEY | base64decode}}"
    return kubectl("-n", NAMESPACE, "get", "secret", "object-store", "-o", f"go-template={template}")


def _wait_until_ready() -> None:
    inside = ["-n", PLATFORM_NAMESPACE]
    kubectl(*inside, "rollout", "status", "deploy/minio", "--timeout=200s")
    kubectl(*inside, "wait", "--for=condition=complete", "job/make-buckets", "--timeout=200s")
    kubectl(*inside, "rollout", "status", "deploy/mlflow", "--timeout=200s")
