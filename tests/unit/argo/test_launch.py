"""One step, one workflow, whatever was there before and whatever answers are lost."""

import copy
import logging

import pytest

from resources.argo.client import WorkflowClient, workflow_name
from resources.argo.resource import WorkflowLauncher, WorkflowRequest
from resources.kubernetes.errors import ApiRefusedError, ApiUnavailableError, ResourceConflictError, ResourceStuckError
from tests.unit.argo.fake_argo import FakeArgo
from tests.unit.pytorch_job.fake_cluster import api_error, pod_body

NAME = workflow_name("parity", run_id="run-1", step_key="step")


def request(**changes: str) -> WorkflowRequest:
    values = {"name": NAME, "namespace": "cifar", "template": "pipeline", "run_id": "run-1", "step_key": "step"}
    return WorkflowRequest(**{**values, **changes}, parameters={"seed": "3"})


@pytest.fixture
def launcher(argo: FakeArgo, client: WorkflowClient) -> WorkflowLauncher:
    log = logging.getLogger("test")
    return WorkflowLauncher(client, clock=argo.clock, sleeper=argo.clock.sleep, logger=log, outage_seconds=30)


def test_the_workflow_is_the_templates_with_the_parameters(argo: FakeArgo, launcher: WorkflowLauncher) -> None:
    launcher.submit(request())
    assert argo.workflows[NAME]["spec"] == {
        "workflowTemplateRef": {"name": "pipeline"},
        "arguments": {"parameters": [{"name": "seed", "value": "3"}]},
    }


@pytest.mark.parametrize("phase", [None, "Running", "Succeeded"])
def test_a_repeated_submit_finds_the_first(argo: FakeArgo, launcher: WorkflowLauncher, phase: str | None) -> None:
    first = launcher.submit(request())
    if phase:
        argo.ends(NAME, phase)
    assert launcher.submit(request()).uid == first.uid
    assert argo.num_submitted == 1


def test_a_create_call_whose_answer_was_lost_makes_one_workflow(argo: FakeArgo, launcher: WorkflowLauncher) -> None:
    answers = iter([ConnectionResetError("reset")])

    def lose() -> None:
        if error := next(answers, None):
            raise error

    argo.after_create = lose
    assert launcher.submit(request()).uid == "uid-1"
    assert argo.num_submitted == 1


@pytest.mark.parametrize("phase", ["Failed", "Error"])
def test_a_failed_one_is_replaced(argo: FakeArgo, launcher: WorkflowLauncher, phase: str) -> None:
    launcher.submit(request())
    argo.ends(NAME, phase)
    argo.seconds_to_delete = 5
    assert launcher.submit(request()).uid == "uid-2"


@pytest.mark.parametrize("change", [{"run_id": "run-2"}, {"step_key": "other"}])
def test_somebody_elses_is_left_alone(argo: FakeArgo, launcher: WorkflowLauncher, change: dict[str, str]) -> None:
    launcher.submit(request(**change))
    with pytest.raises(ResourceConflictError, match=NAME):
        launcher.submit(request())
    launcher.remove(request(), timeout_seconds=5)
    assert NAME in argo.workflows


def test_an_outage_is_endured_for_a_while(argo: FakeArgo, launcher: WorkflowLauncher) -> None:
    def away(call: str) -> None:
        if argo.clock.now < 1020:
            raise api_error(503)

    argo.failing = away
    assert launcher.submit(request()).uid == "uid-1"
    argo.failing = lambda call: (_ for _ in ()).throw(api_error(503))
    with pytest.raises(ApiUnavailableError, match=NAME):
        launcher.submit(request())


def test_a_cluster_without_argo_is_named(argo: FakeArgo, launcher: WorkflowLauncher) -> None:
    argo.failing = lambda call: (_ for _ in ()).throw(api_error(404, "the server could not find the resource"))
    with pytest.raises(ApiRefusedError, match="install Argo Workflows"):
        launcher.submit(request())


def test_removing_waits_for_the_job_it_owns(argo: FakeArgo, launcher: WorkflowLauncher) -> None:
    workflow = launcher.submit(request())
    job = f"cifar10-{workflow.uid}"
    argo.jobs[job] = {"metadata": {"name": job, "namespace": "cifar", "uid": "job"}}
    argo.seconds_to_delete = 4
    launcher.remove(request(), timeout_seconds=20)
    assert argo.patches == [{"metadata": {"uid": "uid-1"}, "spec": {"shutdown": "Terminate"}}]
    assert not argo.workflows
    assert not argo.jobs


