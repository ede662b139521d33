"""k8s/overlays/tls and gateway with a real cert-manager and Envoy Gateway, in two namespaces of their own.

Needs cert-manager, and `make -f images/images.mk image-dagster image-mlflow image-trainer postgres-image LOAD=...`.
"""

import base64
import hashlib
import http.client
import json
import re
import secrets
import socket
import ssl
import subprocess
import urllib.error
import urllib.request
from collections.abc import Iterator, Mapping
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType
from typing import Any

import pytest
import yaml
from mlflow.tracking import MlflowClient

from tests.cluster.deployed_dagster import IMAGES, PASSWORD
from tests.cluster.deployed_dagster import OVERLAY as DAGSTER
from tests.cluster.kinds import K8S, TRAIN_JOB, JobKind, brief, is_installed
from tests.cluster.kubectl import PATIENCE, forwarded, kubectl, missing_images, temporary_namespace, wait_for
from tests.cluster.platform import Platform, secret
from tests.cluster.test_dagster import RAW
from tests.cluster.test_gateway import PROXIES
from tests.cluster.test_pipeline import DATA, MODEL, materialized, training, workspace_in
from tests.cluster.webserver import FINISHED, Webserver
from tests.fixtures.ports import free_port

USER, USER_PASSWORD = "team", secrets.token_hex(20)


def apply(folder: Path | str, namespace: str, platform: str) -> None:
    """A kustomization in namespaces with other names."""
    text = kubectl("kustomize", str(folder))
    text = re.sub(
        r"((?:namespace|metadata\.name): |\b(?:minio|mlflow)\.|- )cifar-platform\b", rf"\g<1>{platform}", text
    )
    text = re.sub(r"((?:namespace|metadata\.name): |- )cifar$", rf"\g<1>{namespace}", text, flags=re.MULTILINE)
    objects = [o for o in yaml.safe_load_all(text) if o["kind"] != "Namespace"]
    kubectl("apply", "--server-side", "-f", "-", text=yaml.safe_dump_all(objects))


@pytest.fixture(scope="module")
def secure(core: Any, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Platform]:
    """The overlay gateway, or tls if the cluster has no Envoy Gateway."""
    if not is_installed("cert-manager.io"):
        pytest.skip("the cluster has no cert-manager")
    if missing := missing_images(*IMAGES, "localhost/cifar-mlflow:dev"):
        pytest.skip(f"the cluster lacks {' and '.join(missing)}")
    overlay = "gateway" if is_installed("gateway.envoyproxy.io") else "tls"
    with temporary_namespace("tls") as namespace, temporary_namespace("tls-platform") as platform:
        subprocess.run([str(K8S / "create-secrets"), platform, namespace], check=True)
        apply(K8S / "overlays" / overlay, namespace, platform)
        inside = ["-n", platform]
        kubectl(*inside, "wait", "--for=condition=Ready", "certificate", "--all", PATIENCE)
        authority = tmp_path_factory.mktemp("authority") / "ca.crt"
        authority.write_text(secret(platform, "minio-tls")["ca.crt"])
        kubectl("-n", namespace, "create", "configmap", "cifar-ca", f"--from-file={authority}")
        kubectl(*inside, "wait", "--for=condition=complete", "job/store-setup", PATIENCE)
        kubectl(*inside, "rollout", "status", "deploy/mlflow", PATIENCE)
        with Platform.reached(namespace, platform, authority) as found:
            yield found


@pytest.mark.thorough
def test_mlflow_verifies_minio_and_a_client_outside_verifies_both(secure: Platform) -> None:
    note = f"{secure.mlflow_uri}/api/2.0/mlflow-artifacts/artifacts/1/note.txt"
    trusting = ssl.create_default_context(cafile=str(secure.authority))
    request = urllib.request.Request(note, b"from MLflow", method="PUT")
    urllib.request.urlopen(request, timeout=60, context=trusting).close()
    assert secure.store().read("mlflow/1/note.txt") == b"from MLflow"

    def is_distrusted(address: str) -> bool:
        with pytest.raises(urllib.error.URLError) as refused:
            urllib.request.urlopen(address, timeout=60)
        return "CERTIFICATE_VERIFY_FAILED" in str(refused.value)  # unless the port is just being forwarded again

    for address in (secure.mlflow_uri, secure.store_url):
        wait_for(f"a refused certificate of {address}", lambda address=address: is_distrusted(address))


@pytest.mark.thorough
@brief
def test_a_training_verifies_minio_and_mlflow(secure: Platform, kind: JobKind, tmp_path: Path) -> None:
    if kind is TRAIN_JOB:
        apply(K8S / "trainjob", secure.namespace, secure.platform_namespace)
    dagster = workspace_in(tmp_path, {**secure.environment(), "TRAINER_KIND": kind.setting})
    output = materialized(dagster, f"{DATA},{MODEL}", training())
    assert "Not sent to MLflow" not in output
    client = MlflowClient(secure.mlflow_uri)
    (run, *_) = client.search_runs([experiment.experiment_id for experiment in client.search_experiments()])
    assert run.info.status == "FINISHED"
    assert client.list_artifacts(run.info.run_id)


