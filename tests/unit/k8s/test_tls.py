"""k8s/overlays/tls: who connects to MinIO or MLflow has their authority. tests/cluster/test_tls.py applies it."""

import re
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
from resources.mlflow.target import CA_VARIABLE
from resources.object_store.resource import LocalObjectStore
from resources.pytorch_job.manifest import build_pytorch_job_manifest
from resources.train_job.manifest import build_train_job_manifest
from tests.fixtures.settings import settings_of

K8S = Path(__file__).parents[3] / "k8s"
AUTHORITY = "/etc/cifar-ca"
OPTIONAL = {"name": "cifar-ca", "optional": True}
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


def test_addresses_are_names_of_the_certificates(objects: dict[tuple[str, str], Any], settings: dict[str, str]) -> None:
    inside = objects["ConfigMap", "store-settings"]["data"]
    for name, address, port in (
        ("minio", settings["AWS_ENDPOINT_URL"], 9000),
        ("minio", inside["AWS_ENDPOINT_URL"], 9000),
        ("mlflow", settings["MLFLOW_TRACKING_URI"], 5000),
    ):
        parts = urlsplit(address)
        assert (parts.scheme, parts.port) == ("https", port)
        assert parts.hostname in objects["Certificate", name]["spec"]["dnsNames"]
    bundles = (settings["AWS_CA_BUNDLE"], inside["AWS_CA_BUNDLE"], settings[CA_VARIABLE])
    assert set(bundles) == {f"{AUTHORITY}/ca.crt"}


@pytest.mark.parametrize("name", ["minio", "mlflow"])
def test_servers_have_their_certificate_and_are_probed_with_https(
    objects: dict[tuple[str, str], Any], name: str
) -> None:
    pod = objects["Deployment", name]["spec"]["template"]["spec"]
    (container,) = pod["containers"]
    for probe in ("readinessProbe", "livenessProbe"):
        assert container[probe]["httpGet"]["scheme"] == "HTTPS"
    (certs,) = [volume["secret"] for volume in pod["volumes"] if volume["name"] == "certs"]
    assert certs["secretName"] == objects["Certificate", name]["spec"]["secretName"]
    if name == "minio":
        assert "--certs-dir=/certs" in container["args"]
        assert {item["path"] for item in certs["items"]} == {"public.crt", "private.key", "CAs/ca.crt"}
    else:
        assert "--uvicorn-opts=--ssl-certfile=/certs/tls.crt --ssl-keyfile=/certs/tls.key" in container["args"]


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
    pod = objects["Deployment", name]["spec"]["template"]["spec"]
    for container in [*pod["containers"], *pod["initContainers"]]:
        assert mounted(pod, container)["configMap"] == OPTIONAL
    launcher = yaml.safe_load((K8S / "dagster/dagster.yaml").read_text())["run_launcher"]["config"]
    assert mounted(launcher, {"volumeMounts": launcher["volume_mounts"]})["configMap"] == OPTIONAL


def test_trainings_and_the_model_server_have_the_authority(settings: dict[str, str]) -> None:
    valid = settings_of({key: value for key, value in settings.items() if value})
    jobs = trainer_for(valid, LocalObjectStore())
    assert jobs.pytorch_job
    assert jobs.train_job
    training = build_pytorch_job_manifest(jobs.pytorch_job, name="job", namespace="cifar")
    request = DeployRequest("s3://models/abc/", "d" * 64, "7", "run-1", "e" * 64, 0.91, 0.77)
    service = build_inference_service_manifest(serving_for(valid).settings, request, name="cifar10", namespace="cifar")
    pods = [replica["template"]["spec"] for replica in training["spec"]["pytorchReplicaSpecs"].values()]
    for pod in [*pods, service["spec"]["predictor"]]:
        (container,) = pod["containers"]
        assert mounted(pod, container)["configMap"]["name"] == "cifar-ca"
        assert_trusting(settings, container)
    node = build_train_job_manifest(jobs.train_job, name="job", namespace="cifar")
    patch = node["spec"]["runtimePatches"][0]["trainingRuntimeSpec"]["template"]["spec"]["replicatedJobs"][0]
    pod = patch["template"]["spec"]["template"]["spec"]
    assert mounted(pod, pod["containers"][0])["configMap"] == OPTIONAL
    assert_trusting(settings, node["spec"]["trainer"])


def assert_trusting(settings: dict[str, str], container: dict[str, Any]) -> None:
    """Its environment names the authority for the object store and for MLflow."""
    for name in ("AWS_CA_BUNDLE", CA_VARIABLE):
        source = {"configMapRef": {"name": "cifar-platform"}}
        assert {"name": name, "value": settings[name]} in container.get("env", ()) or source in container["envFrom"]


def test_pods_of_workflows_and_of_trainings_without_dagster_have_the_authority_if_it_exists() -> None:
    (pipeline,) = yaml.safe_load_all((K8S / "argo/pipeline.yaml").read_text())
    steps = [template["container"] for template in pipeline["spec"]["templates"] if "container" in template]
    found = [mounted(pipeline["spec"], step) for step in steps]
    (training,) = yaml.safe_load_all((K8S / "argo/train.yaml").read_text())
    texts = [template["resource"]["manifest"] for template in training["spec"]["templates"]]
    jobs = [yaml.safe_load(re.sub(r"{{[^']*?}}(?!')", "1", text)) for text in texts]
    jobs.append(yaml.safe_load((K8S / "pytorchjob/trainer.yaml").read_text()))
    for job in jobs:
        for replica in job["spec"]["pytorchReplicaSpecs"].values():
            pod = replica["template"]["spec"]
            found.append(mounted(pod, pod["containers"][0]))
    assert [each["configMap"] for each in found] == [OPTIONAL] * len(found)
