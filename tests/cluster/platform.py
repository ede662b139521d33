"""The platform in a cluster, set up and removed by the commands of docs/kubernetes.md.

TEST_OVERLAY names another overlay than minikube. With `tls` or `gateway`, the tests verify its certificates.
"""

import base64
import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import pytest
import yaml

from resources.mlflow.target import CA_VARIABLE
from resources.object_store.s3 import S3Store
from resources.object_store.s3_settings import S3Connection
from tests.cluster import page
from tests.cluster.kubectl import PATIENCE, forwarded, kubectl
from tests.fixtures.ports import free_port

NAMESPACE = "cifar"
PLATFORM_NAMESPACE = "cifar-platform"
KEEP_VARIABLE = "TEST_KEEP_PLATFORM"
OVERLAY = os.environ.get("TEST_OVERLAY", "minikube")
STORE = "seaweedfs" if OVERLAY == "seaweedfs" else "minio"
"""Name of the object store's Deployment."""
IS_SECURE = OVERLAY in ("tls", "gateway")


@dataclass(frozen=True)
class Platform:
    """A running platform, reached through forwarded ports."""

    store_port: int
    mlflow_port: int
    namespace: str = NAMESPACE
    """Namespace of Dagster, its jobs and the service."""
    platform_namespace: str = PLATFORM_NAMESPACE
    authority: Path | None = None
    """File of the certificate authority, if MinIO and MLflow use HTTPS."""

    @classmethod
    @contextmanager
    def deployed(cls) -> Iterator["Platform"]:
        """Sets it up, and removes it at the end. With TEST_KEEP_PLATFORM=1 it stays, and the next call finds it.

        Skips if the namespaces belong to someone else.
        """
        found = kubectl("get", "namespaces", NAMESPACE, PLATFORM_NAMESPACE, "--ignore-not-found", "-o", "name")
        if found and not is_kept():
            pytest.skip(f"the cluster has {' and '.join(found.split())} already; {KEEP_VARIABLE}=1 tests in them")
        try:
            if not found:
                install_platform()
            _wait_until_ready()
            with cls.reached(authority=page.ROOT / ".cifar/ca.crt" if IS_SECURE else None) as platform:
                yield platform
        finally:
            if not is_kept():
                if "serving.kserve.io" in kubectl("api-versions"):
                    page.run(page.REMOVAL)
                kubectl("delete", "namespace", NAMESPACE, PLATFORM_NAMESPACE, "--ignore-not-found", PATIENCE)

    @classmethod
    @contextmanager
    def reached(
        cls, namespace: str = NAMESPACE, platform: str = PLATFORM_NAMESPACE, authority: Path | None = None
    ) -> Iterator["Platform"]:
        """A running platform in these namespaces, whose authority this process trusts."""
        found = cls(free_port(), free_port(), namespace, platform, authority)
        with (
            pytest.MonkeyPatch.context() as environment,
            forwarded(platform, "svc/minio", found.store_port, 9000),
            forwarded(platform, "svc/mlflow", found.mlflow_port, 5000),
        ):
            for name, value in found.trust().items():
                environment.setenv(name, value)
            yield found

    def trust(self) -> dict[str, str]:
        """Environment of a client that verifies the certificates."""
        return dict.fromkeys(("AWS_CA_BUNDLE", CA_VARIABLE), str(self.authority)) if self.authority else {}

    @property
    def store_url(self) -> str:
        return f"{self._scheme}://127.0.0.1:{self.store_port}"

    def store(self) -> S3Store:
        """With all rights, so that a test can store what it needs."""
        keys = secret(self.platform_namespace, "object-store")
        return S3Store(S3Connection(self.store_url, keys["AWS_ACCESS_KEY_ID"], keys["AWS_SECRET_ACCESS_KEY"]))

    @property
    def mlflow_uri(self) -> str:
        return f"{self._scheme}://127.0.0.1:{self.mlflow_port}"

    @property
    def _scheme(self) -> str:
        return "https" if self.authority else "http"

    def environment(self) -> dict[str, str]:
        """For a Dagster outside the cluster, with the rights that it has inside."""
        settings = yaml.safe_load(kubectl("-n", self.namespace, "get", "configmap", "cifar-platform", "-o", "yaml"))[
            "data"
        ]
        return {
            **settings,
            "DAGSTER_DEPLOYMENT": "kubernetes",
            "AWS_ENDPOINT_URL": self.store_url,
            **secret(self.namespace, "object-store-dagster"),
            "MLFLOW_TRACKING_URI": self.mlflow_uri,
            **self.trust(),
            "TRAINER_NAMESPACE": self.namespace,
            "TRAINER_STORE_ENDPOINT_URL": settings["AWS_ENDPOINT_URL"],
            "TRAINER_MLFLOW_TRACKING_URI": settings["MLFLOW_TRACKING_URI"],
        }


def install_platform(checkout: Path = page.ROOT) -> None:
    page.run(page.INSTALLATION.replace("overlays/minikube", f"overlays/{OVERLAY}"), checkout)
    if IS_SECURE:
        page.run(page.AUTHORITY.replace("overlays/tls", f"overlays/{OVERLAY}"), checkout)


def is_kept() -> bool:
    return os.environ.get(KEEP_VARIABLE) == "1"


def secret(namespace: str, name: str) -> dict[str, str]:
    """The decoded values of a Secret."""
    data = yaml.safe_load(kubectl("-n", namespace, "get", "secret", name, "-o", "yaml"))["data"]
    return {key: base64.b64decode(value).decode() for key, value in data.items()}


def _wait_until_ready() -> None:
    inside = ["-n", PLATFORM_NAMESPACE]
    kubectl(*inside, "rollout", "status", f"deploy/{STORE}", PATIENCE)
    kubectl(*inside, "wait", "--for=condition=complete", "job/store-setup", PATIENCE)
    kubectl(*inside, "rollout", "status", "deploy/mlflow", PATIENCE)
