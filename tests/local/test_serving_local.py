"""The local deployment through the resource and the commands: servers pass on one listening socket."""

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
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
from Crypto.PublicKey import ECC

from resources.errors import DeployError
from resources.inference_service import DeployedService, DeployRequest, LocalInferenceService
from resources.inference_service.client import InferenceClient
from resources.inference_service.local import resource
from resources.inference_service.local.__main__ import main as local_command
from resources.inference_service.local.resource import find_server
from resources.object_store import FolderStore
from tests.fixtures.ports import free_port
from tests.unit.serving.server_process import ask, ask_on
from tests.unit.serving.tiny_model import store_tiny_model, tiny_onnx

SERVER = "cifar_assets.serving"
PREDICT = "/v1/models/cifar10:predict"
BODY = json.dumps({"instances": [np.zeros((32, 32, 3), int).tolist()]}).encode()


class Deployment:
    """A local deployment, and models 0, 1, ... to deploy."""

    def __init__(self, folder: Path):
        self.folder = folder
        self.service = LocalInferenceService(
            server_module=SERVER, state_dir=str(folder / "serving"), port=free_port(), startup_timeout_seconds=400
        )

    def request(self, seed: int) -> DeployRequest:
        uri, digest = store_tiny_model(FolderStore(self.folder / "models"), seed)
        return DeployRequest(uri, digest, f"v{seed}", dagster_run_id="run-1", test_accuracy=0.9, accuracy_threshold=0.8)

    def deploy(self, seed: int) -> DeployedService:
        return self.service.deploy(self.request(seed))

    def served_digest(self) -> str:
        return InferenceClient(f"http://127.0.0.1:{self.service.port}", timeout=300).served_model().model_digest


