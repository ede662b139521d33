"""kubectl as the tests use it: commands, forwarded ports, waits."""

import socket
import subprocess
import time
import uuid
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from threading import Event, Thread
from typing import Any


def kubectl(*arguments: str, text: str | None = None) -> str:
    done = subprocess.run(["kubectl", *arguments], input=text, capture_output=True, text=True, timeout=240)
    if done.returncode:
        raise RuntimeError(f"kubectl {' '.join(arguments)}: {done.stderr}")
    return done.stdout


def wait_for(what: str, condition: Callable[[], Any], seconds: float = 60) -> Any:
    """The condition's first true value, looked at every quarter second."""
    deadline = time.monotonic() + seconds
    while True:
        value = condition()
        if value:
            return value
        assert time.monotonic() < deadline, f"{what} did not happen within {seconds} s"
        time.sleep(0.25)


@contextmanager
def temporary_namespace(prefix: str) -> Iterator[str]:
    """A new namespace's name; it is gone, with all that is in it, when the block ends."""
    name = f"{prefix}-{uuid.uuid4().hex[:8]}"
    kubectl("create", "namespace", name)
    try:
        yield name
    finally:
        kubectl("delete", "namespace", name, "--wait=true", "--timeout=110s")


def free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as server:
        return server.getsockname()[1]


@contextmanager
def forwarded(namespace: str, target: str, local_port: int, port: int) -> Iterator[None]:
    """A service's port on loopback, forwarded again whenever the pod behind it changes."""
    ended = Event()
    command = ["kubectl", "-n", namespace, "port-forward", target, f"{local_port}:{port}"]
    processes: list[subprocess.Popen[bytes]] = []

    def forward() -> None:
        while not ended.is_set():
            process = subprocess.Popen(
                command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, start_new_session=True
            )
            processes.append(process)
            # kubectl stays after its pod has gone, and says so with the next connection.
            for line in process.stderr or ():
                if b"error" in line.lower() or b"lost connection" in line:
                    break
            process.kill()
            process.wait()
            ended.wait(0.5)

    forwarder = Thread(target=forward, daemon=True)
    forwarder.start()
    try:
        wait_for(f"port {port} of {namespace}/{target}", lambda: _accepts(local_port), 30)
        yield
    finally:
        ended.set()
        processes[-1].kill()
        forwarder.join(10)


def _accepts(port: int) -> bool:
    try:
        with socket.create_connection(("127.0.0.1", port), timeout=1):
            return True
    except OSError:
        return False
