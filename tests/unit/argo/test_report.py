"""The report of a failed workflow: step, reason, last log lines. tests/cluster has the same stories."""

import logging
from contextlib import nullcontext
from pathlib import Path

import pytest
from kubernetes.client.exceptions import ApiException

from resources.argo.__main__ import find, report
from resources.argo.client import WorkflowClient, WorkflowFailedError, explain, is_argos_own
from resources.argo.workflow import Workflow
from resources.kubernetes.diagnosis import Cause, WatchLimits
from resources.kubernetes.errors import ApiUnavailableError, ResourceFailedError
from resources.kubernetes.launch import JobLauncher
from resources.kubernetes.watch import JobWatcher
from tests.unit.argo.conftest import NAME, submit
from tests.unit.argo.fake_argo import FakeArgo
from tests.unit.pytorch_job.fake_cluster import api_error, container_status, pod_body, terminated

STEP_LOG = (
    '2026-01-01T00:00:01Z time=2026 level=INFO msg="waiting for signals" argo=true\n'
    "2026-01-01T00:00:02Z error: objects/abc is missing\n"
    "2026-01-01T00:00:03Z Error: exit status 1\n"
)
LIMITS = WatchLimits(start_timeout_seconds=60)


@pytest.fixture
def workflow(argo: FakeArgo, launcher: JobLauncher[Workflow]) -> Workflow:
    return submit(launcher)


def watcher(argo: FakeArgo, client: WorkflowClient, workflow: Workflow, lines: list[str]) -> JobWatcher[Workflow]:
    return JobWatcher(
        client,
        workflow,
        limits=LIMITS,
        on_log_line=lambda line: None if is_argos_own(line.text) else lines.append(f"{line.replica}: {line.text}"),
        clock=argo.clock,
        sleeper=argo.clock.sleep,
        logger=logging.getLogger("test"),
    )


def current(client: WorkflowClient) -> Workflow:
    found = client.get("cifar", NAME)
    assert found
    return found


def test_failed_step_with_its_message_and_last_lines(
    argo: FakeArgo, client: WorkflowClient, workflow: Workflow
) -> None:
    argo.step(NAME, "verify-data(0)", "Failed", "main: Error (exit code 1): objects/abc is missing", log=STEP_LOG)
    argo.ends(NAME, "Failed", "child 'x' failed")
    text = explain(client, current(client))
    assert text == (
        f"Workflow cifar/{NAME} failed at step verify-data: main: Error (exit code 1): objects/abc is missing\n"
        "Last lines of verify-data:\n    error: objects/abc is missing"
    )


def test_failed_training_is_diagnosed_as_dagsters_own(
    argo: FakeArgo, client: WorkflowClient, workflow: Workflow
) -> None:
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


def test_attempt_repeated_with_success_is_not_a_failure(
    argo: FakeArgo, client: WorkflowClient, workflow: Workflow
) -> None:
    argo.step(NAME, "train(0)", "Error", "pod deleted")
    argo.step(NAME, "train(1)", "Succeeded")
    argo.step(NAME, f"{NAME}.onExit", "Running")
    found = current(client)
    assert found.failed_step is None
    assert explain(client, found) == f"Workflow cifar/{NAME}: no step failed; done: train."


def test_the_exit_handler_waits_until_argo_has_stored_the_steps_before_it(
    argo: FakeArgo, client: WorkflowClient, workflow: Workflow
) -> None:
    def store(seconds: float) -> None:
        argo.step(NAME, "train(0)", "Failed", "no GPU")
        argo.step(NAME, f"{NAME}.onExit", "Running")

    early = find(client, "cifar", NAME, in_handler=False, sleeper=store)
    assert early
    assert early.failed_step is None
    stored = find(client, "cifar", NAME, in_handler=True, sleeper=store)
    assert stored
    assert stored.failed_step
    assert stored.failed_step.name == "train"
    assert find(client, "cifar", "other", in_handler=True, sleeper=store) is None


