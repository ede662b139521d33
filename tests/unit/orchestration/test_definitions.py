"""The graph: the cost of loading it, and that it is the same in every deployment."""

import functools
import json
import os
import re
import subprocess
import sys
import textwrap
from typing import Any

import dagster as dg
import pytest

from cifar_assets.definitions import defs
from tests.fixtures.cifar10 import INFERENCE_SERVICE, verify_service_daily, watch_traffic_daily
from tests.fixtures.workspace import ROOT

LOAD = textwrap.dedent(
    """
    import sys

    def refuse(event, arguments):
        if event in ("socket.connect", "socket.getaddrinfo"):
            raise SystemExit(f"opened a connection: {event} {arguments}")

    sys.addaudithook(refuse)
    import cifar_assets.definitions
    loaded = [name for name in sys.argv[1:] if name in sys.modules]
    raise SystemExit(f"loaded {loaded}" if loaded else 0)
    """
)
HEAVY = ["torch", "torchvision", "kserve", "onnxruntime", "matplotlib"]
KUBERNETES_ENVIRONMENT = {
    "DAGSTER_DEPLOYMENT": "kubernetes",
    "AWS_ENDPOINT_URL": "http://minio.invalid:9000",
    "AWS_ACCESS_KEY_ID": "key",
    "AWS_SECRET_ACCESS_KEY": "secret",
    "MLFLOW_TRACKING_URI": "http://mlflow.invalid:5000",
    "TRAINER_IMAGE": "trainer.invalid/trainer:test",
    "SERVER_IMAGE": "server.invalid/server:test",
}


def load_definitions(unwanted: list[str], environment: dict[str, str]) -> None:
    subprocess.run([sys.executable, "-c", LOAD, *unwanted], check=True, env={**os.environ, **environment})


def test_loading_for_a_laptop_imports_nothing_heavy_and_connects_to_nothing() -> None:
    load_definitions([*HEAVY, "kubernetes", "mlflow"], {"DAGSTER_DEPLOYMENT": "local"})


def test_loading_for_a_cluster_connects_to_nothing() -> None:
    load_definitions(HEAVY, KUBERNETES_ENVIRONMENT)


def describe(definitions: dg.Definitions) -> dict[str, object]:
    graph = definitions.resolve_asset_graph()
    repository = definitions.get_repository_def()
    return {
        "assets": {
            key.to_user_string(): {
                "after": sorted(parent.to_user_string() for parent in graph.get(key).parent_keys),
                "group": graph.get(key).group_name,
                "checks": {
                    check.name: "blocking" if graph.get(check).blocking else "not blocking"
                    for check in sorted(graph.get(key).check_keys)
                },
            }
            for key in sorted(graph.get_all_asset_keys())
        },
        "jobs": sorted(job.name for job in repository.get_all_jobs() if not job.name.startswith("__")),
        "sensors": sorted(sensor.name for sensor in repository.sensor_defs),
        "schedules": sorted(schedule.name for schedule in repository.schedule_defs),
        "automation": automation(definitions),
    }


def automation(definitions: dg.Definitions) -> dict[str, str]:
    """Sensors and schedules of a fresh instance: on or off."""
    repository = definitions.get_repository_def()
    on = (dg.DefaultSensorStatus.RUNNING, dg.DefaultScheduleStatus.RUNNING)
    return {
        item.name: "on" if item.default_status in on else "off"
        for item in (*repository.sensor_defs, *repository.schedule_defs)
    }


def test_asset_graph_matches_the_snapshot(snapshot) -> None:
    assert describe(defs) == snapshot


@functools.cache
def describe_in_cluster() -> dict[str, Any]:
    """Loaded in a separate process: the deployment is chosen when the module is imported."""
    script = (
        "import json; from cifar_assets.definitions import defs; "
        "from tests.unit.orchestration.test_definitions import describe; print(json.dumps(describe(defs)))"
    )
    done = subprocess.run(
        [sys.executable, "-c", script],
        check=True,
        capture_output=True,
        env={**os.environ, **KUBERNETES_ENVIRONMENT},
        text=True,
    )
    return json.loads(done.stdout.splitlines()[-1])


def test_a_cluster_gets_the_same_assets_and_checks() -> None:
    assert describe_in_cluster()["assets"] == describe(defs)["assets"]


def test_sensors_and_schedules_are_on_or_off_as_documented() -> None:
    page = (ROOT / "docs" / "automation.md").read_text()
    documented = dict(re.findall(r"^\| (\w+) \| (?:sensor|schedule) \| (on|off) \|", page, re.MULTILINE))
    assert documented == automation(defs) | describe_in_cluster()["automation"]


def test_every_asset_and_check_says_what_it_is() -> None:
    graph = defs.resolve_asset_graph()
    for key in graph.get_all_asset_keys():
        node = graph.get(key)
        assert node.description, key
        assert node.owners, key
        assert node.kinds, key
        for check in node.check_keys:
            spec = graph.get(check).description
            assert spec, check


def test_the_daily_check_waits_for_a_first_service() -> None:
    with dg.instance_for_test() as instance:
        context = dg.build_schedule_context(instance=instance)
        assert isinstance(verify_service_daily(context), dg.SkipReason)
        instance.report_runless_asset_event(dg.AssetMaterialization(INFERENCE_SERVICE))
        assert isinstance(verify_service_daily(context), dg.RunRequest)


def test_traffic_is_watched_if_it_is_recorded(monkeypatch: pytest.MonkeyPatch) -> None:
    context = dg.build_schedule_context()
    assert isinstance(watch_traffic_daily(context), dg.SkipReason)
    monkeypatch.setenv("RECORDED_FRACTION", "0.1")
    assert isinstance(watch_traffic_daily(context), dg.RunRequest)
