"""The manifests of k8s/dagster, checked without a cluster. tests/cluster/test_dagster.py applies them."""

import copy
import importlib
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml
from dagster._config import process_config, resolve_to_config_type
from dagster._core.instance.config import dagster_instance_config
from dagster._core.instance.ref import InstanceRef
from dagster._serdes import ConfigurableClassData

ROOT = Path(__file__).parents[3]
DAGSTER = ROOT / "k8s/dagster"
SETTINGS = yaml.safe_load((DAGSTER / "settings.yaml").read_text())["data"]
ACCESS = ROOT / "k8s/access"
PLATFORM = yaml.safe_load((ACCESS / "settings.yaml").read_text())["data"]
SAME_SECTIONS = ("concurrency", "run_monitoring", "run_retries", "telemetry", "python_logs", "nux")


def documents() -> Iterator[dict[str, Any]]:
    for name in yaml.safe_load((DAGSTER / "kustomization.yaml").read_text())["resources"]:
        yield from yaml.safe_load_all((DAGSTER / name).read_text())


OBJECTS = list(documents())
PATCH = yaml.safe_load((DAGSTER / "pods.patch.yaml").read_text())["spec"]["template"]["spec"]
DEPLOYMENTS = {o["metadata"]["name"]: o["spec"]["template"]["spec"] for o in OBJECTS if o["kind"] == "Deployment"}
(POSTGRES,) = [o["spec"]["template"]["spec"] for o in OBJECTS if o["kind"] == "StatefulSet"]