def unavailable(call: str) -> None:
    raise api_error(503, "no leader")


def test_the_exit_handler_waits_for_the_api_server(argo: FakeArgo, client: WorkflowClient, workflow: Workflow) -> None:
    argo.step(NAME, f"{NAME}.onExit", "Running")
    times = {"clock": argo.clock, "sleeper": argo.clock.sleep}
    argo.failing, start = unavailable, argo.clock.now
    argo.clock.after(30, lambda: setattr(argo, "failing", lambda call: None))
    assert find(client, "cifar", NAME, in_handler=True, **times)
    assert argo.clock.now - start == 30
    argo.failing, start = unavailable, argo.clock.now
    with pytest.raises(ApiUnavailableError):
        find(client, "cifar", NAME, in_handler=True, **times)
    assert argo.clock.now - start == 60
    with pytest.raises(ApiUnavailableError):
        find(client, "cifar", NAME, in_handler=False, **times)
    assert argo.clock.now - start == 60


@pytest.mark.parametrize("error", [api_error(403, "forbidden"), KeyError("nodes")], ids=["refused", "unexpected"])
def test_a_report_that_cannot_be_made_does_not_fail_the_exit_handler(
    argo: FakeArgo,
    client: WorkflowClient,
    error: Exception,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setattr(WorkflowClient, "production", lambda: client)
    argo.failing = lambda call: (_ for _ in ()).throw(error)
    assert report(["cifar", NAME, f"--outputs={tmp_path}"]) == 0
    assert "error: " in capsys.readouterr().err
    with nullcontext() if isinstance(error, ApiException) else pytest.raises(KeyError):
        assert report(["cifar", NAME]) == 1


@pytest.mark.parametrize("stored", [{"compressedNodes": "H4sI"}, {"offloadNodeStatusVersion": "fnv:1"}])
def test_steps_that_cannot_be_read_are_not_waited_for(
    argo: FakeArgo, client: WorkflowClient, workflow: Workflow, stored: dict[str, str]
) -> None:
    argo.ends(NAME, "Failed", "child 'x' failed")
    argo.workflows[NAME]["status"] |= stored
    start = argo.clock.now
    found = find(client, "cifar", NAME, in_handler=True, clock=argo.clock, sleeper=argo.clock.sleep)
    assert found
    assert argo.clock.now == start
    assert "Failed: child 'x' failed. Argo has compressed or offloaded its steps" in explain(client, found)
    with pytest.raises(WorkflowFailedError) as caught:
        watcher(argo, client, workflow, []).wait_until_finished()
    assert not caught.value.transient


def test_a_workflow_that_ends_before_any_step_says_so(
    argo: FakeArgo, client: WorkflowClient, workflow: Workflow
) -> None:
    argo.ends(NAME, "Error", 'workflowtemplates.argoproj.io "pipeline" not found')
    assert "ended before any step failed" in explain(client, current(client))
    assert '"pipeline" not found' in explain(client, current(client))


def test_missing_permissions_reduce_detail_but_keep_the_report(
    argo: FakeArgo, client: WorkflowClient, workflow: Workflow
) -> None:
    argo.step(NAME, "verify-data(0)", "Failed", "main: Error (exit code 1): objects/abc is missing")
    argo.ends(NAME, "Failed")
    found = current(client)
    argo.failing = lambda call: (_ for _ in ()).throw(api_error(403, "forbidden"))
    text = explain(client, found)
    assert "objects/abc is missing" in text
    assert "could not be read" in text


def test_watching_shows_lines_once_and_without_argos_own(
    argo: FakeArgo, client: WorkflowClient, workflow: Workflow
) -> None:
    lines: list[str] = []
    argo.step(NAME, "verify-data(0)", "Failed", "exit code 1", log=STEP_LOG)
    argo.clock.after(20, lambda: argo.ends(NAME, "Failed"))
    with pytest.raises(WorkflowFailedError, match="failed at step verify-data: exit code 1") as caught:
        watcher(argo, client, workflow, lines).wait_until_finished()
    assert lines == ["verify-data: error: objects/abc is missing"]
    assert not caught.value.transient


def test_lines_of_the_training_are_shown(argo: FakeArgo, client: WorkflowClient, workflow: Workflow) -> None:
    body = pod_body("job", container_statuses=[container_status(terminated(0))])
    body["metadata"]["labels"]["cifar/argo-workflow"] = NAME
    argo.pods["job"] = [body]
    argo.logs["job-master-0"] = "2026-01-01T00:00:02Z epoch 1\n"
    argo.step(NAME, "train(0)", "Running", log=STEP_LOG)
    argo.clock.after(20, lambda: argo.ends(NAME, "Succeeded"))
    lines: list[str] = []
    watcher(argo, client, workflow, lines).wait_until_finished()
    assert lines == ["master-0: epoch 1"]


def test_wait_for_an_absent_controller_is_limited(argo: FakeArgo, client: WorkflowClient, workflow: Workflow) -> None:
    start = argo.clock.now
    with pytest.raises(ResourceFailedError, match="Argo's controller has not processed it yet") as caught:
        watcher(argo, client, workflow, []).wait_until_finished()
    assert 60 <= argo.clock.now - start < 65
    assert caught.value.diagnosis.cause == Cause.NO_PODS


def test_a_workflow_past_its_deadline_is_not_waited_for(
    argo: FakeArgo, client: WorkflowClient, workflow: Workflow
) -> None:
    argo.ends(NAME, "Running")
    argo.workflows[NAME]["status"]["storedWorkflowTemplateSpec"] = {"activeDeadlineSeconds": 100}
    with pytest.raises(ResourceFailedError, match="its deadline is 100 s"):
        watcher(argo, client, workflow, []).wait_until_finished()


def test_workflow_held_by_argo_is_waited_for(
    argo: FakeArgo, client: WorkflowClient, workflow: Workflow, caplog: pytest.LogCaptureFixture
) -> None:
    argo.ends(NAME, "Pending", "Waiting for cifar/Mutex/training lock")
    argo.clock.after(1000, lambda: argo.ends(NAME, "Succeeded"))
    caplog.set_level(logging.INFO)
    watcher(argo, client, workflow, []).wait_until_finished()
    assert caplog.text.count("Waiting for cifar/Mutex/training lock") == 1


def test_a_step_that_cannot_start_is_left_to_argos_deadline(
    argo: FakeArgo, client: WorkflowClient, workflow: Workflow
) -> None:
    argo.ends(NAME, "Running")
    waiting = {"waiting": {"reason": "ErrImagePull", "message": "no such tag"}}
    pod = pod_body(NAME, phase="Pending", container_statuses=[container_status(waiting) | {"name": "main"}])
    argo.step_pods.append(pod)
    argo.clock.after(1000, lambda: argo.ends(NAME, "Failed", "deadline"))
    with pytest.raises(WorkflowFailedError):
        watcher(argo, client, workflow, []).wait_until_finished()


def test_log_that_cannot_be_read_does_not_hide_the_diagnosis(
    argo: FakeArgo, client: WorkflowClient, workflow: Workflow
) -> None:
    job = f"cifar10-{workflow.uid}"
    argo.jobs[job] = {"metadata": {"name": job, "namespace": "cifar", "uid": "job"}}
    argo.condition(job, "Failed", "failed")
    argo.pods[job] = [pod_body(job, phase="Failed", container_statuses=[container_status(terminated(2))])]
    argo.step(NAME, "train(0)", "Failed", "failure condition evaluated true")
    argo.ends(NAME, "Failed")
    argo.failing = lambda call: (_ for _ in ()).throw(api_error(500)) if call == "log" else None
    assert "master-0/pytorch ended with exit code 2" in explain(client, current(client))
