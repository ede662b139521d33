"""The workflow of k8s/argo with the real controller: success, failures of each step, and cleanup.

Needs Argo Workflows, and the images cifar-dagster and cifar-trainer in the cluster.
"""

import json
import os
import shutil
import signal
from collections.abc import Iterator
from pathlib import Path
from threading import Thread
from typing import Any

import dagster as dg
import pytest
import yaml
from kubernetes import client as k8s

from cifar_assets.assets.record import data_version
from cifar_assets.dataset.versions.processed import read_processed
from cifar_assets.gate import judge
from resources.argo import PipelineRequest, PipelineResource
from resources.argo.client import WorkflowClient, explain
from resources.argo.resource import ArgoPipeline
from resources.argo.template import FAILURE_CONDITION, SUCCESS_CONDITION, WORKFLOW_LABEL
from resources.argo.workflow import Workflow
from resources.kubernetes.job import JobState
from resources.pytorch_job.client import read_status
from resources.pytorch_job.manifest import GROUP, KIND, PLURAL, VERSION
from tests.cluster.argo import IMAGES, WORKFLOW_SECONDS, ArgoCluster
from tests.cluster.kubectl import kubectl, wait_for
from tests.cluster.platform import Platform
from tests.fixtures.cifar10 import ARGO_TRAINED_MODEL, TRAINED_MODEL
from tests.fixtures.tiny_data import TINY_RECIPE, TinyData, store_tiny_data
from tests.fixtures.workspace import ROOT, Workspace

STATUS_SERIES = ROOT / "tests/unit/pytorch_job/status_series.yaml"
ENDLESS = {**TINY_RECIPE, "epochs": 1000, "width": 64}
"""For trainings that a test ends: they take far longer than any test waits."""
NO_DEVICE = json.dumps({"threads": 1, "device": "cuda"})


@pytest.fixture(scope="module")
def argo(core: Any, platform: Platform) -> Iterator[ArgoCluster]:
    """The applied templates. Skips if the cluster has no Argo."""
    if not kubectl("get", "crd", "workflows.argoproj.io", "--ignore-not-found", "-o", "name"):
        pytest.skip("the cluster has no Argo Workflows")
    cluster = ArgoCluster(platform.namespace, WorkflowClient.production(), platform.store())
    with cluster.deployed():
        yield cluster


@pytest.fixture(scope="module")
def damaged(argo: ArgoCluster) -> TinyData:
    """A processed version one of whose shards was changed."""
    data = store_tiny_data(argo.store, train=100, test=40)
    processed = argo.store.at("processed-data")
    key = read_processed(processed, data.processed).shards["train"][0].key(data.processed)
    processed.write(key, processed.read(key)[:-1] + b"?")
    return data


@pytest.fixture(scope="module")
def tiny(argo: ArgoCluster, damaged: TinyData) -> TinyData:
    """The current version, which is intact."""
    return store_tiny_data(argo.store)


@pytest.fixture(scope="module")
def stories(argo: ArgoCluster, tiny: TinyData, damaged: TinyData) -> dict[str, str]:
    """Names of workflows that run concurrently, because they mostly wait."""
    return {
        "killed": argo.create(overrides=json.dumps({**TINY_RECIPE, "epochs": 300})),
        "deleted": argo.create(overrides=json.dumps(ENDLESS)),
        "missing": argo.create(dataset="f" * 64),
        "damaged": argo.create(dataset=damaged.processed),
        "training": argo.create(execution=NO_DEVICE),
        "refused": argo.create(threshold="0.99"),
        "demo": argo.create("demo.yaml"),
    }


@pytest.fixture(scope="module")
def killed(argo: ArgoCluster, stories: dict[str, str]) -> str:
    """Deletes the pod that waits for the training of one story. Returns the uid of that PyTorchJob."""
    name = stories["killed"]
    wait_for("a training that is waited for", lambda: _training(argo, name), WORKFLOW_SECONDS)
    workflow = argo.workflow(name)
    (pod,) = [pod for pod in argo.client.pods(argo.namespace, workflow.name) if pod.replica == "train"]
    job = argo.client.jobs.get(argo.namespace, workflow.job_name)
    assert job
    kubectl("-n", argo.namespace, "delete", "pod", pod.name, "--wait=false")
    return job.uid


