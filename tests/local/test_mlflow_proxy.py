"""A real tracking server behind a lossy proxy: a registered model is completely stored."""

import os
import subprocess
import sys
import threading
import urllib.error
import urllib.request
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest
from mlflow import MlflowClient

from cifar_assets.prune.rules import Policy
from cifar_assets.prune.tracking import prune_tracking, registered_models
from cifar_assets.training.tracking import Tracker
from resources.mlflow.resource import MlflowServer
from resources.mlflow.target import MlflowTarget
from tests.fixtures.ports import free_port
from tests.fixtures.workspace import wait_until

pytestmark = pytest.mark.timeout(1800)
FILES = {"model.onnx": b"o" * 100_000, "metrics.json": b"{}"}
UPLOADS = "/api/2.0/mlflow-artifacts/artifacts/"


class Proxy(ThreadingHTTPServer):
    """Forwards all requests; `fault` handles those whose path contains `hits`."""

    def __init__(self, upstream: str):
        super().__init__(("127.0.0.1", 0), _Handler)
        self.upstream = upstream
        self.fault: str | None = None
        self.hits = UPLOADS

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_port}"


class _Handler(BaseHTTPRequestHandler):
    server: Proxy  # pyright: ignore[reportIncompatibleVariableOverride]

    def _pass_on(self) -> None:
        body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        if self.command != "GET" and self.server.hits in self.path:
            if self.server.fault == "swallow":
                self._answer(200, b"{}")
                return
            if self.server.fault == "halve":
                body = body[: len(body) // 2]
        headers = {
            name: value for name, value in self.headers.items() if name.lower() not in ("host", "content-length")
        }
        request = urllib.request.Request(self.server.upstream + self.path, body or None, headers, method=self.command)
        try:
            with urllib.request.urlopen(request, timeout=300) as answer:
                self._answer(answer.status, answer.read())
        except urllib.error.HTTPError as error:
            self._answer(error.code, error.read())

    def _answer(self, status: int, body: bytes) -> None:
        self.send_response(status)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    do_GET = do_POST = do_PUT = do_PATCH = do_DELETE = _pass_on  # noqa: N815

    def log_message(self, format: str, *arguments: object) -> None: ...


@pytest.fixture(scope="module")
def proxy(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Proxy]:
    folder, port = tmp_path_factory.mktemp("server"), free_port()
    command = [sys.executable, "-m", "mlflow", "server", "--port", str(port), "--workers", "1", "--serve-artifacts"]
    command += ["--backend-store-uri", f"sqlite:///{folder}/mlflow.db", "--artifacts-destination", str(folder)]
    env = {**os.environ, "MLFLOW_SERVER_ENABLE_JOB_EXECUTION": "false"}
    with Path(folder, "log").open("wb") as log:
        process = subprocess.Popen(command, stdout=log, stderr=log, env=env)
    upstream = f"http://127.0.0.1:{port}"

    def is_up() -> bool:
        assert process.poll() is None, Path(folder, "log").read_text()
        try:
            return urllib.request.urlopen(f"{upstream}/health", timeout=60).status == 200
        except OSError:
            return False

    wait_until(is_up, "the tracking server")
    with Proxy(upstream) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield server
        server.shutdown()
    process.terminate()
    process.wait(120)


def train(proxy: Proxy, experiment: str) -> Tracker:
    """Sends everything that a training sends at its end, except the run's end."""
    target = MlflowTarget(tracking_uri=proxy.url, experiment=experiment, registered_model=experiment)
    tracker = Tracker(target, "0" * 64)
    tracker.start({})
    wait_until(lambda: tracker.run_id, "the run to be opened")
    tracker.log_model(FILES, {"model_digest": "d" * 64})
    return tracker


@pytest.mark.parametrize("fault", ["swallow", "halve"])
def test_model_with_lost_artifacts_is_not_registered(
    proxy: Proxy, fault: str, caplog: pytest.LogCaptureFixture
) -> None:
    proxy.fault, proxy.hits = fault, UPLOADS
    tracker = train(proxy, fault)
    found = "missing" if fault == "swallow" else "50000 bytes"
    lost = f"lacks what was sent: model.onnx ({found}, sent 100000)"
    wait_until(lambda: lost in caplog.text, "the loss to be found")
    assert "model" in tracker.close("FINISHED", patience_seconds=2)
    assert MlflowClient(proxy.url).search_model_versions(f"name = '{fault}'") == []


def test_a_model_is_registered_once_its_artifacts_are_stored(proxy: Proxy, caplog: pytest.LogCaptureFixture) -> None:
    """The first upload is lost; the next one is not."""
    proxy.fault, proxy.hits = "halve", UPLOADS
    tracker = train(proxy, "recovered")
    wait_until(lambda: "lacks what was sent" in caplog.text, "the loss to be found")
    proxy.fault = None
    assert tracker.close("FINISHED", patience_seconds=500) == []
    (version,) = MlflowClient(proxy.url).search_model_versions("name = 'recovered'")
    assert version.version == tracker.model_version
    stored = MlflowClient(proxy.url).list_artifacts(str(tracker.run_id), "model")
    assert {Path(item.path).name: item.file_size for item in stored} == {
        name: len(data) for name, data in FILES.items()
    }


def test_a_run_whose_end_was_lost_is_reported(proxy: Proxy) -> None:
    proxy.fault, proxy.hits = "swallow", "/runs/update"
    tracker = train(proxy, "unfinished")
    wait_until(lambda: tracker.model_version, "the model to be registered")
    assert tracker.close("FINISHED", patience_seconds=2) == ["end of the run as FINISHED"]


def test_prune_removes_the_version_the_run_and_the_artifacts_of_a_model(proxy: Proxy) -> None:
    proxy.fault = None
    tracker = train(proxy, "pruned")
    assert tracker.close("FINISHED", patience_seconds=500) == []
    mlflow = MlflowServer(tracking_uri=proxy.url, experiment="pruned", registered_model="pruned")
    client, policy = MlflowClient(proxy.url), Policy(retire_registered=True)
    assert list(prune_tracking(client, mlflow, {"e" * 64}, policy)) == []
    client.set_registered_model_alias("pruned", "champion", "1")
    assert registered_models(client, "pruned", policy) == {"d" * 64}
    (removal,) = prune_tracking(client, mlflow, {"d" * 64}, policy)
    assert removal.size == sum(len(data) for data in FILES.values())
    removal.remove()
    assert list(prune_tracking(client, mlflow, {"d" * 64}, policy)) == []
    assert client.list_artifacts(str(tracker.run_id)) == []
    assert client.get_run(str(tracker.run_id)).info.lifecycle_stage == "deleted"
