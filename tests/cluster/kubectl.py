"""kubectl as the tests use it: commands, forwarded ports, waits."""

import json
import socket
import subprocess
import time
import uuid
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from threading import Event, Thread
from typing import Any

import yaml

PATIENCE_SECONDS = 300.0
"""Far longer than anything here takes, so that a test on a busy machine fails only for what never happens."""
PATIENCE = f"--timeout={PATIENCE_SECONDS:.0f}s"
_IMAGE_FAULTS = ("ErrImagePull", "ImagePullBackOff", "ErrImageNeverPull", "InvalidImageName")


def kubectl(*arguments: str, text: str | None = None) -> str:
    done = subprocess.run(
        ["kubectl", *arguments], input=text, capture_output=True, text=True, timeout=2 * PATIENCE_SECONDS
    )
    if done.returncode:
        raise RuntimeError(f"kubectl {' '.join(arguments)}: {done.stderr}")
    return done.stdout


def wait_for(what: str, condition: Callable[[], Any], seconds: float = PATIENCE_SECONDS) -> Any:
    """The condition's first true value, polled every quarter second."""
    deadline = time.monotonic() + seconds
    while True:
        value = condition()
        if value:
            return value
        assert time.monotonic() < deadline, f"{what} did not happen within {seconds} s"
        time.sleep(0.25)


@contextmanager
def temporary_namespace(prefix: str) -> Iterator[str]:
    """Creates a namespace and yields its name; deletes it with its content at the end of the block."""
    name = f"{prefix}-{uuid.uuid4().hex[:8]}"
    kubectl("create", "namespace", name)
    account = ("-n", name, "get", "serviceaccount", "default", "--ignore-not-found", "-o", "name")
    try:
        wait_for("the default service account, which pods need", lambda: kubectl(*account))
        yield name
    finally:
        kubectl("delete", "namespace", name, "--ignore-not-found", "--wait=true", PATIENCE)


def missing_images(*images: str) -> list[str]:
    """Images that the cluster neither has nor can pull. A node's status omits some, and new ones for a while."""
    containers = [
        {"name": f"image-{number}", "image": image, "imagePullPolicy": "IfNotPresent", "command": ["true"]}
        for number, image in enumerate(images)
    ]
    spec = {"containers": containers, "restartPolicy": "Never", "terminationGracePeriodSeconds": 0}
    pod = {"apiVersion": "v1", "kind": "Pod", "metadata": {"name": "images"}, "spec": spec}

    def verdicts(namespace: str) -> dict[str, bool]:
        answer = json.loads(kubectl("-n", namespace, "get", "pod", "images", "-o", "json"))
        found = {}
        for status in answer["status"].get("containerStatuses", ()):
            reason = status["state"].get("waiting", {}).get("reason", "")
            if "waiting" not in status["state"] or reason in _IMAGE_FAULTS:
                found[status["name"]] = not reason
        return found if len(found) == len(images) else {}

    with temporary_namespace("images") as namespace:
        kubectl("-n", namespace, "create", "-f", "-", text=yaml.safe_dump(pod))
        is_there = wait_for("a verdict on every image", lambda: verdicts(namespace))
    return [image for number, image in enumerate(images) if not is_there[f"image-{number}"]]


@contextmanager
def forwarded(namespace: str, target: str, local_port: int, port: int) -> Iterator[None]:
    """A service's port on loopback, forwarded again whenever its pod changes."""
    ended = Event()
    command = ["kubectl", "-n", namespace, "port-forward", target, f"{local_port}:{port}"]
    processes: list[subprocess.Popen[bytes]] = []

    def forward() -> None:
        while not ended.is_set():
            process = subprocess.Popen(
                command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, start_new_session=True
            )
            processes.append(process)
            if ended.is_set():  # it did not exist yet when the end of the block looked for it
                process.kill()
            # kubectl keeps running after its pod is gone, and reports it on the next connection.
            for line in process.stderr or ():
                if b"error" in line.lower() or b"lost connection" in line:
                    break
            process.kill()
            process.wait()
            ended.wait(0.5)

    forwarder = Thread(target=forward, daemon=True)
    forwarder.start()
    try:
        wait_for(f"port {port} of {namespace}/{target}", lambda: is_listening(local_port))
        yield
    finally:
        ended.set()
        processes[-1].kill()
        forwarder.join(10)


def is_listening(port: int) -> bool:
    """Whether a process of this machine accepts connections to the port."""
    try:
        with socket.create_connection(("127.0.0.1", port), timeout=1):
            return True
    except OSError:
        return False
