"""k8s/monitoring: the alerts by promtool, the dashboard against what is really exposed, the manifests.

tests/local/test_prometheus.py does the same with a real Prometheus and real targets.
"""

import json
import re
import shutil
import subprocess
from pathlib import Path
from typing import Any

import dagster as dg
import pytest
import yaml
from prometheus_client import CollectorRegistry

from cifar_assets.definitions import defs
from cifar_assets.exporter import PORT, DagsterCollector
from cifar_assets.serving.metrics import REGISTRY

ROOT = Path(__file__).parents[3]
MONITORING = ROOT / "k8s/monitoring"
TESTS = Path(__file__).with_name("alerts.yaml")
KUSTOMIZATION = yaml.safe_load((MONITORING / "kustomization.yaml").read_text())
OBJECTS: list[dict[str, Any]] = [
    each for name in KUSTOMIZATION["resources"] for each in yaml.safe_load_all((MONITORING / name).read_text())
]
(RULES,) = [each["spec"] for each in OBJECTS if each["kind"] == "PrometheusRule"]
ALERTS = {rule["alert"]: rule for group in RULES["groups"] for rule in group["rules"]}
DASHBOARD = json.loads((MONITORING / "dashboard.json").read_text())
QUERIES = {
    f"panel {panel['id']}{target['refId']}": target["expr"]
    for panel in DASHBOARD["panels"]
    for target in panel["targets"]
} | {name: rule["expr"] for name, rule in ALERTS.items()}
MINIO = {"minio_cluster_capacity_usable_free_bytes", "minio_cluster_capacity_usable_total_bytes"}
"""Of MinIO's metrics; tests/local/test_prometheus.py looks for them in a real one."""


def metrics_of(expression: str) -> set[str]:
    """Names of the metrics that a PromQL expression reads."""
    return set(
        re.findall(r"\b(?:up|(?:cifar10|dagster|minio|process|request)_\w+)\b", re.sub('"[^"]*"', "", expression))
    )


@pytest.fixture(scope="module")
def exposed(tmp_path_factory: pytest.TempPathFactory) -> set[str]:
    """Names of all samples that the server and the exporter can have."""
    registry = CollectorRegistry()
    suffixes = {"counter": ("_total",), "histogram": ("_bucket", "_sum", "_count"), "info": ("_info",)}
    with dg.DagsterInstance.local_temp(str(tmp_path_factory.mktemp("instance"))) as instance:
        registry.register(DagsterCollector(instance, defs.get_repository_def()))
        return {
            metric.name + suffix
            for each in (REGISTRY, registry)
            for metric in each.collect()
            for suffix in suffixes.get(metric.type, ("",))
        }


