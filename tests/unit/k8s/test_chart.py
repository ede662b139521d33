"""k8s/chart, rendered by Helm. tests/cluster/test_chart.py installs it."""

import json
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml

from cifar_assets.settings import Settings
from resources.mlflow import target
from resources.object_store import s3_settings

K8S = Path(__file__).parents[3] / "k8s"
NEEDS_HELM = pytest.mark.skipif(
    not all(shutil.which(program) for program in ("helm", "kubectl", "make")), reason="needs helm, kubectl and make"
)
Objects = dict[tuple[str, str, str], Any]
"""By namespace, kind and name."""


def objects_of(text: str) -> Objects:
    found = [o for o in yaml.safe_load_all(text) if o and o["kind"] != "Namespace"]
    return {(o["metadata"]["namespace"], o["kind"], o["metadata"]["name"]): o for o in found}


def kustomized(folder: str) -> str:
    return subprocess.check_output(["kubectl", "kustomize", str(K8S / folder)], text=True)


@pytest.fixture(scope="module")
def chart(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("helm") / "chart"
    subprocess.check_call(["make", "chart", f"CHART={folder}"], cwd=K8S.parent)
    return folder


def template(chart: Path, values: dict[str, Any], namespace: str = "cifar") -> str:
    """Helm's rendering. Raises AssertionError with Helm's message if it refuses the values."""
    command = ["helm", "template", "cifar", str(chart), "-n", namespace, "-f", "-"]
    done = subprocess.run(command, input=json.dumps(values), capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return done.stdout


def without_what_helm_needs(objects: Objects) -> Objects:
    """Takes back what the template changes whatever the values are, after a check that it is there."""
    (job,) = [key for key in objects if key[1] == "Job"]
    objects[(*job[:2], "store-setup")] = objects.pop(job)
    for (namespace, kind, name), found in objects.items():
        if kind == "Job":
            assert found["metadata"]["name"] == "store-setup-1"
            found["metadata"]["name"] = name
        if kind == "PersistentVolumeClaim":
            assert found["metadata"].pop("annotations") == {"helm.sh/resource-policy": "keep"}
        if kind == "Deployment" and (namespace == "cifar" or name == "mlflow"):
            assert set(found["spec"]["template"]["metadata"].pop("annotations")) == {"checksum/settings"}
        if kind == "ConfigMap" and name == "cifar-platform":
            assert {found["data"].pop(f"{role}_NAMESPACE") for role in ("TRAINER", "SERVER")} == {namespace}
    return objects


@NEEDS_HELM
def test_default_values_give_the_objects_of_the_kustomizations(chart: Path) -> None:
    wanted = objects_of(kustomized("overlays/minikube")) | objects_of(kustomized("dagster"))
    assert without_what_helm_needs(objects_of(template(chart, {}))) == wanted


@NEEDS_HELM
def test_without_platform_and_database_it_is_the_overlays_for_external_servers(chart: Path) -> None:
    database = {"DAGSTER_PG_HOST": "postgres.example.com", "DAGSTER_PG_PORT": "6432"}
    values = {"platform": False, "postgres": False, "settings": database}
    found = objects_of(template(chart, values))
    overlays = [objects_of(kustomized(f"overlays/external-{server}")) for server in ("postgres", "store")]
    assert set(found) == set().union(*overlays)
    assert found["cifar", "ConfigMap", "dagster-settings"]["data"]["DAGSTER_PG_HOST"] == "postgres.example.com"
    (rule,) = found["cifar", "NetworkPolicy", "dagster-database"]["spec"]["egress"]
    assert rule == {"ports": [{"port": 6432}]}


@NEEDS_HELM
def test_values_reach_the_objects_that_they_name(chart: Path) -> None:
    values = {
        "platformNamespace": "store",
        "registry": "registry.example.com/team",
        "tag": "v2",
        "images": {"docker.io/library/postgres:17": "registry.example.com/postgres:17"},
        "storage": {"minio": "100Gi", "dagster-postgresql": "7Gi"},
        "resources": {"dagster-code": {"limits": {"memory": "3Gi"}}},
        "settings": {"ACCURACY_THRESHOLD": "0.9", "CIFAR_BUCKET_PREFIX": "team-", "SERVER_SETTINGS": '{"port": 1}'},
    }
    text = template(chart, values, namespace="work")
    found = objects_of(text)
    assert {namespace for namespace, _, _ in found} == {"store", "work"}
    for leftover in ("metadata.name: cifar", "minio.cifar", "mlflow.cifar", "localhost/", "docker.io/library"):
        assert leftover not in text
    code = found["work", "Deployment", "dagster-code"]["spec"]["template"]["spec"]["containers"][0]
    assert code["image"] == "registry.example.com/team/cifar-dagster:v2"
    assert {"name": "DAGSTER_CURRENT_IMAGE", "value": code["image"]} in code["env"]
    assert code["resources"] == {"requests": {"cpu": "100m", "memory": "384Mi"}, "limits": {"memory": "3Gi"}}
    postgres = found["work", "StatefulSet", "dagster-postgresql"]["spec"]
    assert postgres["template"]["spec"]["containers"][0]["image"] == "registry.example.com/postgres:17"
    assert postgres["volumeClaimTemplates"][0]["spec"]["resources"]["requests"] == {"storage": "7Gi"}
    sizes = {n: o["spec"]["resources"]["requests"]["storage"] for (_, k, n), o in found.items() if "Claim" in k}
    assert sizes == {"minio": "100Gi", "mlflow": "1Gi"}
    settings = {name: o["data"] for (_, kind, name), o in found.items() if kind == "ConfigMap"}
    assert settings["dagster-settings"]["ACCURACY_THRESHOLD"] == "0.9"
    assert (
        settings["store-settings"]["CIFAR_BUCKET_PREFIX"]
        == settings["cifar-platform"]["CIFAR_BUCKET_PREFIX"]
        == "team-"
    )
    assert settings["dagster-settings"]["DAGSTER_LOGS_BUCKET"] == "team-dagster-logs"
    assert settings["cifar-platform"]["SERVER_SETTINGS"] == '{"port": 1}'
    assert settings["cifar-platform"]["AWS_ENDPOINT_URL"] == "http://minio.store.svc:9000"
    assert settings["cifar-platform"]["TRAINER_IMAGE"] == "registry.example.com/team/cifar-trainer:v2"
    assert settings["cifar-platform"]["SERVER_NAMESPACE"] == "work"


@NEEDS_HELM
@pytest.mark.parametrize(("platform", "own"), [("cifar", "work"), ("store", "cifar-platform")])
def test_namespaces_may_have_each_others_default_names(chart: Path, platform: str, own: str) -> None:
    found = objects_of(template(chart, {"platformNamespace": platform}, namespace=own))
    assert (platform, "Deployment", "mlflow") in found
    assert (own, "Deployment", "dagster-code") in found


@NEEDS_HELM
def test_one_namespace_for_both_is_refused(chart: Path) -> None:
    with pytest.raises(AssertionError, match="platformNamespace is the release's namespace"):
        template(chart, {"platformNamespace": "cifar"})


@NEEDS_HELM
def test_changed_settings_restart_what_reads_them(chart: Path) -> None:
    def checksums(values: dict[str, Any]) -> tuple[str, str]:
        objects = objects_of(template(chart, values))
        found = objects["cifar", "Deployment", "dagster-code"], objects["cifar-platform", "Deployment", "mlflow"]
        of_dagster, of_mlflow = (o["spec"]["template"]["metadata"]["annotations"]["checksum/settings"] for o in found)
        return of_dagster, of_mlflow

    before = checksums({})
    assert before == checksums({"tag": "v2"})
    source = checksums({"settings": {"CIFAR10_SOURCE": "synthetic"}})
    assert (source[0] != before[0], source[1]) == (True, before[1])
    prefix = checksums({"settings": {"CIFAR_BUCKET_PREFIX": "team-"}})
    assert prefix[0] != before[0]
    assert prefix[1] != before[1]


@NEEDS_HELM
@pytest.mark.parametrize(
    ("values", "word"),
    [
        ({"setting": {}}, "setting"),
        ({"settings": {"ACCURACY_TRESHOLD": "0.9"}}, "ACCURACY_TRESHOLD"),
        ({"settings": {"ACCURACY_THRESHOLD": 0.9}}, "ACCURACY_THRESHOLD"),
        ({"settings": {"AWS_SECRET_ACCESS_KEY": "k"}}, "AWS_SECRET_ACCESS_KEY"),
        ({"storage": {"minio": "10 GB"}}, "minio"),
        ({"resources": {"dagster-cod": {}}}, "dagster-cod"),
        ({"resources": {"minio": {"limit": {}}}}, "limit"),
        ({"images": {"postgres": "mine"}}, "postgres"),
        ({"platformNamespace": "Cifar"}, "platformNamespace"),
    ],
)
def test_schema_refuses_a_typo_and_names_it(chart: Path, values: dict[str, Any], word: str) -> None:
    with pytest.raises(AssertionError, match=f"(?s)schema.*{word}"):
        template(chart, values)


@NEEDS_HELM
def test_lint_finds_nothing(chart: Path) -> None:
    done = subprocess.run(["helm", "lint", "--strict", str(chart)], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout


@NEEDS_HELM
def test_the_folder_of_the_repository_names_the_command_that_completes_it() -> None:
    with pytest.raises(AssertionError, match="run `make chart`"):
        template(K8S / "chart", {})


def test_schema_knows_every_setting_that_a_cluster_uses() -> None:
    schema = json.loads((K8S / "chart/values.schema.json").read_text())
    assert set(schema["properties"]["settings"]["properties"]) == set(settings_in_a_cluster())


def settings_in_a_cluster() -> Iterator[str]:
    """Names of docs/settings.md, without credentials, which are in Secrets, and without what image and chart set."""
    elsewhere = {"DAGSTER_DEPLOYMENT", "INFERENCE_SERVICE_PORT", "CIFAR_STORE", "TRAINER_NAMESPACE", "SERVER_NAMESPACE"}
    yield from {name.upper() for name in Settings.model_fields} - elsewhere
    yield from {name for names in s3_settings.VARIABLES.values() for name in names} - set(s3_settings.CREDENTIALS)
    yield from (*s3_settings.CA_VARIABLES, target.CA_VARIABLE)
    yield from ("https_proxy", "http_proxy", "no_proxy")
    database = yaml.safe_load((K8S / "dagster/settings.yaml").read_text())["data"]
    yield from (name for name in database if name.startswith("DAGSTER_"))
