"""What is said of a workflow that failed: the step, why, its last lines (the same stories run in tests/cluster)."""

import logging

import pytest

from resources.argo.client import Workflow, WorkflowClient
from resources.argo.report import explain
from resources.argo.resource import WorkflowLauncher, WorkflowLimits, WorkflowWatcher
from resources.kubernetes.errors import ApiUnavailableError, ResourceDeletedError, ResourceStuckError
from tests.unit.argo.fake_argo import FakeArgo
from tests.unit.argo.test_launch import NAME, request
from tests.unit.pytorch_job.fake_cluster import api_error, container_status, pod_body, terminated

STEP_LOG = (
    '2026-01-01T00:00:01Z time=2026 level=INFO msg="waiting for signals" argo=true\n'
    "2026-01-01T00:00:02Z error: objects/abc is missing\n"
    "2026-01-01T00:00:03Z Error: exit status 1\n"
)
LIMITS = WorkflowLimits(pending_timeout_seconds=60, total_timeout_seconds=600, outage_timeout_seconds=50)
LOG = logging.getLogger("test")


@pytest.fixture
def workflow(argo: FakeArgo, client: WorkflowClient) -> Workflow:
    return WorkflowLauncher(client, clock=argo.clock, sleeper=argo.clock.sleep, logger=LOG).submit(request())


def watcher(argo: FakeArgo, client: WorkflowClient, workflow: Workflow, lines: list[str]) -> WorkflowWatcher:
    return WorkflowWatcher(
        client,
        workflow,
        limits=LIMITS,
        on_log_line=lambda line: lines.append(f"{line.replica}: {line.text}"),
        clock=argo.clock,
        sleeper=argo.clock.sleep,
        logger=LOG,
    )


def current(client: WorkflowClient) -> Workflow:
    found = client.get("cifar", NAME)
    assert found
    return found


def test_failed_step_with_its_message_and_last_lines(argo: FakeArgo, client: WorkflowClient, workflow: Workflow):
    argo.step(NAME, "verify-data(0)", "Failed", "main: Error (exit code 1): objects/abc is missing", log=STEP_LOG)
    argo.ends(NAME, "Failed", "child 'x' failed")
    text = explain(client, current(client))
    assert text == (
        f"Workflow cifar/{NAME} failed at step verify-data: main: Error (exit code 1): objects/abc is missing\n"
        "Last lines of verify-data:\n    error: objects/abc is missing"
    )


def test_failed_training_is_diagnosed_as_dagsters_own(argo: FakeArgo, client: WorkflowClient, workflow: Workflow):
    job = f"cifar10-{workflow.uid}"
    argo.jobs[job] = {"metadata": {"name": job, "namespace": "cifar", "uid": "job"}}
    argo.condition(job, "Failed", "failed")
    argo.pods[job] = [pod_body(job, phase="Failed", container_statuses=[container_status(terminated(2))])]
    argo.logs[f"{job}-master-0"] = "2026-01-01T00:00:02Z no such device\n"
    argo.step(NAME, "train(0)", "Failed", "main: Error (exit code 64): failure condition evaluated true")
    argo.ends(NAME, "Failed")
    text = explain(client, current(client))
    assert "failed at step train" in text
    assert f"PyTorchJob cifar/{job} failed (exit code): master-0/pytorch ended with exit code 2" in text
    assert "no such device" in text


def test_attempt_repeated_with_success_is_not_a_failure(argo: FakeArgo, client: WorkflowClient, workflow: Workflow):
    argo.step(NAME, "train(0)", "Error", "pod deleted")
    argo.step(NAME, "train(1)", "Succeeded")
    argo.step(NAME, f"{NAME}.onExit", "Running")
    found = current(client)
    assert found.failed_step is None
    assert explain(client, found) == f"Workflow cifar/{NAME}: no step failed; done: train."


def test_a_workflow_that_ends_before_any_step_says_so(argo: FakeArgo, client: WorkflowClient, workflow: Workflow):
    argo.ends(NAME, "Error", 'workflowtemplates.argoproj.io "pipeline" not found')
    assert "ended before a step could fail" in explain(client, current(client))
    assert '"pipeline" not found' in explain(client, current(client))


def test_rights_that_are_missing_cost_detail_but_not_the_report(
    argo: FakeArgo, client: WorkflowClient, workflow: Workflow
):
    argo.step(NAME, "verify-data(0)", "Failed", "main: Error (exit code 1): objects/abc is missing")
    argo.ends(NAME, "Failed")
    found = current(client)
    argo.failing = lambda call: (_ for _ in ()).throw(api_error(403, "forbidden"))
    text = explain(client, found)
    assert "objects/abc is missing" in text
    assert "could not be read" in text


