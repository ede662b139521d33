"""The manifest contains every setting and nothing else, and equals the committed one."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import yaml
from pydantic import ValidationError
from syrupy.assertion import SnapshotAssertion

from cifar_assets.deployment import serving_for
from resources.inference_service import DeployRequest
from resources.inference_service import __main__ as command
from resources.inference_service.kserve.config import InferenceServiceSettings
from resources.inference_service.kserve.manifest import (
    REVISION_ANNOTATION,
    build_inference_service_manifest,
    request_of,
    with_traffic,
)
from resources.kubernetes.config import print_manifest, render_manifest
from resources.kubernetes.errors import SettingsError
from tests.fixtures.settings import settings_of

K8S = Path(__file__).parents[3] / "k8s"
REQUEST = DeployRequest("s3://models/abc/", "d" * 64, "7", "run-1", "e" * 64, 0.91, 0.77)


def settings(**values: Any) -> InferenceServiceSettings:
    return InferenceServiceSettings(**{"image": "server:1", **values})


def build(values: InferenceServiceSettings, request: DeployRequest = REQUEST) -> dict[str, Any]:
    return build_inference_service_manifest(values, request, name="cifar10", namespace="space")


# For each field: a unique value, settings it requires, and the text by which it is found in the manifest.
KNATIVE = {"mode": "Knative"}
SENTINELS: dict[str, tuple[dict[str, Any], str]] = {
    "image": ({"image": "sentinel/image:7"}, '"image": "sentinel/image:7"'),
    "image_pull_policy": ({"image_pull_policy": "Never"}, '"imagePullPolicy": "Never"'),
    "image_pull_secrets": ({"image_pull_secrets": ["sentinel"]}, '"imagePullSecrets": [{"name": "sentinel"}]'),
    "mode": (KNATIVE, '"serving.kserve.io/deploymentMode": "Knative"'),
    "env": ({"env": {"SENTINEL": "x"}}, '"env": [{"name": "SENTINEL", "value": "x"}]'),
    "env_secrets": ({"env_secrets": ["sentinel"]}, '{"secretRef": {"name": "sentinel"}}'),
    "env_config_maps": ({"env_config_maps": ["sentinel"]}, '{"configMapRef": {"name": "sentinel"}}'),
    "config_map_mounts": (
        {"config_map_mounts": {"/ca": "sentinel"}},
        '{"name": "files-0", "configMap": {"name": "sentinel"}}',
    ),
    "cpu": ({"cpu": "123m"}, '"requests": {"cpu": "123m"'),
    "cpu_limit": ({"cpu_limit": "2500m"}, '"limits": {"cpu": "2500m"'),
    "memory": ({"memory": "77Mi"}, '"requests": {"cpu": "200m", "memory": "77Mi"}'),
    "memory_limit": ({"memory_limit": "777Mi"}, '"limits": {"cpu": "1", "memory": "777Mi"}'),
    "scratch": ({"scratch": "99Mi"}, '"emptyDir": {"sizeLimit": "99Mi"}'),
    "min_replicas": ({"min_replicas": 2}, '"minReplicas": 2'),
    "max_replicas": ({"max_replicas": 11}, '"maxReplicas": 11'),
    "target_cpu_percent": ({"target_cpu_percent": 61}, '"scaleMetric": "cpu", "scaleTarget": 61'),
    "target_concurrency": ({**KNATIVE, "target_concurrency": 13}, '"scaleMetric": "concurrency", "scaleTarget": 13'),
    "canary_percent": ({**KNATIVE, "canary_percent": 17}, '"canaryTrafficPercent": 17'),
    "drain_delay_seconds": ({"drain_delay_seconds": 7.5}, '"--drain-delay=7.5"'),
    "linger_seconds": ({"linger_seconds": 3.5}, '"--linger=3.5"'),
    "grace_seconds": ({"grace_seconds": 41}, '"--grace=41"'),
    "startup_seconds": ({"startup_seconds": 67}, '"failureThreshold": 67'),
    "service_account_name": ({"service_account_name": "sentinel"}, '"serviceAccountName": "sentinel"'),
    "run_as_user": ({"run_as_user": 1234}, '"runAsUser": 1234'),
    "labels": ({"labels": {"label": "sentinel"}}, '"label": "sentinel"'),
    "annotations": ({"annotations": {"note": "sentinel"}}, '"note": "sentinel"'),
    "extra_predictor": ({"extra_predictor": {"priorityClassName": "sentinel"}}, '"priorityClassName": "sentinel"'),
}


def test_table_of_sentinels_is_complete() -> None:
    assert set(SENTINELS) == set(InferenceServiceSettings.model_fields)


@pytest.mark.parametrize("name", SENTINELS)
def test_every_setting_reaches_the_manifest(name: str) -> None:
    values, text = SENTINELS[name]
    assert text in json.dumps(build(settings(**values)))
    assert text not in json.dumps(build(settings(**(KNATIVE if "mode" in values and name != "mode" else {}))))


@pytest.mark.parametrize("mode", ["Standard", "Knative"])
def test_snapshot(mode: str, snapshot: SnapshotAssertion) -> None:
    values: dict[str, Any] = {"mode": mode}
    if mode == "Knative":
        values |= {"min_replicas": 0, "canary_percent": 10}
    assert build(settings(**values)) == snapshot


@pytest.mark.parametrize("folder", ["inference-service", "inference-service/serverless"])
def test_committed_twin_is_what_the_code_builds(folder: str) -> None:
    assert (
        render_manifest(command.COMMAND, command.build, K8S / folder / "server.settings.yaml")
        == (K8S / folder / "server.yaml").read_text()
    )
    assert yaml.safe_load((K8S / folder / "kustomization.yaml").read_text())["resources"][0] == "server.yaml"


def test_settings_of_the_overlay_are_valid() -> None:
    overlay = yaml.safe_load((K8S / "overlays/serverless/kustomization.yaml").read_text())
    changes = [change for patch in overlay["patches"] for change in yaml.safe_load(patch["patch"])]
    environment = {change["path"].rpartition("/")[2]: change["value"] for change in changes}
    serving = serving_for(settings_of(environment))
    assert serving.settings.serverless
    assert (serving.settings.min_replicas, serving.settings.canary_percent) == (0, 10)


def test_pod_is_restricted_and_small() -> None:
    for mode in ("Standard", "Knative"):
        predictor = build(settings(mode=mode))["spec"]["predictor"]
        (container,) = predictor["containers"]
        assert predictor["automountServiceAccountToken"] is False
        assert container["name"] == "kserve-container"
        security = container["securityContext"]
        assert security["runAsNonRoot"] is True
        assert security["readOnlyRootFilesystem"] is True
        assert security["allowPrivilegeEscalation"] is False
        assert security["capabilities"] == {"drop": ["ALL"]}
        assert container["resources"]["requests"] == {"cpu": "200m", "memory": "384Mi"}
        assert container["resources"]["limits"]["memory"] == "512Mi"


def test_grace_time_covers_all_of_the_drain() -> None:
    predictor = build(settings(drain_delay_seconds=10, linger_seconds=3, grace_seconds=40))["spec"]["predictor"]
    assert predictor["terminationGracePeriodSeconds"] > 10 + 3 + 40
    assert predictor["deploymentStrategy"]["rollingUpdate"]["maxUnavailable"] == 0


def test_decision_is_carried_and_read_back() -> None:
    annotations = build(settings())["metadata"]["annotations"]
    assert annotations["cifar/model-digest"] == "d" * 64
    assert annotations["cifar/dagster-run-id"] == "run-1"
    assert annotations["cifar/test-accuracy"] == "0.91"
    assert request_of(annotations) == REQUEST
    assert request_of({"cifar/model-digest": "x"}) is None


def test_options_of_the_server_are_passed_and_recorded() -> None:
    options = {"precision": "int8", "precision_reason": "It is as accurate."}
    manifest = build(settings(), replace(REQUEST, options=options))
    (container,) = manifest["spec"]["predictor"]["containers"]
    assert container["args"][-2:] == ["--precision=int8", "--precision-reason=It is as accurate."]
    assert manifest["metadata"]["annotations"]["cifar/precision"] == "int8"
    assert manifest["metadata"]["annotations"]["cifar/precision-reason"] == "It is as accurate."


def test_revision_changes_with_what_is_served() -> None:
    def revision(values: InferenceServiceSettings, request: DeployRequest = REQUEST) -> str:
        return build(values, request)["metadata"]["annotations"][REVISION_ANNOTATION]

    first = revision(settings())
    assert revision(settings(), DeployRequest("s3://models/abc/", "d" * 64, "7", "another run")) == first
    assert revision(settings(), DeployRequest("s3://models/abc/", "d" * 64, "8")) != first
    assert revision(settings(cpu="100m")) != first
    canary = settings(mode="Knative", canary_percent=10)
    assert (
        revision(canary)
        == build(settings(mode="Knative", canary_percent=20))["metadata"]["annotations"][REVISION_ANNOTATION]
    )


def test_traffic_is_not_part_of_the_revision() -> None:
    canary = build(settings(mode="Knative", canary_percent=10))
    promoted = with_traffic(canary, None)
    assert "canaryTrafficPercent" not in promoted["spec"]["predictor"]
    assert with_traffic(promoted, 10) == canary
    assert promoted["metadata"] == canary["metadata"]


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("Cifar10", "not a DNS-1035 label"),
        ("cifar10_v2", "not a DNS-1035 label"),
        ("10cifar", "not a DNS-1035 label"),
        ("cifar10-", "not a DNS-1035 label"),
        ("", "not a DNS-1035 label"),
        ("c" * 41, "Shorten it by 2"),
    ],
)
def test_invalid_names_are_rejected(name: str, message: str) -> None:
    with pytest.raises(SettingsError, match=message):
        build_inference_service_manifest(settings(), REQUEST, name=name, namespace="space")


def test_longest_names() -> None:
    longest = "c" * 39
    assert len(f"{longest}-predictor-00001-private") == 63
    assert build_inference_service_manifest(settings(), REQUEST, name=longest, namespace="s")
    with pytest.raises(SettingsError, match="-predictor-a-namespace-of-many"):
        build_inference_service_manifest(settings(), REQUEST, name="c" * 30, namespace="a-namespace-of-many-letters")


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"min_replicas": 0}, "mode Knative"),
        ({"canary_percent": 100, "mode": "Knative"}, "less than or equal to 99"),
        ({"min_replicas": 4}, "larger than max_replicas"),
        ({"cpu": "2", "cpu_limit": "1"}, "more than cpu_limit"),
        ({"memory": "1Gi"}, "more than memory_limit"),
        ({"memory": "400MB"}, "not a Kubernetes quantity"),
        ({"scratch": "much"}, "not a Kubernetes quantity"),
        ({"env_secrets": ["Object_Store"]}, "'Object_Store' is not a DNS subdomain"),
        ({"env_config_maps": [""]}, "is not a DNS subdomain"),
        ({"config_map_mounts": {"/ca": "-ca"}}, "'-ca' is not a DNS subdomain"),
        ({"config_map_mounts": {"/tmp": "ca"}}, "/tmp is a folder that the pods already have"),
        ({"imagee": "x"}, "imagee"),
        ({"image": ""}, "image"),
    ],
)
def test_invalid_settings_are_rejected(values: dict[str, Any], message: str) -> None:
    with pytest.raises(ValidationError, match=message):
        settings(**values)


def test_escape_hatch_does_not_override_what_settings_make() -> None:
    with pytest.raises(SettingsError, match="extra_predictor sets containers"):
        build(settings(extra_predictor={"containers": []}))


def test_threads_follow_the_cpu_limit() -> None:
    assert [settings(cpu_limit=limit).threads for limit in ("500m", "1", "1500m", "4")] == [1, 1, 2, 4]


def test_command_prints_the_manifest_or_says_what_is_wrong(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    def run(path: Path) -> int:
        return print_manifest(command.COMMAND, command.build, [str(path)])

    good = K8S / "inference-service/server.settings.yaml"
    assert run(good) == 0
    assert yaml.safe_load(capsys.readouterr().out)["kind"] == "InferenceService"
    bad = tmp_path / "bad.yaml"
    bad.write_text(good.read_text().replace("image:", "imagee:"))
    assert run(bad) == 2
    assert "imagee" in capsys.readouterr().err
    bad.write_text(good.read_text() + "  canary_percent: 10\n")
    assert run(bad) == 2
    assert "canary_percent needs mode Knative" in capsys.readouterr().err
    bad.write_text("name: x")
    assert run(bad) == 2
    assert "'namespace', 'model'" in capsys.readouterr().err