def test_removing_gives_up_in_time(argo: FakeArgo, launcher: WorkflowLauncher) -> None:
    launcher.submit(request())
    argo.seconds_to_delete = 1000
    before = argo.clock.now
    with pytest.raises(ResourceStuckError, match=r"could not be removed within 10 s"):
        launcher.remove(request(), timeout_seconds=10)
    assert argo.clock.now - before < 12


def test_removing_waits_for_a_create_call_without_an_answer(argo: FakeArgo, launcher: WorkflowLauncher) -> None:
    """The call times out, the step is cancelled while it waits to try again, and the object is stored after that."""
    late = copy.copy(argo)
    late.failing = lambda call: None

    def lose(call: str) -> None:
        if call == "create":
            argo.clock.after(0.5, cancel)
            argo.clock.after(6, lambda: WorkflowClient(late, late).create(request().manifest()))
            raise TimeoutError("no answer in 10 s")

    def cancel() -> None:
        raise KeyboardInterrupt

    argo.failing = lose
    with pytest.raises(KeyboardInterrupt):
        launcher.submit(request())
    launcher.remove(request(), timeout_seconds=25)
    argo.clock.sleep(60)
    assert late.num_submitted == 1
    assert not argo.workflows


def test_names_are_short_enough_for_pods_and_differ_by_run_and_step() -> None:
    names = {workflow_name("parity", run_id=run, step_key=step) for run in ("a", "b") for step in ("x", "y")}
    assert len(names) == 4
    assert len(workflow_name("p" * 99, run_id="r" * 99, step_key="s" * 99)) <= 40


def orphans(argo: FakeArgo, *, job: bool) -> None:
    """What is left of a workflow that was deleted with `--cascade=orphan`: a step's pod, the job and its pod."""
    labels = {"cifar/argo-workflow": NAME, "training.kubeflow.org/job-name": "cifar10-old"}
    if job:
        metadata = {"name": "cifar10-old", "namespace": "cifar", "uid": "old", "labels": labels}
        argo.jobs["cifar10-old"] = {"metadata": metadata}
    body = pod_body("cifar10-old")
    body["metadata"]["labels"] |= labels
    argo.pods["cifar10-old"] = [body]
    argo.step_pods.append({"metadata": {"name": "step", "uid": "step"}, "status": {"phase": "Running"}})


@pytest.mark.parametrize("job", [True, False])
def test_what_outlived_its_workflow_is_gone_before_the_next_is_submitted(
    argo: FakeArgo, launcher: WorkflowLauncher, job: bool
) -> None:
    orphans(argo, job=job)
    beside: list[object] = []
    argo.on_submitted = lambda argo, name: beside.extend([*argo.jobs, *argo.pods, *argo.step_pods])
    assert launcher.submit(request()).uid == "uid-1"
    assert beside == []


def test_removal_takes_what_outlived_its_workflow(argo: FakeArgo, launcher: WorkflowLauncher) -> None:
    orphans(argo, job=True)
    launcher.remove(request(), timeout_seconds=25)
    assert (argo.jobs, argo.pods, argo.step_pods) == ({}, {}, [])


def test_what_does_not_go_away_is_named(argo: FakeArgo, launcher: WorkflowLauncher) -> None:
    orphans(argo, job=False)
    argo.delete_namespaced_pod = lambda *_, **__: None
    with pytest.raises(ResourceStuckError, match=r"pod step.* did not go away"):
        launcher.submit(request())


def test_name_that_stays_taken_is_not_tried_for_ever(argo: FakeArgo, launcher: WorkflowLauncher) -> None:
    def conflict(call: str) -> None:
        if call == "create":
            raise api_error(409, "Operation cannot be fulfilled on resourcequotas")

    argo.failing = conflict
    with pytest.raises(ResourceStuckError, match="its name was taken each time"):
        launcher.submit(request())


def test_refused_termination_does_not_keep_the_workflow(argo: FakeArgo, launcher: WorkflowLauncher) -> None:
    launcher.submit(request())

    def refuse(call: str) -> None:
        if call == "patch":
            raise api_error(403, "workflows is forbidden")

    argo.failing = refuse
    with pytest.raises(ApiRefusedError, match="forbidden"):
        launcher.remove(request(), timeout_seconds=5)
    assert not argo.workflows