def test_deleting_the_workflow_removes_its_job(argo: ArgoCluster, stories: dict[str, str], killed: str) -> None:
    name = stories["deleted"]
    wait_for("a training that is waited for", lambda: _training(argo, name), WORKFLOW_SECONDS)
    workflow = argo.workflow(name)
    kubectl("-n", argo.namespace, "delete", "workflow", name, "--wait=false")
    wait_for("the end of its PyTorchJob", lambda: not argo.job_exists(workflow))
    wait_for("the end of its pods", lambda: not _pods_left(argo, workflow))


def test_submitting_twice_creates_one_job(
    argo: ArgoCluster, stories: dict[str, str], killed: str, tiny: TinyData
) -> None:
    """The pod that submits is deleted once the PyTorchJob exists."""
    workflow = argo.finished(stories["killed"])
    assert workflow.phase == "Succeeded", explain(argo.client, workflow)
    (job,) = [job for job in argo.client.jobs.find(argo.namespace) if job.labels.get(WORKFLOW_LABEL) == workflow.name]
    assert job.uid == killed
    report = json.loads(workflow.output("model") or "")
    assert judge(argo.store.at("models"), report["model_digest"], 0)[0].dataset_digest == tiny.processed


@pytest.mark.parametrize(
    ("story", "step", "reason"),
    [
        ("missing", "verify-data", f"There is no processed version {'f' * 64}"),
        ("damaged", "verify-processed", ".safetensors: expected sha256"),
        ("training", "train", "torch finds no GPU"),
        ("refused", "verify-model", "is below the threshold 0.9900"),
    ],
)
def test_failed_step_reports_the_reason(
    argo: ArgoCluster, stories: dict[str, str], story: str, step: str, reason: str
) -> None:
    workflow = argo.finished(stories[story])
    text = explain(argo.client, workflow)
    assert workflow.phase == "Failed", text
    assert workflow.failed_step, text
    assert workflow.failed_step.name == step
    assert reason in text
    assert reason in (workflow.output("report") or "")
    assert len([attempt for attempt in workflow.steps if attempt.name == step]) == 1


def test_demo_does_not_train(argo: ArgoCluster, stories: dict[str, str]) -> None:
    workflow = argo.finished(stories["demo"])
    assert workflow.phase == "Succeeded", explain(argo.client, workflow)
    assert [step.name for step in workflow.steps] == ["verify-data", "verify-processed", f"{workflow.name}.onExit"]
    assert not argo.job_exists(workflow)


@dg.asset
def long_training(context: dg.AssetExecutionContext, argo: PipelineResource) -> None:
    """Waits for a long workflow."""
    (digest,) = context.run.tags["dataset"].split()
    request = PipelineRequest(digest, "fast", ENDLESS, {"threads": 1}, 0, 1, 0.0)
    argo.run(context, request)


def test_canceling_the_dagster_run_removes_workflow_and_job(argo: ArgoCluster, tiny: TinyData, tmp_path: Path) -> None:
    resource = ArgoPipeline(namespace=argo.namespace, parameters=IMAGES, name_prefix="canceled")
    with dg.DagsterInstance.local_temp(str(tmp_path)) as instance:

        def cancel_once_it_trains() -> None:
            (run,) = wait_for("the run", lambda: instance.get_runs(filters=_STARTED))
            name = Workflow.name_for("canceled", run_id=run.run_id, step_key="long_training", attempt=0)
            wait_for("the workflow", lambda: argo.client.get(argo.namespace, name))
            wait_for("a training that is waited for", lambda: _training(argo, name), WORKFLOW_SECONDS)
            seen.append(argo.workflow(name))
            instance.report_run_canceling(run)
            os.kill(os.getpid(), signal.SIGTERM)

        seen: list[Workflow] = []
        canceler = Thread(target=cancel_once_it_trains, daemon=True)
        canceler.start()
        result = dg.materialize(
            [long_training],
            resources={"argo": resource},
            instance=instance,
            tags={"dataset": tiny.processed},
            raise_on_error=False,
        )
        canceler.join(300)
        run = instance.get_run_by_id(result.run_id)
    assert run
    assert run.status == dg.DagsterRunStatus.CANCELED
    (workflow,) = seen
    assert argo.client.get(argo.namespace, workflow.name) is None
    assert not argo.job_exists(workflow)


