"""The local deployment: a supervisor that swaps workers behind one socket, through its resource and its commands."""

import contextlib
import http.client
import http.server
import json
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

from cifar_assets.errors import DeployError
from cifar_assets.object_store import FolderStore
from cifar_assets.serving.client import InferenceClient
from cifar_assets.serving.control import ask as ask_supervisor
from cifar_assets.serving.control import find_supervisor, read_state
from cifar_assets.serving.local import main as local_command
from resources.inference_service import DeployedService, DeployRequest, LocalInferenceService
from tests.unit.serving.server_process import ask, ask_on
from tests.unit.serving.tiny_model import store_tiny_model

PREDICT = "/v1/models/cifar10:predict"
BODY = json.dumps({"instances": [np.zeros((32, 32, 3), int).tolist()]}).encode()


class Deployment:
    """A local deployment with models 0, 1, ... that may be asked for."""

    def __init__(self, folder: Path):
        self.folder = folder
        self.service = LocalInferenceService(
            state_dir=str(folder / "serving"), port=free_port(), startup_timeout_seconds=400
        )

    def request(self, seed: int) -> DeployRequest:
        uri, digest = store_tiny_model(FolderStore(self.folder / "models"), seed)
        return DeployRequest(uri, digest, f"v{seed}", dagster_run_id="run-1", test_accuracy=0.9, accuracy_threshold=0.8)

    def deploy(self, seed: int) -> DeployedService:
        return self.service.deploy(self.request(seed))

    def served_digest(self) -> str:
        return InferenceClient(f"http://127.0.0.1:{self.service.port}").served_model().model_digest


def free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        return listener.getsockname()[1]


@pytest.fixture(scope="module")
def running(tmp_path_factory) -> Iterator[Deployment]:
    """A deployment of model 0, made by a process that is gone, with its whole process group."""
    deployment = Deployment(tmp_path_factory.mktemp("local"))
    request = deployment.request(0)
    code = (
        "from resources.inference_service import *;"
        f"s = LocalInferenceService(state_dir={deployment.service.state_dir!r}, port={deployment.service.port});"
        f"print(s.deploy(DeployRequest({request.model_uri!r}, {request.model_digest!r}, 'v0')).url)"
    )
    try:
        with subprocess.Popen(
            [sys.executable, "-c", code], stdout=subprocess.PIPE, text=True, start_new_session=True
        ) as process:
            output, _ = process.communicate(timeout=300)
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        assert output.strip() == f"http://127.0.0.1:{deployment.service.port}"
        yield deployment
    finally:
        deployment.service.delete()
    assert find_supervisor(Path(deployment.service.state_dir)) is None


class Load:
    """Clients that ask without pause, on kept connections and on new ones, and note every answer."""

    def __init__(self, port: int):
        self.port = port
        self.digests: list[str] = []
        self.failures: list[str] = []
        self._stop = threading.Event()
        self._threads = [threading.Thread(target=self._work, args=(kept,)) for kept in (True, True, False, False)]

    def __enter__(self) -> "Load":
        for thread in self._threads:
            thread.start()
        return self

    def __exit__(self, *_) -> None:
        self._stop.set()
        for thread in self._threads:
            thread.join()

    def _work(self, kept: bool) -> None:
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=60)
        with contextlib.closing(connection):
            while not self._stop.is_set():
                try:
                    answer = ask_on(connection, "POST", PREDICT, BODY, {"Content-Type": "application/json"})
                    self.digests.append(answer.json["model_digest"])
                except Exception as error:
                    self.failures.append(repr(error))
                    connection.close()
                if not kept:
                    connection.close()
                time.sleep(0.02)


def test_a_deployment_outlives_the_process_that_made_it(running):
    status = running.service.status()
    assert status.ready
    assert status.model_digest == running.request(0).model_digest == running.served_digest()
    assert status.model_version == "v0"
    assert status.url == f"http://127.0.0.1:{running.service.port}"


def test_swaps_and_a_swap_that_fails_lose_no_request(running):
    first, second = running.request(0).model_digest, running.request(1).model_digest
    with Load(running.service.port) as load:
        deployed = running.deploy(1)
        assert running.served_digest() == second
        num_before_failure = len(load.digests)
        bad = DeployRequest(running.request(0).model_uri, "0" * 64, "v9")
        with pytest.raises(DeployError, match=f"expected sha256 0000.*Model {second} still serves") as caught:
            running.service.deploy(bad)
        assert ".. " not in str(caught.value)
    assert load.failures == []
    assert (deployed.previous_digest, deployed.changed) == (first, True)
    assert len(load.digests) > num_before_failure > 0
    assert set(load.digests) == {first, second}
    assert set(load.digests[-20:]) == {second}
    status = running.service.status()
    assert (status.ready, status.model_digest) == (True, second)
    assert "expected sha256 0000" in (status.reason or "")


def test_deploying_what_serves_changes_nothing(running):
    running.deploy(1)
    worker = running.service.status().details["worker_pid"]
    again = running.deploy(1)
    assert (again.changed, again.model_digest) == (False, running.request(1).model_digest)
    assert running.service.status().details["worker_pid"] == worker


