"""k8s/overlays/tls: who connects to MinIO has its authority. tests/cluster/test_tls.py applies it."""

import shutil
import subprocess
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import pytest
import yaml

from cifar_assets.deployment import serving_for, trainer_for
from resources.inference_service import DeployRequest
from resources.inference_service.kserve.manifest import build_inference_service_manifest
from resources.object_store.resource import LocalObjectStore
from resources.pytorch_job.manifest import build_pytorch_job_manifest
from tests.fixtures.settings import settings_of

K8S = Path(__file__).parents[3] / "k8s"
AUTHORITY = "/etc/cifar-ca"
pytestmark = pytest.mark.skipif(not shutil.which("kubectl"), reason="needs kubectl for kustomize")


@pytest.fixture(scope="module")
def objects() -> dict[tuple[str, str], Any]:
    """The overlay's objects and those of k8s/dagster, by kind and name."""
    texts = [
        subprocess.check_output(["kubectl", "kustomize", str(K8S / folder)], text=True)
        for folder in ("overlays/tls", "dagster")
    ]
    return {(o["kind"], o["metadata"]["name"]): o for text in texts for o in yaml.safe_load_all(text)}


@pytest.fixture
def settings(objects: dict[tuple[str, str], Any]) -> dict[str, str]:
    return objects["ConfigMap", "cifar-platform"]["data"]


def mounted(pod: dict[str, Any], container: dict[str, Any]) -> Any:
    """The volume that the container has at the authority's path."""
    (name,) = [mount["name"] for mount in container["volumeMounts"] if mount["mountPath"] == AUTHORITY]
    (volume,) = [volume for volume in pod["volumes"] if volume["name"] == name]
    return volume


def test_addresses_are_names_of_the_certificate(objects: dict[tuple[str, str], Any], settings: dict[str, str]) -> None:
    names = objects["Certificate", "minio"]["spec"]["dnsNames"]
    for data in (settings, objects["ConfigMap", "store-settings"]["data"]):
        address = urlsplit(data["AWS_ENDPOINT_URL"])
        assert (address.scheme, address.port) == ("https", 9000)
        assert address.hostname in names
        assert data["AWS_CA_BUNDLE"] == f"{AUTHORITY}/ca.crt"


def test_minio_serves_the_certificate_and_is_probed_with_https(objects: dict[tuple[str, str], Any]) -> None:
    pod = objects["Deployment", "minio"]["spec"]["template"]["spec"]
    (container,) = pod["containers"]
    assert "--certs-dir=/certs" in container["args"]
    for probe in ("readinessProbe", "livenessProbe"):
        assert container[probe]["httpGet"]["scheme"] == "HTTPS"
    (certs,) = [volume["secret"] for volume in pod["volumes"] if volume["name"] == "certs"]
    assert certs["secretName"] == objects["Certificate", "minio"]["spec"]["secretName"]
    assert {item["path"] for item in certs["items"]} == {"public.crt", "private.key", "CAs/ca.crt"}


@pytest.mark.parametrize("name", [("Deployment", "mlflow"), ("Job", "store-setup")])
def test_clients_beside_minio_have_the_authority_and_not_the_key(
    objects: dict[tuple[str, str], Any], name: tuple[str, str]
) -> None:
    pod = objects[name]["spec"]["template"]["spec"]
    (container,) = pod["containers"]
    secret = mounted(pod, container)["secret"]
    assert (secret["secretName"], [item["key"] for item in secret["items"]]) == ("minio-tls", ["ca.crt"])
    sources = [source.get("configMapRef", {}).get("name") for source in container["envFrom"]]
    variables = [variable["name"] for variable in container.get("env", ())]
    assert "store-settings" in sources or "AWS_CA_BUNDLE" in variables


@pytest.mark.parametrize("name", ["dagster-code", "dagster-daemon", "dagster-webserver"])
def test_dagster_and_its_run_workers_have_the_authority_if_it_exists(
    objects: dict[tuple[str, str], Any], name: str
) -> None:
    optional = {"name": "cifar-ca", "optional": True}
    pod = objects["Deployment", name]["spec"]["template"]["spec"]
    for container in [*pod["containers"], *pod["initContainers"]]:
        assert mounted(pod, container)["configMap"] == optional
    launcher = yaml.safe_load((K8S / "dagster/dagster.yaml").read_text())["run_launcher"]["config"]
    assert mounted(launcher, {"volumeMounts": launcher["volume_mounts"]})["configMap"] == optional


def test_trainings_and_the_model_server_have_the_authority(settings: dict[str, str]) -> None:
    valid = settings_of({key: value for key, value in settings.items() if value})
    job = trainer_for(valid, LocalObjectStore()).pytorch_job
    assert job
    training = build_pytorch_job_manifest(job, name="job", namespace="cifar")
    request = DeployRequest("s3://models/abc/", "d" * 64, "7", "run-1", "e" * 64, 0.91, 0.77)
    service = build_inference_service_manifest(serving_for(valid).settings, request, name="cifar10", namespace="cifar")
    pods = [replica["template"]["spec"] for replica in training["spec"]["pytorchReplicaSpecs"].values()]
    for pod in [*pods, service["spec"]["predictor"]]:
        (container,) = pod["containers"]
        assert mounted(pod, container)["configMap"]["name"] == "cifar-ca"
        variable = {"name": "AWS_CA_BUNDLE", "value": settings["AWS_CA_BUNDLE"]}
        source = {"configMapRef": {"name": "cifar-platform"}}
        assert variable in container.get("env", ()) or source in container["envFrom"]