@dataclass(frozen=True)
class PublicAddress:
    """The Gateway's port on loopback, under the names of the overlay. Verifies the certificate."""

    port: int
    authority: Path

    def send(
        self,
        host: str,
        path: str,
        body: bytes | None = None,
        headers: Mapping[str, str] = MappingProxyType({}),
        password: str | None = USER_PASSWORD,
    ) -> tuple[int, bytes]:
        """Status and content of an answer, without the content if the protocol changes."""
        token = base64.b64encode(f"{USER}:{password}".encode()).decode()
        credentials = {"Authorization": f"Basic {token}"} if password else {}
        connection = http.client.HTTPSConnection(host, timeout=60)
        plain = socket.create_connection(("127.0.0.1", self.port), timeout=60)
        trusting = ssl.create_default_context(cafile=str(self.authority))
        connection.sock = trusting.wrap_socket(plain, server_hostname=host)
        try:
            connection.request("POST" if body else "GET", path, body, {**headers, **credentials})
            answer = connection.getresponse()
            return answer.status, b"" if answer.status == http.HTTPStatus.SWITCHING_PROTOCOLS else answer.read()
        finally:
            connection.close()


class PublicWebserver(Webserver):
    """Dagster's webserver behind the Gateway."""

    def __init__(self, address: PublicAddress):
        super().__init__(DAGSTER_HOST)
        self.address = address

    def _post(self, body: dict[str, Any]) -> dict[str, Any]:
        headers = {"Content-Type": JSON}
        status, text = self.address.send(DAGSTER_HOST, "/graphql", json.dumps(body).encode(), headers)
        assert status == http.HTTPStatus.OK, text
        answer = json.loads(text)
        assert "errors" not in answer, answer["errors"]
        return answer["data"]


DAGSTER_HOST, MLFLOW_HOST = "dagster.example.com", "mlflow.example.com"
UPGRADE = {"Connection": "Upgrade", "Upgrade": "websocket", "Sec-WebSocket-Version": "13"}
UPGRADE |= {"Sec-WebSocket-Key": "dGhlIHNhbXBsZSBub25jZQ==", "Sec-WebSocket-Protocol": "graphql-ws"}
UPGRADE |= {"Origin": f"https://{DAGSTER_HOST}"}
JSON = "application/json"
EXPERIMENTS = "/api/2.0/mlflow/experiments/search?max_results=1"


@pytest.fixture(scope="module")
def public(secure: Platform) -> Iterator[PublicAddress]:
    """Dagster in the cluster, and the Gateway's address."""
    if not is_installed("gateway.envoyproxy.io"):
        pytest.skip("the cluster has no Envoy Gateway")
    digest = base64.b64encode(hashlib.sha1(USER_PASSWORD.encode()).digest()).decode()
    users = f"--from-literal=.htpasswd={USER}:{{SHA}}{digest}"
    kubectl("-n", secure.platform_namespace, "create", "secret", "generic", "gateway-users", users)
    inside = ["-n", secure.namespace]
    database = f"--from-literal=postgresql-password={secrets.token_hex(20)}"
    kubectl(*inside, "create", "secret", "generic", PASSWORD, database)
    apply(DAGSTER, secure.namespace, secure.platform_namespace)
    for name in ("statefulset/dagster-postgresql", "deploy/dagster-code", "deploy/dagster-webserver"):
        kubectl(*inside, "rollout", "status", name, PATIENCE)
    kubectl("-n", secure.platform_namespace, "wait", "--for=condition=Programmed", "gateway/cifar", PATIENCE)
    labels = f"gateway.envoyproxy.io/owning-gateway-namespace={secure.platform_namespace}"
    (proxy,) = kubectl("-n", PROXIES, "get", "services", "-l", labels, "-o", "name").split()
    port = free_port()
    assert secure.authority
    address = PublicAddress(port, secure.authority)

    def answers(host: str, path: str) -> bool:
        with suppress(OSError, http.client.HTTPException):  # the proxy has no route or certificate yet
            return address.send(host, path)[0] == http.HTTPStatus.OK
        return False

    with forwarded(PROXIES, proxy, port, 443):
        wait_for("an answer of Dagster", lambda: answers(DAGSTER_HOST, "/server_info"))
        wait_for("an answer of MLflow", lambda: answers(MLFLOW_HOST, EXPERIMENTS))
        yield address