def test_promtool_accepts_the_alerts_and_their_tests_pass(tmp_path: Path) -> None:
    promtool = shutil.which("promtool")
    if promtool is None:
        pytest.skip("no promtool on the PATH, a part of Prometheus, to test the alerts with")
    (tmp_path / "rules.yaml").write_text(yaml.safe_dump(RULES))
    shutil.copy(TESTS, tmp_path)
    for command in (["check", "rules", "rules.yaml"], ["test", "rules", TESTS.name]):
        done = subprocess.run([promtool, *command], cwd=tmp_path, capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stdout + done.stderr


def test_documented_command_extracts_the_rules() -> None:
    (command,) = re.findall(r"^(sed .*) > rules.yaml$", (ROOT / "docs/alerts.md").read_text(), re.MULTILINE)
    done = subprocess.run(["bash", "-c", command], cwd=ROOT, capture_output=True, text=True, check=True)
    assert yaml.safe_load(done.stdout) == RULES


@pytest.mark.parametrize("name", ALERTS)
def test_alert_is_seen_to_fire_and_not_to_fire(name: str) -> None:
    cases = [
        case
        for test in yaml.safe_load(TESTS.read_text())["tests"]
        for case in test["promql_expr_test"]
        if re.search(rf"\b{name}\b", case["expr"])
    ]
    assert any(name in sample["labels"] for case in cases for sample in case["exp_samples"])
    assert any(not case["exp_samples"] for case in cases)


@pytest.mark.parametrize("name", ALERTS)
def test_alert_says_what_happened_and_what_to_do_and_is_in_the_docs(name: str) -> None:
    rule = ALERTS[name]
    severity = rule["labels"]["severity"]
    assert severity in ("critical", "warning", "info")
    assert re.fullmatch(r"[^\n]{20,130}\.", rule["annotations"]["summary"])
    assert len(rule["annotations"]["description"]) > 80
    assert re.search(rf"^\| {name} \| {severity} \|", (ROOT / "docs/alerts.md").read_text(), re.MULTILINE)


@pytest.mark.parametrize("where", QUERIES)
def test_query_reads_only_metrics_that_are_exposed(where: str, exposed: set[str]) -> None:
    read = metrics_of(QUERIES[where])
    assert read
    assert read <= exposed | MINIO | {"up", "process_resident_memory_bytes"}


def test_dashboard_fits_the_grid_and_every_panel_has_a_data_source() -> None:
    panels = DASHBOARD["panels"]
    assert len({panel["id"] for panel in panels}) == len(panels)
    taken: set[tuple[int, int]] = set()
    for panel in panels:
        assert panel["datasource"] == {"type": "prometheus", "uid": "${datasource}"}
        place = panel["gridPos"]
        cells = {
            (x, y)
            for x in range(place["x"], place["x"] + place["w"])
            for y in range(place["y"], place["y"] + place["h"])
        }
        assert not cells & taken
        assert max(x for x, _ in cells) < 24
        taken |= cells


def test_exporter_reads_dagsters_database_and_is_scraped_on_its_port() -> None:
    instance, dagster = (
        yaml.safe_load((ROOT / f"k8s/{each}/dagster.yaml").read_text()) for each in ("monitoring", "dagster")
    )
    assert instance == {name: dagster[name] for name in ("storage", "local_artifact_storage", "telemetry")}
    (deployment,) = [each for each in OBJECTS if each["kind"] == "Deployment"]
    (container,) = deployment["spec"]["template"]["spec"]["containers"]
    assert container["ports"] == [{"name": "metrics", "containerPort": PORT}]
    variables = {entry["name"] for entry in container["env"]}
    (settings,) = yaml.safe_load_all((ROOT / "k8s/dagster/settings.yaml").read_text())
    needed = {
        value["env"] for value in instance["storage"]["postgres"]["postgres_db"].values() if isinstance(value, dict)
    }
    assert needed <= variables | set(settings["data"])


def test_exporter_is_restricted() -> None:
    (deployment,) = [each for each in OBJECTS if each["kind"] == "Deployment"]
    spec = deployment["spec"]["template"]["spec"]
    assert spec["automountServiceAccountToken"] is False
    assert spec["securityContext"]["runAsNonRoot"] is True
    assert spec["securityContext"]["seccompProfile"] == {"type": "RuntimeDefault"}
    (container,) = spec["containers"]
    assert container["imagePullPolicy"] == "IfNotPresent"
    assert container["securityContext"] == {
        "allowPrivilegeEscalation": False,
        "readOnlyRootFilesystem": True,
        "capabilities": {"drop": ["ALL"]},
    }
    assert "memory" in container["resources"]["limits"]


def test_prometheus_may_reach_what_it_scrapes() -> None:
    policies = [each for each in OBJECTS if each["kind"] == "NetworkPolicy"]
    monitors = [each for each in OBJECTS if each["kind"] == "PodMonitor"]
    jobs = set()
    for monitor in monitors:
        (endpoint,) = monitor["spec"]["podMetricsEndpoints"]
        (relabeling,) = endpoint["relabelings"]
        jobs.add(relabeling["replacement"])
        port = endpoint.get("portNumber", {"metrics": PORT}.get(endpoint.get("port"), endpoint.get("port")))
        (policy,) = [
            each
            for each in policies
            if each["metadata"]["namespace"] == monitor["metadata"]["namespace"]
            and each["spec"]["podSelector"] == monitor["spec"]["selector"]
        ]
        (rule,) = policy["spec"]["ingress"]
        assert rule["ports"] == [{"port": port}]
        (peer,) = rule["from"]
        assert peer["namespaceSelector"] == {"matchLabels": {"kubernetes.io/metadata.name": "monitoring"}}
    assert set(re.findall(r'job=~"([^"]+)"', ALERTS["TargetMissing"]["expr"])[0].split("|")) == jobs


def test_every_file_is_used() -> None:
    generated = [name for each in KUSTOMIZATION["configMapGenerator"] for name in each["files"]]
    assert {path.name for path in MONITORING.iterdir()} == {
        *KUSTOMIZATION["resources"],
        *generated,
        "kustomization.yaml",
    }