@pytest.fixture(scope="module", autouse=True)
def _patient_servers() -> Iterator[None]:
    """A draining server does not close connections of clients that pause for seconds on a busy machine."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("CIFAR_SERVING_LINGER", "300")
        yield


@pytest.fixture(scope="module")
def running(tmp_path_factory) -> Iterator[Deployment]:
    """A deployment of model 0 by a process that was killed with its process group."""
    deployment = Deployment(tmp_path_factory.mktemp("local"))
    request = deployment.request(0)
    code = (
        "import signal; signal.signal(signal.SIGINT, signal.default_int_handler);"  # a parent may ignore it
        "from resources.inference_service import *;"
        f"s = LocalInferenceService(**{deployment.service.model_dump()!r});"
        f"print(s.deploy(DeployRequest({request.model_uri!r}, {request.model_digest!r}, 'v0')).url)"
    )
    try:
        with subprocess.Popen(
            [sys.executable, "-c", code], stdout=subprocess.PIPE, text=True, start_new_session=True
        ) as process:
            output, _ = process.communicate(timeout=500)
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        assert output.strip() == f"http://127.0.0.1:{deployment.service.port}"
        yield deployment
    finally:
        deployment.service.delete()
    assert find_server(Path(deployment.service.state_dir)) is None


class Load:
    """Clients that send requests continuously, on kept and on new connections, and record every response."""

    def __init__(self, port: int):
        self.port = port
        self.digests: list[list[str]] = [[], [], [], []]
        """Model digests of the responses to each client, in order."""
        self.failures: list[str] = []
        self._stop = threading.Event()
        self._threads = [
            threading.Thread(target=self._work, args=(number < 2, digests))
            for number, digests in enumerate(self.digests)
        ]

    def __enter__(self) -> "Load":
        for thread in self._threads:
            thread.start()
        return self

    def __exit__(self, *_) -> None:
        self._stop.set()
        for thread in self._threads:
            thread.join()

    def wait_for(self, digest: str) -> None:
        """Wait until the last five responses to each client are from this model."""
        wait_for(lambda: all(digests[-5:] == [digest] * 5 for digests in self.digests) or self.failures)

    def _work(self, kept: bool, digests: list[str]) -> None:
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=300)
        with contextlib.closing(connection):
            while not self._stop.is_set():
                try:
                    answer = ask_on(connection, "POST", PREDICT, BODY, {"Content-Type": "application/json"})
                    digests.append(answer.json["model_digest"])
                except Exception as error:
                    self.failures.append(repr(error))
                    connection.close()
                if not kept:
                    connection.close()
                time.sleep(0.02)


def test_a_deployment_outlives_the_process_that_made_it(running) -> None:
    status = running.service.status()
    assert status.ready
    assert status.model_digest == running.request(0).model_digest == running.served_digest()
    assert status.model_version == "v0"
    assert status.url == f"http://127.0.0.1:{running.service.port}"


def test_successful_and_failed_swaps_lose_no_request(running) -> None:
    first, second = running.request(0).model_digest, running.request(1).model_digest
    with Load(running.service.port) as load:
        load.wait_for(first)
        deployed = running.deploy(1)
        assert running.served_digest() == second
        load.wait_for(second)
        num_before_failure = [len(digests) for digests in load.digests]
        bad = DeployRequest(running.request(0).model_uri, "0" * 64, "v9")
        with pytest.raises(DeployError, match=f"expected sha256 0000.*Model {second} is still served") as caught:
            running.service.deploy(bad)
        assert ".. " not in str(caught.value)
        load.wait_for(second)
    assert load.failures == []
    assert (deployed.previous_digest, deployed.changed) == (first, True)
    for digests, before in zip(load.digests, num_before_failure, strict=True):
        assert set(digests) == {first, second}
        assert set(digests[before:]) == {second}
    status = running.service.status()
    assert (status.ready, status.model_digest) == (True, second)
    assert not list(Path(running.service.state_dir).glob("starting.sock"))


def test_deploying_the_served_model_changes_nothing(running) -> None:
    running.deploy(1)
    process = running.service.status().details["process_id"]
    again = running.deploy(1)
    assert (again.changed, again.model_digest) == (False, running.request(1).model_digest)
    assert again.previous_digest == again.model_digest
    assert running.service.status().details["process_id"] == process


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGINT])
def test_a_deployment_is_undone_when_its_run_dies(running, number) -> None:
    """At any moment between the start of the new server and the check of its answers, which never ends."""
    running.deploy(1)
    request = running.request(2)
    folder = Path(running.service.state_dir)
    code = (
        "import signal; signal.signal(signal.SIGINT, signal.default_int_handler);"  # a parent may ignore it
        "import time;"
        "from resources.inference_service import *;"
        "from resources.inference_service.local import resource;"
        "resource._check_answers = lambda info: time.sleep(3600);"
        f"s = LocalInferenceService(**{running.service.model_dump()!r});"
        f"s.deploy(DeployRequest({request.model_uri!r}, {request.model_digest!r}, 'v2'))"
    )
    logs = set(folder.glob("server-*.log"))
    with subprocess.Popen([sys.executable, "-c", code], stderr=subprocess.DEVNULL) as process:
        wait_for(lambda: set(folder.glob("server-*.log")) - logs)
        while process.poll() is None:  # Python drops an interrupt that arrives in a callback or a destructor
            process.send_signal(number)
            time.sleep(0.5)
    (log,) = set(folder.glob("server-*.log")) - logs
    wait_for(lambda: not is_in_use(log))
    assert running.served_digest() == running.request(1).model_digest


def is_in_use(path: Path) -> bool:
    """Whether any process has the file open."""
    links = (link for folder in Path("/proc").glob("[0-9]*/fd") for link in open_files(folder))
    return str(path) in links


def open_files(folder: Path) -> list[str]:
    with contextlib.suppress(OSError):
        return [os.readlink(link) for link in folder.iterdir() if link.is_symlink()]
    return []


def wait_for(condition) -> None:
    deadline = time.monotonic() + 300
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.02)


def test_status_describes_the_served_model(running, capsys) -> None:
    running.deploy(1)
    assert local_command(["status", "--state-dir", running.service.state_dir]) == 0
    output = capsys.readouterr().out
    for text in (
        f"http://127.0.0.1:{running.service.port}",
        f"version v1, digest {running.request(1).model_digest}",
        "dagster-run-id",
        "run-1",
        "cifar10, digest",
    ):
        assert text in output


def test_new_address_replaces_the_first(running: Deployment) -> None:
    old = running.service
    running.deploy(1)
    running.service = LocalInferenceService(**{**old.model_dump(), "port": free_port()})
    assert running.deploy(1).changed
    assert running.served_digest() == running.request(1).model_digest
    with pytest.raises(ConnectionRefusedError):
        ask(old.port, "GET", "/")


def test_invalid_control_messages_change_nothing(running, monkeypatch) -> None:
    path = Path(running.service.state_dir) / "serving.sock"
    assert os.stat(path).st_mode & 0o077 == 0
    silent = socket.socket(socket.AF_UNIX)
    monkeypatch.chdir(path.parent)  # the whole path may be too long for a socket
    silent.connect(path.name)
    for nonsense in (b"", b"\n", b"{}\n", b"leave me", b"GET / HTTP/1.1\r\n\r\n", bytes(100_000)):
        with socket.socket(socket.AF_UNIX) as connection, contextlib.suppress(ConnectionError):
            connection.connect(path.name)
            connection.sendall(nonsense)
    assert running.service.status().ready
    assert running.served_digest()
    silent.close()


@pytest.fixture
def own(tmp_path) -> Iterator[Deployment]:
    """An empty deployment for one test."""
    deployment = Deployment(tmp_path)
    yield deployment
    deployment.service.delete()


def test_other_process_on_the_port_is_not_touched(own) -> None:
    with http.server.HTTPServer(("127.0.0.1", own.service.port), http.server.SimpleHTTPRequestHandler) as foreign:
        threading.Thread(target=foreign.serve_forever, daemon=True).start()
        with pytest.raises(DeployError, match=r"another process is listening there.*Choose another port"):
            own.deploy(0)
        assert ask(own.service.port, "GET", "/").status == 200
        foreign.shutdown()
    assert not own.service.status().ready


def test_commands_report_that_nothing_runs(tmp_path, capsys) -> None:
    for command in ("status", "stop"):
        assert local_command([command, "--state-dir", str(tmp_path / "none")]) == 3
        assert "Nothing is running" in capsys.readouterr().out
    assert not (tmp_path / "none").exists()


def test_a_killed_server_does_not_block_the_next_deployment(own) -> None:
    own.deploy(0)
    pid = int(own.service.status().details["process_id"])
    os.kill(pid, signal.SIGKILL)
    wait_for(lambda: "No model server is running" in (own.service.status().reason or ""))
    assert not own.service.status().ready
    assert not own.service.delete()
    deployed = own.deploy(1)
    assert own.served_digest() == deployed.model_digest == own.request(1).model_digest
    assert deployed.previous_digest is None
    assert own.service.delete()
    assert not own.service.delete()
    with pytest.raises(ConnectionRefusedError):
        ask(own.service.port, "GET", "/")


def test_a_server_killed_while_the_next_one_loads_does_not_stop_that_one(own, monkeypatch) -> None:
    own.deploy(0)
    old = int(own.service.status().details["process_id"])
    check = resource._check_answers

    def kill_old_and_check(info) -> None:
        os.kill(old, signal.SIGKILL)
        check(info)

    monkeypatch.setattr(resource, "_check_answers", kill_old_and_check)
    assert own.deploy(1).changed
    assert own.served_digest() == own.request(1).model_digest


def test_a_run_killed_while_the_servers_change_leaves_only_the_new_one(own: Deployment) -> None:
    own.deploy(0)
    old = int(own.service.status().details["process_id"])
    request = own.request(1)
    code = (
        "import os, signal, socket;"
        "send = socket.send_fds;"
        "socket.send_fds = lambda *arguments: (send(*arguments), os.kill(os.getpid(), signal.SIGKILL));"
        "from resources.inference_service import *;"
        f"s = LocalInferenceService(**{own.service.model_dump()!r});"
        f"s.deploy(DeployRequest({request.model_uri!r}, {request.model_digest!r}, 'v1'))"
    )
    assert subprocess.run([sys.executable, "-c", code], timeout=500).returncode == -signal.SIGKILL
    wait_for(lambda: not Path(f"/proc/{old}/fd").is_dir() or not open_files(Path(f"/proc/{old}/fd")))
    assert own.service.status().model_digest == request.model_digest
    assert {own.served_digest() for _ in range(20)} == {request.model_digest}


def test_a_model_that_cannot_answer_does_not_replace_one_that_can(own) -> None:
    served = own.deploy(0).model_digest
    uri, digest = store_tiny_model(FolderStore(own.folder / "models"), onnx_bytes=tiny_onnx(breaks_on_white=True))
    with pytest.raises(DeployError, match=f"{digest} was not deployed: .*not finite.*Model {served} is still served"):
        own.service.deploy(DeployRequest(uri, digest, "broken"))
    assert {own.served_digest() for _ in range(20)} == {served}
    assert own.service.status().ready


def test_an_unsigned_model_does_not_replace_a_served_one(own, monkeypatch: pytest.MonkeyPatch) -> None:
    served = own.deploy(0).model_digest
    monkeypatch.setenv("MODEL_PUBLIC_KEY", str(ECC.generate(curve="P-256").public_key().export_key(format="PEM")))
    with pytest.raises(DeployError, match=rf"has no model\.sig, but .*Model {served} is still served"):
        own.deploy(1)
    assert own.served_digest() == served


def test_another_precision_of_the_served_model_is_another_deployment(own) -> None:
    uri, digest = store_tiny_model(FolderStore(own.folder / "models"), int8=tiny_onnx(seed=1))
    requests = [
        DeployRequest(uri, digest, "v0", options={"precision": precision, "precision_reason": f"asked for {precision}"})
        for precision in ("float32", "int8", "int8")
    ]
    white = json.dumps({"instances": [np.full((32, 32, 3), 255).tolist()]}).encode()
    answers = []
    for request in requests:
        deployed = own.service.deploy(request)
        assert deployed.changed is (request is not requests[2])
        described = ask(own.service.port, "GET", "/v2/models/cifar10").json["properties"]
        assert described == {"model_digest": digest, **request.options}
        answers.append(ask(own.service.port, "POST", PREDICT, white).json["predictions"])
    assert answers[0] != answers[1] == answers[2]


@pytest.mark.parametrize("host", ["localhost", "::", "::1"])
def test_the_host_may_be_any_name_of_this_machine(tmp_path, host) -> None:
    own = Deployment(tmp_path)
    own.service = LocalInferenceService(**{**own.service.model_dump(), "host": host})
    try:
        for seed in (0, 1):
            deployed = own.deploy(seed)
            assert (
                InferenceClient(deployed.url, timeout=300).served_model().model_digest == own.request(seed).model_digest
            )
    finally:
        own.service.delete()


def test_concurrent_deployments_are_serialized(own) -> None:
    own.deploy(0)
    digests = [own.request(seed).model_digest for seed in (1, 2)]
    with ThreadPoolExecutor(2) as pool:
        deployed = list(pool.map(own.deploy, (1, 2)))
    last = own.served_digest()
    (other,) = set(digests) - {last}
    assert next(service for service in deployed if service.model_digest == last).previous_digest == other
    assert {service.model_digest for service in deployed} == set(digests)


@pytest.mark.skipif(os.geteuid() != 0, reason="mounts a small file system")
@pytest.mark.parametrize("size", ["no room for a log", "no room for a socket"])
def test_full_disk_keeps_the_served_model(own, size) -> None:
    folder = Path(own.service.state_dir)
    folder.mkdir()
    subprocess.run(["mount", "-t", "tmpfs", "-o", "size=64k,nr_inodes=8", "none", str(folder)], check=True)
    try:
        served = own.deploy(0).model_digest
        num_files = len(list(folder.iterdir())) + 1
        for index in range(8 - num_files - (size == "no room for a socket")):
            (folder / f"filler-{index}").touch()
        with pytest.raises(DeployError, match=f"No space left on device.*Model {served} is still served"):
            own.deploy(1)
        assert {own.served_digest() for _ in range(30)} == {served}
        for filler in folder.glob("filler-*"):
            filler.unlink()
        assert own.deploy(1).model_digest == own.served_digest() == own.request(1).model_digest
    finally:
        own.service.delete()
        subprocess.run(["umount", "-l", str(folder)], check=True)