def test_watching_shows_lines_once_and_without_argos_own(argo: FakeArgo, client: WorkflowClient, workflow: Workflow):
    lines: list[str] = []
    argo.step(NAME, "verify-data(0)", "Failed", "exit code 1", log=STEP_LOG)
    argo.clock.after(20, lambda: argo.ends(NAME, "Failed"))
    finished = watcher(argo, client, workflow, lines).wait_until_finished()
    assert lines == ["verify-data: error: objects/abc is missing"]
    assert finished.failed_step
    error = watcher(argo, client, workflow, lines).failure(finished)
    assert error.step
    assert error.step.name == "verify-data"
    assert not error.transient


def test_a_workflow_that_vanishes_is_an_error(argo: FakeArgo, client: WorkflowClient, workflow: Workflow):
    argo.clock.after(5, lambda: argo.workflows.pop(NAME))
    with pytest.raises(ResourceDeletedError, match=NAME):
        watcher(argo, client, workflow, []).wait_until_finished()


def test_a_controller_that_is_away_is_waited_for_so_long(argo: FakeArgo, client: WorkflowClient, workflow: Workflow):
    start = argo.clock.now
    with pytest.raises(ResourceStuckError, match="controller runs and watches this namespace"):
        watcher(argo, client, workflow, []).wait_until_finished()
    assert 60 <= argo.clock.now - start < 65


def test_a_workflow_past_its_deadline_is_not_waited_for(argo: FakeArgo, client: WorkflowClient, workflow: Workflow):
    argo.ends(NAME, "Running")
    with pytest.raises(ResourceStuckError, match="should have ended it"):
        watcher(argo, client, workflow, []).wait_until_finished()


def test_an_outage_is_endured_for_a_while(argo: FakeArgo, client: WorkflowClient, workflow: Workflow):
    argo.failing = lambda call: (_ for _ in ()).throw(api_error(503)) if argo.clock.now < 1030 else None
    argo.clock.after(40, lambda: argo.ends(NAME, "Succeeded"))
    assert watcher(argo, client, workflow, []).wait_until_finished().phase == "Succeeded"
    argo.failing = lambda call: (_ for _ in ()).throw(api_error(503))
    with pytest.raises(ApiUnavailableError):
        watcher(argo, client, workflow, []).wait_until_finished()


@pytest.mark.parametrize("status", [403, 410, 500])
def test_what_only_adds_to_a_report_does_not_change_the_outcome(
    argo: FakeArgo, client: WorkflowClient, workflow: Workflow, status: int
):
    argo.step(NAME, "verify-data(0)", "Succeeded", log=STEP_LOG)
    argo.clock.after(300, lambda: argo.ends(NAME, "Succeeded"))
    argo.failing = lambda call: (_ for _ in ()).throw(api_error(status)) if call in ("log", "list pods") else None
    assert watcher(argo, client, workflow, []).wait_until_finished().phase == "Succeeded"


def test_log_that_cannot_be_read_does_not_hide_the_diagnosis(
    argo: FakeArgo, client: WorkflowClient, workflow: Workflow
):
    job = f"cifar10-{workflow.uid}"
    argo.jobs[job] = {"metadata": {"name": job, "namespace": "cifar", "uid": "job"}}
    argo.condition(job, "Failed", "failed")
    argo.pods[job] = [pod_body(job, phase="Failed", container_statuses=[container_status(terminated(2))])]
    argo.step(NAME, "train(0)", "Failed", "failure condition evaluated true")
    argo.ends(NAME, "Failed")
    argo.failing = lambda call: (_ for _ in ()).throw(api_error(500)) if call == "log" else None
    assert "master-0/pytorch ended with exit code 2" in explain(client, current(client))


@pytest.mark.parametrize("status", [403, 404, 410])
def test_answer_that_says_nothing_about_the_workflow_does_not_end_the_watch(
    argo: FakeArgo, client: WorkflowClient, workflow: Workflow, status: int
):
    argo.failing = lambda call: (_ for _ in ()).throw(api_error(status)) if argo.clock.now < 1030 else None
    argo.clock.after(40, lambda: argo.ends(NAME, "Succeeded"))
    assert watcher(argo, client, workflow, []).wait_until_finished().phase == "Succeeded"
