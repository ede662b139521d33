"""The resource in a Dagster run, against the fake controller: results, failures, canceling, crashes and restarts."""

import json
from collections.abc import Callable
from typing import Any

import dagster as dg
import pytest
from dagster._core.errors import DagsterExecutionInterruptedError

from cifar_assets.deployment import resources_for
from resources.argo import PipelineRequest, PipelineResource
from resources.argo.client import WorkflowClient, explain
from resources.argo.resource import ArgoPipeline
from resources.argo.template import WORKFLOW_LABEL
from resources.argo.workflow import Workflow
from tests.fixtures.settings import settings_of
from tests.unit.argo.fake_argo import FakeArgo
from tests.unit.orchestration.test_definitions import KUBERNETES_ENVIRONMENT
from tests.unit.pytorch_job.fake_cluster import api_error

REQUEST = PipelineRequest(
    dataset_digest="d" * 64,
    recipe="fast",
    overrides={"epochs": 1},
    execution={"threads": 1},
    seed=5,
    replicas=2,
    threshold=0.5,
)
CURRENT: list[FakeArgo] = []


class FakePipeline(ArgoPipeline):
    """The real resource with the fake API."""

    def connect(self) -> WorkflowClient:
        return WorkflowClient(CURRENT[-1], CURRENT[-1])


@dg.asset
def model(context: dg.AssetExecutionContext, argo: PipelineResource) -> dg.MaterializeResult:
    """Runs the pipeline as the asset does."""
    result = argo.run(context, REQUEST)
    verdict = {"passed": result.verdict.passed, "accuracy": result.verdict.numbers["test_accuracy"]}
    return dg.MaterializeResult(metadata={"digest": result.training.model_digest, "run": result.run, **verdict})


@dg.asset(retry_policy=dg.RetryPolicy(max_retries=1))
def retried(context: dg.AssetExecutionContext, argo: PipelineResource) -> None:
    """The same, with one retry."""
    argo.run(context, REQUEST)


@pytest.fixture
def fake() -> FakeArgo:
    CURRENT.append(FakeArgo())
    return CURRENT[-1]


def materialize(
    instance: dg.DagsterInstance | None = None, asset: dg.AssetsDefinition = model
) -> dg.ExecuteInProcessResult:
    resource = FakePipeline(namespace="cifar", poll_interval_seconds=0.01, parameters={"trainer-image": "trainer"})
    return dg.materialize([asset], resources={"argo": resource}, instance=instance, raise_on_error=False)


def reported(passed: bool) -> list[dict[str, str]]:
    report = {"model_digest": "m" * 64, "model_uri": "s3://models/m/", "mlflow_run_id": None, "resumed_from": None}
    report |= {"mlflow_model_version": None, "test_accuracy": 0.6, "threshold": 0.5 if passed else 0.9}
    return [{"name": "model", "value": json.dumps({**report, "passed": passed, "reason": "by accuracy"})}]


def ending(*steps: Callable[[FakeArgo, str], None], phase: str) -> Callable[[FakeArgo, str], None]:
    def act(argo: FakeArgo, name: str) -> None:
        for step in steps:
            step(argo, name)
        argo.ends(name, phase)

    return act


def verified(phase: str, passed: bool) -> Callable[[FakeArgo, str], None]:
    outputs = {"parameters": reported(passed)}
    return lambda argo, name: argo.step(name, "verify-model(0)", phase, outputs=outputs)


def failure(result: dg.ExecuteInProcessResult) -> Any:
    (event,) = [event for event in result.all_node_events if event.is_step_failure]
    return event.step_failure_data


def test_a_workflow_that_succeeds(fake: FakeArgo) -> None:
    fake.on_submitted = ending(verified("Succeeded", True), phase="Succeeded")
    result = materialize()
    assert result.success
    metadata = result.asset_materializations_for_node("model")[0].metadata
    assert metadata["digest"].value == "m" * 64
    assert metadata["passed"].value is True
    (workflow,) = fake.workflows.values()
    given = {p["name"]: p["value"] for p in workflow["spec"]["arguments"]["parameters"]}
    assert given == {
        "trainer-image": "trainer",
        "dataset": "d" * 64,
        "recipe": "fast",
        "overrides": '{"epochs": 1}',
        "execution": '{"threads": 1}',
        "seed": "5",
        "replicas": "2",
        "threshold": "0.5",
    }


def test_rejected_model_is_a_result(fake: FakeArgo) -> None:
    fake.on_submitted = ending(verified("Failed", False), phase="Failed")
    result = materialize()
    assert result.success
    assert result.asset_materializations_for_node("model")[0].metadata["passed"].value is False


