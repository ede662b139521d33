"""k8s/chart on a real cluster, in two namespaces of its own, as docs/helm.md does it.

Needs helm, and `make -f images/images.mk image-dagster image-mlflow postgres-image LOAD=...`.
"""

import json
import secrets
import shutil
import subprocess
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from tests.cluster.kinds import K8S
from tests.cluster.kubectl import PATIENCE, PATIENCE_SECONDS, kubectl, missing_images, temporary_namespace, wait_for

IMAGES = ("localhost/cifar-dagster:dev", "localhost/cifar-mlflow:dev", "localhost/cifar-postgres:test")
WORKLOADS = ("minio", "mlflow", "dagster-code", "dagster-daemon", "dagster-webserver", "dagster-postgresql")
KINDS = "deployments,statefulsets,jobs,services,configmaps,serviceaccounts,roles,rolebindings,networkpolicies"
OF_EVERY_NAMESPACE = {"serviceaccount/default", "configmap/kube-root-ca.crt"}


@dataclass(frozen=True)
class Release:
    """What Helm does with one release of the chart."""

    chart: Path
    namespace: str
    platform: str

    def helm(self, verb: str, *arguments: str, values: dict[str, Any] | None = None) -> None:
        waits = ["--wait", f"--timeout={PATIENCE_SECONDS:.0f}s"]
        command = ["helm", "-n", self.namespace, verb, "cifar", *arguments, *waits]
        if values is not None:
            command += ["-f", "-"]
        done = subprocess.run(command, input=json.dumps(values), capture_output=True, text=True)
        assert done.returncode == 0, f"{done.stderr}\n{self.pods()}"

    def pods(self) -> str:
        return "".join(kubectl("-n", each, "get", "pods,events") for each in (self.namespace, self.platform))

    def threshold(self) -> str:
        """The gate's threshold, as the running code location has it."""
        inside = ["-n", self.namespace]
        pods = kubectl(*inside, "get", "pods", "-l", "app.kubernetes.io/component=code", "-o", "name").split()
        if len(pods) != 1:
            return f"{len(pods)} pods"  # the earlier revision's is about to end
        return kubectl(*inside, "exec", pods[0], "-c", "dagster", "--", "printenv", "ACCURACY_THRESHOLD").strip()

    def objects(self) -> set[str]:
        answers = [kubectl("-n", each, "get", KINDS, "-o", "name") for each in (self.namespace, self.platform)]
        return {name.replace(".apps/", "/") for name in "".join(answers).split()} - OF_EVERY_NAMESPACE

    def setups(self) -> list[str]:
        return kubectl("-n", self.platform, "get", "jobs", "-o", "name").split()


@pytest.fixture
def release(core: Any, tmp_path: Path) -> Iterator[Release]:
    if not shutil.which("helm"):
        pytest.skip("no helm")
    if missing := missing_images(*IMAGES):
        pytest.skip(f"the cluster lacks {' and '.join(missing)}")
    chart = tmp_path / "chart"
    subprocess.check_call(["make", "chart", f"CHART={chart}"], cwd=K8S.parent)
    with temporary_namespace("chart") as namespace, temporary_namespace("chart-platform") as platform:
        subprocess.run([str(K8S / "create-secrets"), platform, namespace], check=True)
        password = f"--from-literal=postgresql-password={secrets.token_hex(20)}"
        kubectl("-n", namespace, "create", "secret", "generic", "dagster-postgresql-secret", password)
        yield Release(chart, namespace, platform)


@pytest.mark.thorough
def test_helm_installs_upgrades_rolls_back_and_removes_the_project(release: Release) -> None:
    values = {
        "platformNamespace": release.platform,
        "images": {"docker.io/library/postgres:17": "localhost/cifar-postgres:test"},
        "resources": {name: {"requests": {"cpu": "10m"}} for name in WORKLOADS},
        "settings": {"CIFAR10_SOURCE": "synthetic"},
    }
    release.helm("install", str(release.chart), "--wait-for-jobs", values=values)
    wait_for("the threshold of the manifests", lambda: release.threshold() == "0.85")
    assert release.setups() == ["job.batch/store-setup-1"]

    changed = "--set-string=settings.ACCURACY_THRESHOLD=0.5"
    release.helm("upgrade", str(release.chart), "--reuse-values", "--wait-for-jobs", changed)
    wait_for("the new threshold", lambda: release.threshold() == "0.5")
    assert release.setups() == ["job.batch/store-setup-2"]

    release.helm("rollback", "1", "--wait-for-jobs")
    wait_for("the earlier threshold", lambda: release.threshold() == "0.85")
    assert release.setups() == ["job.batch/store-setup-1"]

    release.helm("uninstall")
    wait_for(f"removal of {release.objects()}", lambda: not release.objects())
    for namespace, claims in (
        (release.platform, {"minio", "mlflow"}),
        (release.namespace, {"data-dagster-postgresql-0"}),
    ):
        kept = kubectl("-n", namespace, "get", "pvc", "-o", "name").split()
        assert kept == [f"persistentvolumeclaim/{claim}" for claim in sorted(claims)]
    kubectl("-n", release.namespace, "wait", "--for=delete", "pods", "--all", PATIENCE)
