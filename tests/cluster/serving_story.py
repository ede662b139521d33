"""A model server in the cluster, and a client in the cluster that sends requests continuously."""

import json
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml
from kubernetes import client as k8s

from cifar_assets.contracts import CLASSES
from cifar_assets.dataset.versions.reader import open_split
from cifar_assets.model_package import METRICS_FILE, ONNX_FILE, RECIPE_FILE, WEIGHTS_FILE, ModelManifest, write_package
from cifar_assets.serving.comparison import find_canary_fault
from resources.digests import sha256_bytes
from resources.errors import DeployError
from resources.inference_service import DeployRequest
from resources.inference_service.client import InferenceClient
from resources.inference_service.kserve.client import InferenceServiceClient
from resources.inference_service.kserve.config import InferenceServiceSettings
from resources.inference_service.kserve.resource import KServeInferenceService
from resources.kubernetes.api import load_configuration
from resources.object_store import ObjectStore
from resources.object_store.s3 import S3Store
from tests.cluster.kubectl import PATIENCE, kubectl, wait_for
from tests.fixtures.tiny_data import TinyData, store_tiny_data
from tests.unit.serving.tiny_model import store_tiny_model, tiny_logits, tiny_onnx, tiny_weights

SERVER_IMAGE = "localhost/cifar-server:dev"
DAGSTER_IMAGE = "localhost/cifar-dagster:dev"
NAME = "cifar10"
K8S = Path(__file__).parents[2] / "k8s"

_ASK = """
import collections, json, pathlib, sys, threading, time
import numpy as np
from PIL import Image
from resources.inference_service.client import InferenceClient, ServerError
pathlib.Path("/tmp/answers").mkdir()
Image.fromarray(np.full((32, 32, 3), 90, dtype=np.uint8)).save("/tmp/picture.png")
headers = {"Host": sys.argv[2]} if sys.argv[2] else {}
answers, by_second, failures = collections.Counter(), collections.Counter(), []
lock, began = threading.Lock(), time.monotonic()
def ask():
    client = InferenceClient(sys.argv[1], timeout=30, headers=headers)
    while not pathlib.Path("/tmp/enough").exists() and time.monotonic() - began < 1500:
        try:
            digest = client.predict_files([pathlib.Path("/tmp/picture.png")]).model_digest
            pathlib.Path("/tmp/answers", digest).touch()
            with lock:
                answers[digest] += 1
                by_second[int(time.time())] += 1
        except ServerError as error:
            failures.append(f"{time.monotonic() - began:.1f} s: {error}")
        time.sleep(0.03)
threads = [threading.Thread(target=ask) for _ in range(int(sys.argv[3]))]
for thread in threads:
    thread.start()
for thread in threads:
    thread.join()
print("TALLY " + json.dumps({"answers": answers, "failures": failures, "by_second": by_second}))
"""


class Service(KServeInferenceService):
    """Has only the rights of one service account."""

    account: str = "dagster"

    def _client(self) -> InferenceServiceClient:
        configuration, _ = load_configuration()
        api = k8s.ApiClient(configuration)
        api.set_default_header("Impersonate-User", f"system:serviceaccount:{self.namespace}:{self.account}")
        return InferenceServiceClient(k8s.CustomObjectsApi(api), k8s.CoreV1Api(api))


def service(
    namespace: str,
    *,
    account: str = "dagster",
    patience: float = 300,
    gateway: str | None = None,
    host: str | None = None,
    shadow_seconds: float | None = None,
    **settings: Any,
) -> Service:
    """The service of the stories with changed settings. `patience`: seconds to wait for a pod that cannot start."""
    values: dict[str, Any] = {"image": SERVER_IMAGE, "env_config_maps": [], "env_secrets": ["object-store"]}
    values |= {"cpu": "50m", "max_replicas": 1, **settings}
    return Service(
        settings=InferenceServiceSettings(**values),
        namespace=namespace,
        name=NAME,
        account=account,
        gateway=gateway,
        host=host,
        shadow_seconds=shadow_seconds,
        blocked_timeout_seconds=patience,
        unschedulable_timeout_seconds=patience,
        rollout_timeout_seconds=600,
    )


def grant_access(namespace: str) -> None:
    """The service account `dagster` and its Roles, as k8s/access has them."""
    documents = yaml.safe_load_all(kubectl("kustomize", str(K8S / "access")))
    wanted = [o for o in documents if o["kind"] in ("ServiceAccount", "Role", "RoleBinding")]
    for document in wanted:
        document["metadata"]["namespace"] = namespace
        for subject in document.get("subjects", []):
            subject["namespace"] = namespace
    kubectl("apply", "--server-side", "-f", "-", text=yaml.safe_dump_all(wanted))


def store_model(store: S3Store, seed: int, version: str) -> DeployRequest:
    """A small, real model package, stored where the server's pod can read it."""
    uri, digest = store_tiny_model(store.at("models"), seed)
    return DeployRequest(uri, digest, version, dagster_run_id=f"run-{seed}", dataset_digest="d" * 64, test_accuracy=0.9)


@dataclass(frozen=True)
class Models:
    """Two models that predict as their metrics say, and one that does not."""

    first: DeployRequest
    second: DeployRequest
    boastful: DeployRequest


