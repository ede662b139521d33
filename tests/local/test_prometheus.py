"""A real Prometheus scrapes a real model server, the exporter on a real Dagster instance, and MinIO."""

import json
import re
import shutil
import subprocess
import sys
import time
import urllib.parse
import urllib.request
from collections.abc import Callable, Iterator
from contextlib import chdir, contextmanager
from pathlib import Path
from typing import Any

import dagster as dg
import pytest
import yaml

from cifar_assets.assets.record import DATA_VERSION_TAG
from resources.object_store import FolderStore
from tests.fixtures.cifar10 import INFERENCE_SERVICE, SERVED_TRAFFIC, TRAINED_MODEL
from tests.fixtures.ports import free_port
from tests.fixtures.s3 import find_minio, running_minio
from tests.unit.k8s.test_monitoring import ALERTS, MINIO, QUERIES, ROOT, RULES, metrics_of
from tests.unit.serving.server_process import run_server
from tests.unit.serving.tiny_model import store_tiny_model

LOCAL_JOBS = {"cifar10-server", "dagster-exporter"}
AT_ONCE = 5
"""Seconds between scrapes and between evaluations of the alerts, which here fire without a delay."""


@contextmanager
def started(*command: str, folder: Path, **environment: str) -> Iterator[None]:
    """A process that ends with the block. Its output is in a file named after the program."""
    with (folder / f"{Path(command[0]).name}.log").open("w") as log:
        process = subprocess.Popen(command, cwd=folder, env=environment, stdout=log, stderr=log)
    try:
        yield
    finally:
        process.terminate()
        process.wait(300)


def documented_configuration() -> dict[str, Any]:
    (block,) = re.findall(r"```yaml\n(.*?)```", (ROOT / "docs/alerts.md").read_text(), re.DOTALL)
    return yaml.safe_load(block)


def configure(folder: Path, ports: dict[str, int], minio: str | None) -> None:
    """Writes the documented configuration with other ports, without delays, and with MinIO if there is one."""
    configuration = documented_configuration()
    assert {each["job_name"] for each in configuration["scrape_configs"]} == LOCAL_JOBS
    for each in configuration["scrape_configs"]:
        each["static_configs"] = [{"targets": [f"127.0.0.1:{ports[each['job_name']]}"]}]
        each["scrape_interval"] = f"{AT_ONCE}s"
        each.pop("scrape_timeout", None)
    if minio:
        job = {"job_name": "minio", "metrics_path": "/minio/v2/metrics/cluster", "scrape_interval": f"{AT_ONCE}s"}
        configuration["scrape_configs"].append({**job, "static_configs": [{"targets": [minio]}]})
    configuration["global"] = {"evaluation_interval": f"{AT_ONCE}s"}
    (folder / "prometheus.yaml").write_text(yaml.safe_dump(configuration))
    groups = [{**g, "rules": [{**rule, "for": "0s"} for rule in g["rules"]]} for g in RULES["groups"]]
    (folder / "rules.yaml").write_text(yaml.safe_dump({"groups": groups}))


class Prometheus:
    """The HTTP API of a Prometheus on loopback."""

    def __init__(self, port: int, log: Path):
        self._url = f"http://127.0.0.1:{port}/api/v1"
        self._log = log

    def ask(self, path: str, **parameters: str) -> Any:
        with urllib.request.urlopen(f"{self._url}/{path}?{urllib.parse.urlencode(parameters)}", timeout=60) as answer:
            return json.load(answer)["data"]

    def wait_until(self, condition: Callable[[], Any], what: str, seconds: float = 500) -> Any:
        """Polls until the condition gives something true, and returns that."""
        deadline = time.monotonic() + seconds
        while True:
            problem = ""
            try:
                if found := condition():
                    return found
            except OSError as error:
                problem = str(error)
            assert time.monotonic() < deadline, f"waited for {what}; {problem} {self._log.read_text()[-3000:]}"
            time.sleep(0.5)

    def targets(self) -> dict[str, str]:
        return {each["labels"]["job"]: each["health"] for each in self.ask("targets")["activeTargets"]}

    def firing(self) -> dict[str, dict[str, str]]:
        """Annotations of the firing alerts by name."""
        alerts = self.ask("alerts")["alerts"]
        return {each["labels"]["alertname"]: each["annotations"] for each in alerts if each["state"] == "firing"}

    def rules(self) -> dict[str, str]:
        """Health of each alert's expression."""
        return {rule["name"]: rule["health"] for group in self.ask("rules")["groups"] for rule in group["rules"]}