@pytest.mark.parametrize("phase", ["Failed", "Error"])
def test_a_failed_exit_handler_does_not_change_the_outcome(fake: FakeArgo, phase: str) -> None:
    """Argo gives a workflow that succeeded the phase of its exit handler."""
    fake.on_submitted = ending(
        verified("Succeeded", True),
        lambda argo, name: argo.root(name, "Succeeded"),
        lambda argo, name: argo.step(name, f"{name}.onExit", phase, "pod deleted"),
        phase=phase,
    )
    assert materialize(asset=retried).success
    assert fake.num_submitted == 1
    assert "done: verify-model" in explain(WorkflowClient(fake, fake), Workflow(*fake.workflows.values()))


def test_damaged_model_is_a_failure(fake: FakeArgo) -> None:
    fake.on_submitted = ending(
        lambda argo, name: argo.step(name, "verify-model(0)", "Failed", "model.onnx was changed"), phase="Failed"
    )
    data = failure(materialize())
    assert "failed at step verify-model: model.onnx was changed" in data.user_failure_data.description


def test_unreadable_report_is_an_error(fake: FakeArgo) -> None:
    fake.on_submitted = ending(phase="Succeeded")
    assert "which cannot be read" in str(failure(materialize()).error)


def test_canceling_removes_the_workflow(fake: FakeArgo) -> None:
    with dg.DagsterInstance.ephemeral() as instance:

        def cancel(call: str) -> None:
            if call == "get" and fake.workflows:
                fake.failing = lambda call: None
                (run,) = instance.get_runs()
                instance.report_run_canceling(run)
                raise DagsterExecutionInterruptedError()

        fake.failing = cancel
        materialize(instance)
    assert not fake.workflows
    assert fake.patches[0]["spec"] == {"shutdown": "Terminate"}


def test_refused_clean_up_does_not_hide_a_cancellation(fake: FakeArgo) -> None:
    with dg.DagsterInstance.ephemeral() as instance:

        def cancel(call: str) -> None:
            if call == "get" and fake.workflows:
                fake.failing = refuse
                (run,) = instance.get_runs()
                instance.report_run_canceling(run)
                raise DagsterExecutionInterruptedError()

        def refuse(call: str) -> None:
            raise api_error(403, "workflows is forbidden")

        fake.failing = cancel
        result = materialize(instance)
        error = failure(result).error
    assert error.cls_name == "DagsterExecutionInterruptedError"


def test_report_that_is_not_json_does_not_hide_the_failed_step(fake: FakeArgo) -> None:
    outputs = {"parameters": [{"name": "model", "value": "Traceback"}]}
    fake.on_submitted = ending(
        lambda argo, name: argo.step(name, "verify-model(0)", "Failed", "exit code 1", outputs=outputs), phase="Failed"
    )
    assert "failed at step verify-model" in failure(materialize()).user_failure_data.description


def test_interrupted_process_leaves_the_workflow(fake: FakeArgo) -> None:
    def stop(call: str) -> None:
        if call == "get" and fake.workflows:
            raise DagsterExecutionInterruptedError()

    fake.failing = stop
    assert not materialize().success
    assert len(fake.workflows) == 1
    assert not fake.patches


def test_the_retry_after_a_workflow_that_vanished_first_removes_its_job(fake: FakeArgo) -> None:
    """It is deleted with `--cascade=orphan` while the first attempt waits for it."""
    beside: list[tuple[str, ...]] = []

    def vanish(call: str) -> None:
        if call == "list pods":  # the watch's first look has just read the workflow
            fake.failing = lambda call: None
            fake.workflows.clear()

    def act(argo: FakeArgo, name: str) -> None:
        beside.append(tuple(argo.jobs))
        if len(beside) > 1:
            ending(verified("Succeeded", True), phase="Succeeded")(argo, name)
            return
        metadata = {"name": "cifar10-old", "namespace": "cifar", "uid": "old", "labels": {WORKFLOW_LABEL: name}}
        argo.jobs["cifar10-old"] = {"metadata": metadata}
        argo.failing = vanish

    fake.on_submitted = act
    assert materialize(asset=retried).success
    assert beside == [(), ()]


def test_settings_from_the_environment() -> None:
    argo = resources_for(settings_of({**KUBERNETES_ENVIRONMENT, "ARGO_PARAMETERS": '{"steps-image": "steps:1"}'}))[
        "argo"
    ]
    assert argo.parameters == {"trainer-image": KUBERNETES_ENVIRONMENT["TRAINER_IMAGE"], "steps-image": "steps:1"}
    assert argo.namespace == "cifar"