def store_models(root: S3Store) -> Models:
    """Models that a canary's judgment can tell apart, and the images for it."""
    root.ensure_buckets(["raw-data", "processed-data", "models"])
    data = store_tiny_data(root)
    return Models(_store(root, data, 1), _store(root, data, 2), _store(root, data, 3, boast=0.7))


def _store(root: ObjectStore, data: TinyData, seed: int, boast: float = 0.0) -> DeployRequest:
    test = open_split(root.at("processed-data"), data.processed, "test")
    answers = tiny_logits(test.take(np.arange(len(test))), seed).argmax(axis=1)
    accuracy = float((answers == test.labels[:]).mean()) + boast
    files = {
        WEIGHTS_FILE: tiny_weights(seed).tobytes(),
        ONNX_FILE: tiny_onnx(seed),
        METRICS_FILE: json.dumps({"test_accuracy": accuracy}).encode(),
        RECIPE_FILE: b'{"name":"tiny"}',
    }
    digests = {name: sha256_bytes(content) for name, content in files.items()}
    manifest = ModelManifest(
        dataset_digest=data.processed, raw_digest=data.raw, seed=seed, classes=CLASSES, files=digests
    )
    digest = write_package(root.at("models"), manifest, files)
    return DeployRequest(root.at("models").at(digest).uri(), digest, str(seed))


def promote_and_withdraw(
    serving: Service,
    models: Models,
    root: S3Store,
    users: InferenceClient,
    judging: Callable[[str], None] = lambda digest: None,
) -> None:
    """After the first model, the second is promoted as a canary of 20 percent, and the boastful one withdrawn.

    `judging` is called with the model's digest before its canary is judged.
    """
    shares: Counter[str] = Counter()

    def judged(request: DeployRequest) -> DeployRequest:
        def find_fault(canary: InferenceClient) -> str | None:
            judging(request.model_digest)
            shares.update(users.served_model().model_digest for _ in range(100))
            return find_canary_fault(canary, root.at("models"), root.at("processed-data"), request.model_digest)

        return replace(request, find_fault=find_fault)

    assert serving.deploy(judged(models.second)).previous_digest == models.first.model_digest
    # 20 of 100 expected; five standard deviations either way.
    assert 1 <= shares[models.second.model_digest] <= 40
    assert {users.served_model().model_digest for _ in range(20)} == {models.second.model_digest}
    with pytest.raises(DeployError, match="test images right"):
        serving.deploy(judged(models.boastful))
    assert {users.served_model().model_digest for _ in range(20)} == {models.second.model_digest}


@dataclass
class Tally:
    """The responses that the clients of a pod got."""

    namespace: str
    pod: str
    answers: dict[str, int] = field(default_factory=dict)
    failures: Sequence[str] = ()
    by_second: dict[int, int] = field(default_factory=dict)
    """Number of answers by Unix time."""

    def wait_until_answered_by(self, model_digest: str) -> None:
        wait_for(f"an answer of model {model_digest}", lambda: model_digest in self._models())

    def wait_until_answered(self) -> None:
        wait_for("a first answer", self._models)

    def _models(self) -> list[str]:
        """Digests of the models that have answered so far."""
        return kubectl("-n", self.namespace, "exec", self.pod, "--", "sh", "-c", "ls /tmp/answers || true").split()

    def _lines(self) -> list[str]:
        lines = kubectl("-n", self.namespace, "logs", self.pod).splitlines()
        return [line.removeprefix("TALLY ") for line in lines if line.startswith("TALLY ")]

    def read(self) -> None:
        found = json.loads(wait_for("the tally", self._lines)[-1])
        self.answers, self.failures = found["answers"], found["failures"]
        self.by_second = {int(second): number for second, number in found["by_second"].items()}


@contextmanager
def asking(
    namespace: str, url: str | None = None, host: str = "", *, pod: str = "asker", clients: int = 1
) -> Iterator[Tally]:
    """Sends multipart requests over new connections during the block, and collects responses.

    Each client sends at most about 20 per second. They go to the service itself, or with this Host header to the
    address of a gateway.
    """
    container = {
        "name": "asker",
        "image": DAGSTER_IMAGE,
        "imagePullPolicy": "IfNotPresent",
        "command": ["python", "-c", _ASK, url or f"http://{NAME}-predictor.{namespace}.svc", host, str(clients)],
        "resources": {"requests": {"cpu": "50m", "memory": "64Mi"}},
    }
    spec = {"containers": [container], "restartPolicy": "Never", "terminationGracePeriodSeconds": 1}
    manifest = {"apiVersion": "v1", "kind": "Pod", "metadata": {"name": pod}, "spec": spec}
    inside = ["-n", namespace]
    kubectl(*inside, "create", "-f", "-", text=yaml.safe_dump(manifest))
    tally = Tally(namespace, pod)
    try:
        kubectl(*inside, "wait", "--for=condition=Ready", f"pod/{pod}", PATIENCE)
        tally.wait_until_answered()
        yield tally
        kubectl(*inside, "exec", pod, "--", "touch", "/tmp/enough")
        tally.read()
    finally:
        kubectl(*inside, "delete", "pod", pod, "--grace-period=1", "--wait=true", PATIENCE)


def left_behind(namespace: str) -> list[str]:
    """Names of the existing objects of a service."""
    kinds = "inferenceservices,deployments,replicasets,services,horizontalpodautoscalers,pods"
    names = kubectl("-n", namespace, "get", kinds, "-o", "name", "--ignore-not-found").split()
    return [name for name in names if NAME in name]
