"""A secret in every setting of a whole local run: nothing that the run prints, stores or records contains it."""

import http.server
import threading
from collections.abc import Iterator
from functools import partial
from pathlib import Path

import pytest
from Crypto.PublicKey import ECC

from tests.fixtures.workspace import SMALL_TRAINING, Workspace

SECRET = "hush-0815"
SIGNING_KEY = str(ECC.generate(curve="P-256").export_key(format="PEM"))
SECRETS = [SECRET, *SIGNING_KEY.splitlines()[1:-1]]
PLANTED = {
    "AWS_ACCESS_KEY_ID": f"key-{SECRET}",
    "AWS_SECRET_ACCESS_KEY": SECRET,
    "AWS_SESSION_TOKEN": SECRET,
    "MLFLOW_TRACKING_URI": f"http://user:{SECRET}@127.0.0.1:9/",
    "MLFLOW_TRACKING_PASSWORD": SECRET,
    "ACCURACY_THRESHOLD": "0",
    "MODEL_SIGNING_KEY": SIGNING_KEY,
    "TRAINER_JOB": f'{{"env": {{"API_KEY": "{SECRET}"}}}}',
}
ONE_EPOCH = {**SMALL_TRAINING, "overrides": {**SMALL_TRAINING["overrides"], "epochs": 1}}


@pytest.fixture(scope="module")
def address(workspace: Workspace) -> Iterator[str]:
    """Address at which the workspace's training images are served."""

    class Handler(http.server.SimpleHTTPRequestHandler):
        def log_message(self, format: str, *args: object) -> None:
            pass

    handler = partial(Handler, directory=workspace.environment["CIFAR10_SOURCE"])
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        (name,) = [path.name for path in Path(workspace.environment["CIFAR10_SOURCE"]).rglob("*train*.parquet")]
        yield f"127.0.0.1:{server.server_port}/{name}"
        server.shutdown()


def files_with_the_secret(folder: Path) -> list[Path]:
    files = [path for path in folder.rglob("*") if path.is_file()]
    return [path for path in files if any(secret.encode() in path.read_bytes() for secret in SECRETS)]


def test_signature_of_a_source_address_is_not_leaked(workspace: Workspace, address: str) -> None:
    signed = f"http://{address}?X-Amz-Credential=me&X-Amz-Signature={SECRET}"
    select = "cifar10/raw_dataset,cifar10/processed_dataset,cifar10/trained_model"
    done = workspace.materialize(select, {"trained_model": ONE_EPOCH}, **PLANTED, CIFAR10_SOURCE=signed)
    assert done.returncode == 0, done.stdout
    assert not any(secret in done.stdout for secret in SECRETS)
    assert (workspace.folder / ".cifar/mlflow/mlflow.db").exists()
    assert list((workspace.folder / ".cifar/store/models").glob("*/model.sig"))
    assert files_with_the_secret(workspace.folder) == []


@pytest.mark.parametrize(
    "form",
    [
        "http://user:{secret}@{address}",
        "http://{address}.missing?sig={secret}",
        "http://{address} x?sig={secret}",
        "s3://key:{secret}@bucket/x.parquet",
    ],
)
def test_failed_run_does_not_leak_the_secret_of_its_source(form: str, workspace: Workspace, address: str) -> None:
    source = form.format(address=address, secret=SECRET)
    done = workspace.materialize("cifar10/raw_dataset", None, **PLANTED, CIFAR10_SOURCE=source)
    assert done.returncode != 0
    assert "CIFAR10_SOURCE" in done.stdout or "***" in done.stdout
    assert SECRET not in done.stdout
    assert files_with_the_secret(workspace.folder) == []
