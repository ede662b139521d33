"""KServeInferenceService on a real cluster with the real KServe, with the rights of `dagster`."""

import re
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml
from kubernetes import client as k8s
from kubernetes.client.exceptions import ApiException
from PIL import Image

from cifar_assets.contracts import CLASSES
from resources.errors import DeployError
from resources.inference_service import DeployRequest
from resources.inference_service.client import InferenceClient
from tests.cluster.conftest import Minio
from tests.cluster.kinds import is_installed
from tests.cluster.kubectl import PATIENCE, kubectl, wait_for
from tests.cluster.serving_story import K8S, NAME, asking, grant_access, left_behind, service, store_model
from tests.unit.serving.tiny_model import tiny_logits

SCALING_SECONDS = 900
"""Far longer than the autoscaler takes, which removes a replica after 5 minutes of low load."""


@pytest.fixture(scope="module")
def models(namespace: str, minio: Minio, core: Any) -> tuple[DeployRequest, DeployRequest]:
    """Two models in the object store, and the Role of `dagster` in the namespace. Skips if KServe is not installed."""
    names: Any = k8s.ApisApi(core.api_client).get_api_versions()
    if "serving.kserve.io" not in {group.name for group in names.groups}:
        pytest.skip("the cluster has no KServe")
    grant_access(namespace)
    store = minio.store()
    store.ensure_buckets(["models"])
    return store_model(store, 1, "1"), store_model(store, 2, "2")


@pytest.fixture
def nothing_serves(namespace: str) -> Iterator[None]:
    yield
    kubectl("-n", namespace, "delete", "inferenceservices", "--all", "--wait=true", PATIENCE)
    wait_for("removal of the service", lambda: not left_behind(namespace))