_STARTED = dg.RunsFilter(statuses=[dg.DagsterRunStatus.STARTED])


def test_controller_interprets_status_like_the_pipes_client(argo: ArgoCluster, core: Any) -> None:
    """Every final status and an intermediate one, written into jobs that no operator manages."""
    series: dict[str, list[dict[str, Any]]] = yaml.safe_load(STATUS_SERIES.read_text())
    last = {f"status-{number}": series[name][-1]["status"] for number, name in enumerate(_TOLD)}
    api = k8s.CustomObjectsApi(core.api_client)
    for job, status in last.items():
        _store_job(api, argo.namespace, job, status)
    expected = {job: _ENDS.get(read_status(status).state) for job, status in last.items()}
    name = argo.submit(_looking_at(list(last), argo.namespace), {})

    def seen() -> dict[str, tuple[str, bool]]:
        steps = {step.name.partition(":")[2].rstrip(")"): step for step in argo.workflow(name).steps}
        return {job: (step.phase, "failure condition" in step.message) for job, step in steps.items()}

    final = {job: end for job, end in expected.items() if end}
    wait_for(f"the ends of {list(final)}", lambda: final.keys() <= seen().keys() and _all_ended(seen(), final))
    found = seen()
    assert {job: found[job] for job in final} == final
    assert {found[job][0] for job in expected.keys() - final.keys()} <= {"Pending", "Running"}


_TOLD = (
    "one master succeeds",
    "succeeds before it was seen running",
    "exit code that is final",
    "refused by the operator's own validation",
    "deadline exceeded while running",
    "both final conditions",
    "condition of a later operator",
)
_ENDS = {JobState.SUCCEEDED: ("Succeeded", False), JobState.FAILED: ("Failed", True)}


def _all_ended(seen: dict[str, tuple[str, bool]], jobs: dict[str, Any]) -> bool:
    return all(seen[job][0] not in ("Pending", "Running") for job in jobs)


@pytest.mark.parametrize(
    ("account", "verb", "resource", "allowed"),
    [
        ("dagster", "create", "workflows", "yes"),
        ("dagster", "patch", "workflows", "yes"),
        ("dagster", "list", "workflows", "no"),
        ("dagster", "update", "workflows", "no"),
        ("argo-workflow", "create", "pytorchjobs", "yes"),
        ("argo-workflow", "delete", "pytorchjobs", "no"),
        ("argo-workflow", "get", "pods/log", "no"),
        ("argo-workflow", "get", "secrets", "no"),
        ("argo-report", "get", "pods/log", "yes"),
        ("argo-report", "create", "pytorchjobs", "no"),
        ("argo-report", "get", "secrets", "no"),
    ],
)
def test_rights(argo: ArgoCluster, account: str, verb: str, resource: str, allowed: str) -> None:
    name, _, subresource = resource.partition("/")
    group = {"workflows": "argoproj.io", "pytorchjobs": "kubeflow.org"}.get(name, "")
    attributes = {"namespace": argo.namespace, "verb": verb, "resource": name, "group": group}
    spec = {
        "user": f"system:serviceaccount:{argo.namespace}:{account}",
        "resourceAttributes": {**attributes, "subresource": subresource},
    }
    review = {"apiVersion": "authorization.k8s.io/v1", "kind": "SubjectAccessReview", "spec": spec}
    answer = yaml.safe_load(kubectl("create", "-f", "-", "-o", "yaml", text=yaml.safe_dump(review)))
    assert answer["status"]["allowed"] is (allowed == "yes")