@pytest.fixture(scope="module")
def prometheus(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Prometheus]:
    """Scrapes a server that got invalid requests, and an instance with another deployed model and failed checks."""
    program = shutil.which("prometheus")
    if program is None:
        pytest.skip("no prometheus on the PATH")
    folder, models = tmp_path_factory.mktemp("prometheus"), tmp_path_factory.mktemp("models")
    shutil.copy(ROOT / "dagster.yaml", folder)
    report(folder, deployed="0" * 64)
    ports = {job: free_port() for job in LOCAL_JOBS}
    uri, digest = store_tiny_model(FolderStore(models))
    exporter = [sys.executable, "-m", "cifar_assets.exporter", "--port", str(ports["dagster-exporter"])]
    port = free_port()
    server = [program, "--config.file=prometheus.yaml", f"--web.listen-address=127.0.0.1:{port}"]
    with (
        run_server(uri, digest, folder) as model_server,
        started(*exporter, folder=folder, PYTHONPATH=str(ROOT), HOME=str(folder)),
        minio_or_none(tmp_path_factory.mktemp("minio")) as minio,
    ):
        configure(folder, {**ports, "cifar10-server": model_server.port}, minio)
        with started(*server, f"--storage.tsdb.path={folder / 'data'}", folder=folder):
            made = Prometheus(port, folder / "prometheus.log")
            jobs = LOCAL_JOBS | ({"minio"} if minio else set())
            up = dict.fromkeys(jobs, "up")
            made.wait_until(lambda: made.targets() == up, f"targets {sorted(jobs)} to be up")

            def invalid_requests_are_counted() -> bool:
                assert model_server.post("/v1/models/cifar10:predict", b"{}").status == 400
                return "RequestsInvalid" in made.firing()

            made.wait_until(invalid_requests_are_counted, "the alert RequestsInvalid")
            yield made


@contextmanager
def minio_or_none(folder: Path) -> Iterator[str | None]:
    if find_minio() is None:
        yield None
        return
    with running_minio(folder, MINIO_PROMETHEUS_AUTH_TYPE="public") as server:
        yield server.endpoint.partition("://")[2]


def report(folder: Path, *, deployed: str) -> None:
    """A deployed model and failed checks, in the instance of the folder."""
    with chdir(folder), dg.DagsterInstance.from_config(str(folder)) as instance:
        for key in (TRAINED_MODEL, INFERENCE_SERVICE):
            instance.report_runless_asset_event(dg.AssetMaterialization(key, tags={DATA_VERSION_TAG: deployed}))
        for asset, check in ((SERVED_TRAFFIC, "drift"), (INFERENCE_SERVICE, "latency")):
            failed = dg.AssetCheckEvaluation(asset_key=asset, check_name=check, passed=False)
            instance.report_runless_asset_event(failed)


def test_every_alert_is_evaluated(prometheus: Prometheus) -> None:
    prometheus.wait_until(lambda: "unknown" not in prometheus.rules().values(), "all alerts to be evaluated")
    assert prometheus.rules() == dict.fromkeys(ALERTS, "ok")


def test_the_right_alerts_fire_and_their_texts_are_filled_in(prometheus: Prometheus) -> None:
    expected = {"RequestsInvalid", "ServedModelNotDeployed", "CheckFailing", "Drift"}
    # A full disk is possible, and on a busy machine a slow answer, a late scrape, or the end of the requests.
    possible = {"StoreNearlyFull", "PredictionsSlow", "TargetMissing", "NoModelServed", "NoTraffic"}

    def all_expected() -> dict[str, dict[str, str]] | None:
        firing = prometheus.firing()
        return firing if expected <= set(firing) else None

    firing = prometheus.wait_until(all_expected, f"the alerts {sorted(expected)}")
    assert set(firing) - possible == expected
    for texts in firing.values():
        assert "error" not in texts["summary"]
        assert "<no value>" not in str(texts)
    assert firing["CheckFailing"]["summary"] == "The check latency of cifar10/inference_service failed."


@pytest.mark.parametrize("where", QUERIES)
def test_query_is_answered(prometheus: Prometheus, where: str) -> None:
    query = QUERIES[where].replace("$__rate_interval", "1m")
    prometheus.ask("query", query=query)


def test_metrics_of_every_query_have_samples(prometheus: Prometheus) -> None:
    read = {name for query in QUERIES.values() for name in metrics_of(query)}
    nothing_ran = ("dagster_last", "dagster_daemon", "cifar10_recorded")  # no run, daemon or record of traffic
    absent = {name for name in read if name.startswith(nothing_ran)}
    if "minio" not in prometheus.targets():
        absent |= MINIO
    wanted = read - absent
    prometheus.wait_until(
        lambda: wanted <= set(prometheus.ask("label/__name__/values")), f"samples of {sorted(wanted)}"
    )