@pytest.fixture
def instance(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> InstanceRef:
    """The instance config as a pod reads it, with the environment of that pod."""
    for key, value in {**SETTINGS, **PLATFORM, "DAGSTER_PG_PASSWORD": "p", "DAGSTER_NAMESPACE": "cifar"}.items():
        monkeypatch.setenv(key, value)
    (tmp_path / "dagster.yaml").write_text((DAGSTER / "dagster.yaml").read_text())
    return InstanceRef.from_dir(str(tmp_path))


def settings_of(instance: InstanceRef) -> dict[str, Any]:
    """The sections of dagster.yaml that configure no class."""
    copied: Any = copy.deepcopy(dict(instance.settings))
    return copied


def resolved(data: ConfigurableClassData | None) -> dict[str, Any]:
    """The section's config after Dagster's validation, with environment variables resolved."""
    assert data is not None
    kind = getattr(importlib.import_module(data.module_name), data.class_name)
    result = process_config(resolve_to_config_type(kind.config_type()), yaml.safe_load(data.config_yaml))
    assert result.success, result.errors
    value: Any = result.value
    return value


def test_instance_is_valid_and_its_storage_is_the_database_of_the_settings(instance: InstanceRef) -> None:
    stored = resolved(instance.storage_data)["postgres_db"]
    (service,) = [o for o in OBJECTS if o["kind"] == "Service" and o["metadata"]["name"] == stored["hostname"]]
    assert service["spec"]["ports"][0]["port"] == stored["port"]
    assert (stored["username"], stored["db_name"], stored["password"]) == ("dagster", "dagster", "p")
    assert stored["scheme"] == "postgresql+psycopg2"
    from dagster_postgres import DagsterPostgresStorage
    from sqlalchemy import create_engine, make_url

    url = make_url(f"{stored['scheme']}://{stored['hostname']}/{stored['db_name']}")
    assert create_engine(url).dialect.driver == "psycopg2"  # the driver that dagster-postgres installs
    assert DagsterPostgresStorage.__name__ == instance.storage_data.class_name  # pyright: ignore[reportOptionalMemberAccess]


def test_compute_logs_go_to_the_object_store(instance: InstanceRef) -> None:
    logs = resolved(instance.compute_logs_data)
    assert logs["endpoint_url"] == PLATFORM["AWS_ENDPOINT_URL"]
    assert logs["bucket"] == SETTINGS["DAGSTER_LOGS_BUCKET"]
    assert logs["local_dir"].startswith("/tmp/")


def test_run_workers_are_restricted_and_get_what_the_code_location_gets(instance: InstanceRef) -> None:
    launcher = resolved(instance.run_launcher_data)
    code = PATCH["containers"][0]
    assert launcher["env_config_maps"] == [e["configMapRef"]["name"] for e in code["envFrom"] if "configMapRef" in e]
    assert launcher["env_secrets"] == [e["secretRef"]["name"] for e in code["envFrom"] if "secretRef" in e]
    assert launcher["env_vars"] == ["DAGSTER_NAMESPACE"]
    assert launcher["service_account_name"] == DEPLOYMENTS["dagster-code"]["serviceAccountName"]
    assert launcher["security_context"] == code["securityContext"]
    pod = launcher["run_k8s_config"]["pod_spec_config"]["securityContext"]
    assert pod == PATCH["securityContext"]
    assert "memory" in launcher["resources"]["limits"]
    (password,) = [e for e in code["env"] if e["name"] == "DAGSTER_PG_PASSWORD"]
    assert password["valueFrom"]["secretKeyRef"] == {
        "name": launcher["postgres_password_secret"],
        "key": "postgresql-password",
    }


def test_pools_retries_and_monitoring_are_those_of_a_checkout(instance: InstanceRef) -> None:
    local = yaml.safe_load((ROOT / "dagster.yaml").read_text())
    cluster = settings_of(instance)
    assert cluster["concurrency"].pop("runs") == {"max_concurrent_runs": 4}
    # Pods take longer to start and to end than processes, and a run's steps end with its pod.
    slower = {"start_timeout_seconds": 300, "cancel_timeout_seconds": 180, "max_resume_run_attempts": 0}
    local["run_monitoring"] |= slower
    assert {name: cluster[name] for name in SAME_SECTIONS} == {name: local[name] for name in SAME_SECTIONS}


def test_a_typo_in_the_instance_is_noticed(tmp_path: Path) -> None:
    """The validation that other tests rely on rejects an invalid field."""
    (tmp_path / "dagster.yaml").write_text((DAGSTER / "dagster.yaml").read_text().replace("run_retries:", "run_retry:"))
    with pytest.raises(Exception, match="run_retry"):
        dagster_instance_config(str(tmp_path))


def test_workspace_names_the_service_and_port_of_the_code_location() -> None:
    (entry,) = yaml.safe_load((DAGSTER / "workspace.yaml").read_text())["load_from"]
    server = entry["grpc_server"]
    (service,) = [o for o in OBJECTS if o["kind"] == "Service" and o["metadata"]["name"] == server["host"]]
    assert service["spec"]["ports"][0]["port"] == server["port"]
    assert str(server["port"]) in DEPLOYMENTS["dagster-code"]["containers"][0]["args"]


def test_pods_are_restricted() -> None:
    kustomization = yaml.safe_load((DAGSTER / "kustomization.yaml").read_text())
    assert {"path": "pods.patch.yaml", "target": {"kind": "Deployment"}} in kustomization["patches"]
    for spec in DEPLOYMENTS.values():
        assert [c["name"] for c in spec["containers"]] == [c["name"] for c in PATCH["containers"]]
        assert "initContainers" not in spec
        assert {"requests", "limits"} <= set(spec["containers"][0]["resources"])
    assert POSTGRES["automountServiceAccountToken"] is False
    for spec in (PATCH, POSTGRES):
        assert spec["securityContext"]["runAsNonRoot"] is True
        assert spec["securityContext"]["seccompProfile"] == {"type": "RuntimeDefault"}
        for container in [*spec["containers"], *spec["initContainers"]]:
            assert container["imagePullPolicy"] == "IfNotPresent"
            assert container["securityContext"]["allowPrivilegeEscalation"] is False
            assert container["securityContext"]["readOnlyRootFilesystem"] is True
            assert container["securityContext"]["capabilities"]["drop"] == ["ALL"]


def test_dagster_asks_for_little_cpu() -> None:
    """The platform, a run worker and a training pod fit on a node with two CPUs."""
    containers = [spec["containers"][0] for spec in [*DEPLOYMENTS.values(), POSTGRES]]
    requests = [container["resources"]["requests"]["cpu"] for container in containers]
    assert sum(int(request.removesuffix("m")) for request in requests) == 350


def test_roles_name_verbs_and_resources_without_wildcards_and_are_in_the_docs() -> None:
    page = (ROOT / "docs/dagster_in_the_cluster.md").read_text()
    roles = {o["metadata"]["name"]: o["rules"] for o in OBJECTS if o["kind"] in ("Role", "ClusterRole")}
    assert set(roles) == {"run-launcher", "run-canceller"}
    table = re.findall(r"^\| `([\w-]+)` \| `([\w/]+)` \| ([a-z, ]+) \|", page, re.MULTILINE)
    described = {(role, resource): verbs.split(", ") for role, resource, verbs in table}
    written = {
        (role, resource): rule["verbs"]
        for role, rules in roles.items()
        for rule in rules
        for resource in rule["resources"]
    }
    assert described == written
    assert "*" not in str(roles)


def test_every_file_is_used() -> None:
    kustomization = yaml.safe_load((DAGSTER / "kustomization.yaml").read_text())
    files = {path.name for path in DAGSTER.glob("*")}
    (generated,) = kustomization["configMapGenerator"]
    used = {*kustomization["resources"], *generated["files"], *(patch["path"] for patch in kustomization["patches"])}
    assert files == used | {"kustomization.yaml"}