@pytest.mark.thorough
def test_the_public_address_answers_nobody_without_the_password(public: PublicAddress) -> None:
    for host, path in (
        (DAGSTER_HOST, "/"),
        (DAGSTER_HOST, "/server_info"),
        (MLFLOW_HOST, "/"),
        (MLFLOW_HOST, EXPERIMENTS),
    ):
        for password in (None, "wrong"):
            assert public.send(host, path, password=password)[0] == http.HTTPStatus.UNAUTHORIZED
    assert public.send(DAGSTER_HOST, "/graphql", headers=UPGRADE, password=None)[0] == http.HTTPStatus.UNAUTHORIZED


@pytest.mark.thorough
def test_a_user_with_the_password_sees_dagster_and_mlflow(public: PublicAddress) -> None:
    status, page = public.send(DAGSTER_HOST, "/")
    assert (status, b">Dagster</title>" in page) == (200, True)
    assert public.send(DAGSTER_HOST, "/graphql", headers=UPGRADE)[0] == http.HTTPStatus.SWITCHING_PROTOCOLS
    assert b"<title>MLflow</title>" in public.send(MLFLOW_HOST, "/")[1]
    assert json.loads(public.send(MLFLOW_HOST, EXPERIMENTS)[1])["experiments"]


@pytest.mark.thorough
def test_only_mlflows_own_page_may_change_it(public: PublicAddress) -> None:
    def status_for(origin: str) -> int:
        headers = {"Content-Type": JSON, "Origin": origin}
        return public.send(MLFLOW_HOST, "/ajax-api/2.0/mlflow/runs/search", b'{"experiment_ids": ["0"]}', headers)[0]

    assert status_for(f"https://{MLFLOW_HOST}") == http.HTTPStatus.OK
    assert status_for("https://other.example.com") == http.HTTPStatus.FORBIDDEN


@pytest.mark.thorough
def test_dagster_executes_no_request_that_a_page_of_another_site_can_send(public: PublicAddress) -> None:
    query = "/graphql?query={version}"
    status, text = public.send(DAGSTER_HOST, "/graphql", b'{"query": "{version}"}', {"Content-Type": JSON})
    assert (status, list(json.loads(text)["data"])) == (http.HTTPStatus.OK, ["version"])
    assert public.send(DAGSTER_HOST, query)[0] == http.HTTPStatus.FOUND
    assert public.send(DAGSTER_HOST, query.replace("g", "%67"))[0] == http.HTTPStatus.FOUND
    other = {**UPGRADE, "Origin": "https://other.example.com"}
    assert public.send(DAGSTER_HOST, "/graphql", headers=other)[0] == http.HTTPStatus.FORBIDDEN
    assert public.send(DAGSTER_HOST, query, b"x", {"Content-Type": "text/plain"})[0] == http.HTTPStatus.FOUND
    form = {"Content-Type": "application/x-www-form-urlencoded"}
    assert public.send(DAGSTER_HOST, "/report_asset_materialization/a", b"x=y", form)[0] == http.HTTPStatus.NOT_FOUND


@pytest.mark.thorough
def test_a_run_started_at_the_public_address_verifies_minio(public: PublicAddress) -> None:
    dagster = PublicWebserver(public)
    wait_for("the code location", lambda: dagster.locations() == {"cifar": "RepositoryLocation"})
    run_id = dagster.materialize(RAW)
    wait_for("the run's end", lambda: dagster.run(run_id).status in FINISHED)
    assert dagster.run(run_id).status == "SUCCESS"
    ((_, where),) = dagster.compute_logs(run_id).values()
    assert where.startswith("s3://")


@pytest.mark.thorough
def test_a_pod_of_another_namespace_does_not_reach_the_webserver(secure: Platform, public: PublicAddress) -> None:
    targets = [
        f"minio.{secure.platform_namespace}.svc:9000",
        f"mlflow.{secure.platform_namespace}.svc:5000",
        f"dagster-webserver.{secure.namespace}.svc:3000",
    ]
    script = (
        "import socket, sys\nfor target in sys.argv[1:]:\n  host, port = target.split(':')\n  try:\n"
        "    socket.create_connection((host, int(port)), timeout=5).close()\n    print('open')\n"
        "  except TimeoutError:\n    print('shut')\n"
    )
    with temporary_namespace("stranger") as namespace:
        inside = ["-n", namespace]
        command = ["run", "stranger", "--image=python:3.11-slim", "--image-pull-policy=IfNotPresent"]
        kubectl(*inside, *command, "--restart=Never", "--command", "--", "python", "-c", script, *targets)
        kubectl(*inside, "wait", "--for=jsonpath={.status.phase}=Succeeded", "pod/stranger", PATIENCE)
        found = kubectl(*inside, "logs", "stranger").split()
    if found[0] == "open":
        pytest.skip("the cluster's network does not enforce NetworkPolicies")
    assert found == ["shut"] * len(targets)