@pytest.fixture
def picture(tmp_path: Path) -> Path:
    pixels = np.random.default_rng(5).integers(0, 255, (32, 32, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(tmp_path / "picture.png")
    return tmp_path / "picture.png"


def pod_names(namespace: str) -> list[str]:
    names = kubectl("-n", namespace, "get", "pods", "-l", "serving.kserve.io/inferenceservice", "-o", "name")
    return names.split()


def test_deploy_update_and_roll_back_without_a_failed_request(
    namespace: str, models: tuple[DeployRequest, DeployRequest], picture: Path, nothing_serves: None
) -> None:
    first, second = models
    serving = service(namespace)
    deployed = serving.deploy(first)
    assert (deployed.changed, deployed.previous_digest) == (True, None)

    answer = InferenceClient(deployed.url, headers=deployed.headers).predict_files([picture])
    pixels = np.asarray(Image.open(picture)).transpose(2, 0, 1)[None]
    assert answer.model_digest == first.model_digest
    assert answer.classes == (CLASSES[int(tiny_logits(pixels, 1).argmax())],)

    pods = pod_names(namespace)
    again = serving.deploy(replace(first, dagster_run_id="another run"))
    assert (again.changed, again.previous_digest) == (False, first.model_digest)
    assert pod_names(namespace) == pods

    with asking(namespace) as tally:
        updated = serving.deploy(second)
        status = serving.status()
        tally.wait_until_answered_by(second.model_digest)
        back = serving.deploy(first)
    assert (updated.changed, updated.previous_digest) == (True, first.model_digest)
    assert (status.ready, status.model_digest, status.model_version) == (True, second.model_digest, "2")
    assert (back.changed, back.previous_digest) == (True, second.model_digest)
    assert tally.failures == []
    assert set(tally.answers) == {first.model_digest, second.model_digest}

    assert serving.delete()
    assert left_behind(namespace) == []
    assert not serving.delete()


def test_broken_versions_fail_with_the_cause_while_the_old_one_answers(
    namespace: str, models: tuple[DeployRequest, DeployRequest], nothing_serves: None
) -> None:
    first, second = models
    serving = service(namespace)
    serving.deploy(first)
    pods = pod_names(namespace)
    with asking(namespace) as tally:
        with pytest.raises(DeployError) as wrong_digest:
            serving.deploy(replace(second, model_uri=first.model_uri))
        reason = serving.status().reason
        with pytest.raises(DeployError) as no_object:
            serving.deploy(replace(second, model_uri=first.model_uri.replace(first.model_digest, "f" * 64)))
        with pytest.raises(DeployError) as no_image:
            service(namespace, patience=4, image="localhost/never-loaded:1").deploy(second)
        with pytest.raises(DeployError) as no_secret:
            service(namespace, patience=4, env_secrets=["object-store", "no-such-secret"]).deploy(second)
        with pytest.raises(DeployError) as no_room:
            service(namespace, patience=4, cpu="9999", cpu_limit="9999").deploy(second)
        with pytest.raises(DeployError) as no_mode_change:
            service(namespace, mode="Knative").deploy(second)
        status = serving.status()
    errors = [wrong_digest, no_object, no_image, no_secret, no_room]
    for error in errors:
        assert f"rolled back to model {first.model_digest} version 1, which is served as before" in str(error.value)
    assert "ended with exit code 2" in str(wrong_digest.value)
    assert "Not serving" in str(wrong_digest.value)
    assert reason is not None
    assert "ended with exit code 2" in reason
    assert "ended with exit code 2" in str(no_object.value)
    assert "localhost/never-loaded:1" in str(no_image.value)
    assert 'secret "no-such-secret" not found' in str(no_secret.value)
    assert "Insufficient cpu" in str(no_room.value)
    assert "deploymentMode cannot be changed" in str(no_mode_change.value)
    assert [error.value.transient for error in [*errors, no_mode_change]] == [False, False, False, False, True, False]

    assert tally.failures == []
    assert set(tally.answers) == {first.model_digest}
    assert (status.ready, status.model_digest) == (True, first.model_digest)
    # The old version's pods are unchanged; those of the refused ones may take a while to end.
    wait_for("the old version's pods alone", lambda: pod_names(namespace) == pods)


def test_failed_first_version_leaves_nothing(
    namespace: str, models: tuple[DeployRequest, DeployRequest], nothing_serves: None
) -> None:
    first, second = models
    serving = service(namespace)
    with pytest.raises(DeployError, match="No model was served before, so the InferenceService was deleted"):
        serving.deploy(replace(first, model_digest=second.model_digest))
    assert left_behind(namespace) == []
    status = serving.status()
    assert (status.ready, status.model_digest) == (False, None)
    assert "ended with exit code 2" in (status.reason or "")


@pytest.fixture
def cordoned_later(core: Any) -> Iterator[Callable[[], None]]:
    """A function after whose call no node accepts a new pod, until the test ends."""
    nodes = [node.metadata.name for node in core.list_node().items if not node.spec.unschedulable]

    def cordon() -> None:
        for node in nodes:
            kubectl("cordon", node)

    yield cordon
    for node in nodes:
        kubectl("uncordon", node)


def test_model_in_service_survives_a_failed_repair(
    namespace: str,
    models: tuple[DeployRequest, DeployRequest],
    nothing_serves: None,
    cordoned_later: Callable[[], None],
) -> None:
    first, _ = models
    serving = service(namespace, patience=6, min_replicas=2, max_replicas=2)
    serving.deploy(first)
    with asking(namespace) as tally:
        cordoned_later()
        lost = pod_names(namespace)[0]
        kubectl("-n", namespace, "delete", lost, "--wait=false")
        wait_for("the pod that replaces it", lambda: len(set(pod_names(namespace)) - {lost}) == 2)
        with pytest.raises(DeployError) as error:
            serving.deploy(replace(first, dagster_run_id="another run"))
        status = serving.status()
    assert "unschedulable" in str(error.value)
    assert "existed before this deployment and was left unchanged" in str(error.value)
    assert (status.ready, status.model_digest) == (True, first.model_digest)
    assert tally.failures == []
    assert set(tally.answers) == {first.model_digest}


@pytest.mark.thorough
def test_documented_disruption_budget_lets_one_replica_go_at_a_time(
    namespace: str, models: tuple[DeployRequest, DeployRequest], nothing_serves: None, core: Any
) -> None:
    page = (K8S.parent / "docs/kserve.md").read_text()
    (command,) = re.findall(r"^kubectl -n cifar (create poddisruptionbudget .*)", page, re.MULTILINE)
    service(namespace, min_replicas=2, max_replicas=2).deploy(models[0])
    kubectl("-n", namespace, *command.split())
    allowed = ["-n", namespace, "get", "poddisruptionbudget", NAME, "-o", "jsonpath={.status.disruptionsAllowed}"]
    wait_for("a budget for both replicas", lambda: kubectl(*allowed) == "1")

    def evict(pod: str) -> None:
        name = pod.removeprefix("pod/")
        core.create_namespaced_pod_eviction(name, namespace, k8s.V1Eviction(metadata={"name": name}))

    first, second = pod_names(namespace)
    with asking(namespace) as tally:
        evict(first)
        with pytest.raises(ApiException, match="disruption budget"):
            evict(second)
        wait_for("a second replica", lambda: kubectl(*allowed) == "1")
    assert tally.failures == []


def test_manually_edited_spec_is_restored(
    namespace: str, models: tuple[DeployRequest, DeployRequest], nothing_serves: None
) -> None:
    first, _ = models
    serving = service(namespace)
    serving.deploy(first)
    for patch in (
        '[{"op": "replace", "path": "/spec/predictor/containers/0/image", "value": "localhost/never-loaded:1"}]',
        '[{"op": "add", "path": "/spec/predictor/nodeSelector", "value": {"no-such": "node"}}]',
    ):
        kubectl("-n", namespace, "patch", "inferenceservice", NAME, "--type=json", "-p", patch)
        wait_for("a pod of the edited spec", lambda: len(pod_names(namespace)) == 2)
        assert serving.deploy(first).changed
        assert not serving.deploy(first).changed
        wait_for("the end of the edited spec's pod", lambda: len(pod_names(namespace)) == 1)


def test_missing_role_is_named_in_the_error(namespace: str, models: tuple[DeployRequest, DeployRequest]) -> None:
    with pytest.raises(DeployError, match=r"docs/kubernetes\.md"):
        service(namespace, account="nobody").deploy(models[0])
    assert left_behind(namespace) == []


@pytest.mark.thorough
def test_replicas_follow_the_load_without_a_failed_request(
    namespace: str, models: tuple[DeployRequest, DeployRequest], nothing_serves: None, core: Any
) -> None:
    """Prints the requests per second. Replicas are limited to a tenth of a CPU: a small node has room for the rest."""
    if not is_installed("metrics.k8s.io"):
        pytest.skip("the cluster has no metrics server")
    first, _ = models
    service(namespace, cpu="100m", cpu_limit="100m", max_replicas=3).deploy(first)
    deployments: Any = k8s.AppsV1Api(core.api_client)
    ready: dict[int, int] = {}

    def is_ready(replicas: int) -> bool:
        now = deployments.read_namespaced_deployment(f"{NAME}-predictor", namespace).status.ready_replicas
        ready[int(time.time())] = now
        return now == replicas

    with asking(namespace) as tally:
        with asking(namespace, pod="load", clients=16) as load:
            wait_for("three replicas", lambda: is_ready(3), SCALING_SECONDS)
            measured = time.monotonic() + 30
            wait_for("30 s with three replicas", lambda: is_ready(3) and time.monotonic() > measured)
        wait_for("one replica", lambda: is_ready(1), SCALING_SECONDS)
    assert tally.failures == []
    assert load.failures == []
    for replicas in (1, 2, 3):
        # Without the seconds near a change of their number.
        settled = [s for s in load.by_second if {ready.get(s + near) for near in range(-5, 3)} == {replicas}]
        answers = [load.by_second[second] + tally.by_second.get(second, 0) for second in settled]
        print(f"{replicas}: {sum(answers) / max(1, len(answers)):.1f} requests/s in {len(answers)} s")


@pytest.mark.parametrize("folder", ["inference-service", "inference-service/serverless"])
def test_kserve_accepts_the_committed_service(
    folder: str, namespace: str, models: tuple[DeployRequest, DeployRequest]
) -> None:
    documents = list(yaml.safe_load_all(kubectl("kustomize", str(K8S / folder))))
    for document in documents:
        document["metadata"]["namespace"] = namespace
    text = yaml.safe_dump_all(documents)
    answer = kubectl("apply", "--server-side", "--dry-run=server", "--validate=strict", "-f", "-", text=text)
    assert len(answer.splitlines()) == len(documents)