def test_both_pipelines_produce_the_same_model(
    argo: ArgoCluster, tiny: TinyData, platform: Platform, tmp_path: Path
) -> None:
    """trained_model as a PyTorchJob, then the job argo_parity, both started as users do."""
    shutil.copy(ROOT / "dagster.yaml", tmp_path)
    environment = {
        **platform.environment(),
        "PYTHONPATH": str(ROOT),
        "ACCURACY_THRESHOLD": "0",
        "ARGO_PARAMETERS": json.dumps(IMAGES),
    }
    workspace = Workspace(tmp_path, environment)
    config = {"overrides": TINY_RECIPE, "recipe": "fast", "dataset_digest": tiny.processed, "seed": 5}
    config |= {"execution": {"threads": 1}, "scale": {"cpu": "200m", "memory": "2Gi"}}
    done = workspace.materialize("cifar10/trained_model", {"trained_model": config})
    assert done.returncode == 0, done.stdout
    done = workspace.python("-m", "dagster", "job", "execute", "-m", "cifar_assets.definitions", "-j", "argo_parity")
    assert done.returncode == 0, done.stdout
    assert "[master-0] Epoch 1/1" in done.stdout
    with workspace.instance() as instance:
        models = {}
        for key in (TRAINED_MODEL, ARGO_TRAINED_MODEL):
            event = instance.get_latest_materialization_event(key)
            assert event
            assert event.asset_materialization
            models[key] = data_version(event.asset_materialization)
        run_id = instance.get_runs(limit=1)[0].run_id
        entries = instance.all_logs(run_id, of_type=dg.DagsterEventType.ASSET_CHECK_EVALUATION)
        events = [entry.get_dagster_event() for entry in entries]
        checks = {e.asset_check_evaluation_data.check_name: e.asset_check_evaluation_data.passed for e in events}
    assert models[TRAINED_MODEL] == models[ARGO_TRAINED_MODEL]
    assert checks == dict.fromkeys(
        ["same_inputs", "same_artefacts", "same_metrics", "same_weights", "same_verdict"], True
    )


def _training(argo: ArgoCluster, name: str) -> bool:
    workflow = argo.workflow(name)
    assert not workflow.finished, explain(argo.client, workflow)
    waiting = any(step.name == "train" and step.phase == "Running" for step in workflow.steps)
    return waiting and argo.job_exists(workflow)


def _pods_left(argo: ArgoCluster, workflow: Workflow) -> bool:
    return bool(argo.client.pods(argo.namespace, workflow.name))


def _store_job(api: k8s.CustomObjectsApi, namespace: str, name: str, status: dict[str, Any]) -> None:
    container = {"name": "pytorch", "image": "nothing.invalid/nothing"}
    replica = {"replicas": 1, "template": {"spec": {"containers": [container]}}}
    job = {
        "apiVersion": f"{GROUP}/{VERSION}",
        "kind": KIND,
        "metadata": {"name": name, "labels": {"app.kubernetes.io/managed-by": "argo-workflow"}},
        "spec": {
            "runPolicy": {"managedBy": "kueue.x-k8s.io/multikueue"},  # not the operator
            "pytorchReplicaSpecs": {"Master": replica},
        },
    }
    api.create_namespaced_custom_object(GROUP, VERSION, namespace, PLURAL, job)
    patch = {"status": {"replicaStatuses": {}, **status}}
    api.patch_namespaced_custom_object_status(GROUP, VERSION, namespace, PLURAL, name, patch)


def _looking_at(jobs: list[str], namespace: str) -> dict[str, Any]:
    """A workflow that reads each job with the training step's conditions."""
    manifest = "apiVersion: kubeflow.org/v1\nkind: PyTorchJob\nmetadata: {name: '{{inputs.parameters.job}}'}\n"
    arguments = {"parameters": [{"name": "job", "value": "{{item}}"}]}
    look = {
        "name": "look",
        "inputs": {"parameters": [{"name": "job"}]},
        "resource": {
            "action": "get",
            "successCondition": SUCCESS_CONDITION,
            "failureCondition": FAILURE_CONDITION,
            "manifest": manifest,
        },
    }
    step = {"name": "look", "template": "look", "arguments": arguments, "withItems": jobs}
    return {
        "apiVersion": "argoproj.io/v1alpha1",
        "kind": "Workflow",
        "metadata": {"generateName": "conditions-", "namespace": namespace},
        "spec": {
            "entrypoint": "every",
            "serviceAccountName": "argo-workflow",
            "templates": [{"name": "every", "steps": [[step]]}, look],
        },
    }