def test_a_deployment_whose_run_is_cancelled_meanwhile_does_not_happen(running):
    running.deploy(1)
    state = find_supervisor(Path(running.service.state_dir))
    assert state is not None
    request = running.request(2)
    deployment = {
        "model_uri": request.model_uri, "model_digest": request.model_digest, "model_version": "v2", "annotations": {}
    }  # fmt: skip
    message = {"command": "deploy", "deployment": deployment, "timeout": 60, "token": state.token}
    with socket.create_connection(("127.0.0.1", state.control_port), timeout=10) as connection:
        connection.sendall(json.dumps(message).encode() + b"\n")
        wait_for(lambda: list(Path(running.service.state_dir).glob(f"worker-*{request.model_digest[:12]}.log")))
    wait_for(lambda: "went away" in (running.service.status().reason or ""))
    assert running.served_digest() == running.request(1).model_digest


def wait_for(condition) -> None:
    deadline = time.monotonic() + 120
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.02)


def test_a_worker_that_dies_is_replaced_and_requests_wait_for_it(running):
    running.deploy(1)
    worker = int(running.service.status().details["worker_pid"])
    os.kill(worker, signal.SIGKILL)
    answer = ask(running.service.port, "POST", PREDICT, BODY)
    assert answer.status == 200
    assert answer.json["model_digest"] == running.request(1).model_digest
    assert int(running.service.status().details["worker_pid"]) != worker


def test_status_says_what_serves_in_words(running, capsys):
    running.deploy(1)
    assert local_command(["status", "--state-dir", running.service.state_dir]) == 0
    output = capsys.readouterr().out
    for text in (
        f"http://127.0.0.1:{running.service.port}/v1/models/cifar10",
        f"version v1, digest {running.request(1).model_digest}",
        "dagster-run-id",
        "run-1",
        "ready, digest",
    ):
        assert text in output


def test_another_address_for_the_same_deployment_is_refused(running):
    other = LocalInferenceService(state_dir=running.service.state_dir, port=free_port(), startup_timeout_seconds=400)
    with pytest.raises(DeployError, match=f"serves on 127.0.0.1:{running.service.port}, not on"):
        other.deploy(running.request(1))


def test_commands_without_the_token_are_refused(running):
    state = find_supervisor(Path(running.service.state_dir))
    assert state is not None
    assert os.stat(Path(running.service.state_dir) / "supervisor.json").st_mode & 0o077 == 0
    message = {"command": "stop"}
    with socket.create_connection(("127.0.0.1", state.control_port), timeout=10) as connection:
        connection.sendall(json.dumps({**message, "token": "guess"}).encode() + b"\n")
        assert b"does not carry" in connection.makefile("rb").readline()
    for nonsense in (b"", b"\n", b"[1]\n", b"{\n", b"GET / HTTP/1.1\r\n\r\n"):
        with socket.create_connection(("127.0.0.1", state.control_port), timeout=10) as connection:
            connection.sendall(nonsense)
    with pytest.raises(DeployError, match="Unknown command 'dance'"):
        ask_supervisor(state, {"command": "dance"}, 10)
    assert running.service.status().ready


@pytest.fixture
def own(tmp_path) -> Iterator[Deployment]:
    """A deployment of one test, with nothing in it."""
    deployment = Deployment(tmp_path)
    yield deployment
    deployment.service.delete()


def test_a_foreign_process_on_the_port_is_named_and_left_alone(own):
    with http.server.HTTPServer(("127.0.0.1", own.service.port), http.server.SimpleHTTPRequestHandler) as foreign:
        threading.Thread(target=foreign.serve_forever, daemon=True).start()
        with pytest.raises(DeployError, match=f"held by process {os.getpid()} .*pytest.*another port"):
            own.deploy(0)
        assert ask(own.service.port, "GET", "/").status == 200
        foreign.shutdown()
    assert not own.service.status().ready


def test_commands_where_nothing_runs_say_so(tmp_path, capsys):
    for command in ("status", "stop"):
        assert local_command([command, "--state-dir", str(tmp_path / "none")]) == 3
        assert "Nothing is running" in capsys.readouterr().out
    assert not (tmp_path / "none").exists()


def test_stop_ends_a_deployment_that_is_still_coming_up(own):
    failures: list[str] = []

    def deploy() -> None:
        try:
            own.deploy(0)
        except DeployError as error:
            failures.append(str(error))

    thread = threading.Thread(target=deploy)
    thread.start()
    folder = Path(own.service.state_dir)
    wait_for(lambda: list(folder.glob("worker-*.log")))
    assert local_command(["stop", "--state-dir", str(folder)]) == 0
    thread.join()
    assert len(failures) == 1
    assert "was not put into service: the local deployment is being stopped" in failures[0]
    assert find_supervisor(folder) is None


def test_a_killed_supervisor_leaves_nothing_that_is_in_the_way(running):
    state = read_state(Path(running.service.state_dir))
    assert state is not None
    os.kill(state.pid, signal.SIGKILL)
    deployed = running.deploy(1)
    assert running.served_digest() == deployed.model_digest == running.request(1).model_digest
    assert deployed.details["supervisor_pid"] != str(state.pid)
    assert running.service.delete()
    assert not running.service.delete()
    assert "No model server is running" in (running.service.status().reason or "")
    with pytest.raises(ConnectionRefusedError):
        ask(running.service.port, "GET", "/")
