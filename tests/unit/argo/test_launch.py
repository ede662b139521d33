"""A workflow is launched as any job is (tests/unit/pytorch_job/test_launch.py), and removed with its PyTorchJob."""

from dataclasses import replace

import pytest

from resources.argo.workflow import Workflow
from resources.kubernetes.errors import ApiRefusedError, ResourceStuckError
from resources.kubernetes.launch import JobLauncher
from tests.unit.argo.conftest import NAME, REQUEST, submit
from tests.unit.argo.fake_argo import FakeArgo
from tests.unit.pytorch_job.fake_cluster import api_error, pod_body

CHILD = replace(
    REQUEST,
    name="child",
    names=("child", NAME),
    run_id="run-2",
    ancestor_run_ids=("run-1",),
    launch_id="2nd",
)


def remove(launcher: JobLauncher[Workflow]) -> None:
    launcher.remove(REQUEST, grace_seconds=5, timeout_seconds=25)


def test_the_workflow_is_the_templates_with_the_parameters(argo: FakeArgo, launcher: JobLauncher[Workflow]) -> None:
    submit(launcher)
    assert argo.workflows[NAME]["spec"] == {
        "workflowTemplateRef": {"name": "pipeline"},
        "arguments": {"parameters": [{"name": "seed", "value": "3"}]},
    }


@pytest.mark.parametrize("phase", [None, "Running", "Succeeded"])
def test_repeated_submission_finds_the_first_workflow(
    argo: FakeArgo, launcher: JobLauncher[Workflow], phase: str | None
) -> None:
    first = submit(launcher)
    if phase:
        argo.ends(NAME, phase)
    assert submit(launcher, replace(REQUEST, launch_id="2nd")).uid == first.uid
    assert argo.num_submitted == 1


@pytest.mark.parametrize("phase", ["Failed", "Error"])
def test_failed_workflow_is_replaced(argo: FakeArgo, launcher: JobLauncher[Workflow], phase: str) -> None:
    submit(launcher)
    argo.ends(NAME, phase)
    argo.seconds_to_delete = 5
    assert submit(launcher, replace(REQUEST, launch_id="2nd")).uid == "uid-2"


def test_a_cluster_without_argo_is_named(argo: FakeArgo, launcher: JobLauncher[Workflow]) -> None:
    argo.failing = lambda call: (_ for _ in ()).throw(api_error(404, "the server could not find the resource"))
    with pytest.raises(ApiRefusedError, match="install Argo Workflows"):
        submit(launcher)


def test_removing_waits_for_the_job_it_owns(argo: FakeArgo, launcher: JobLauncher[Workflow]) -> None:
    workflow = submit(launcher)
    job = workflow.job_name
    argo.jobs[job] = {"metadata": {"name": job, "namespace": "cifar", "uid": "job"}}
    argo.seconds_to_delete = 4
    remove(launcher)
    assert argo.patches == [{"metadata": {"uid": "uid-1"}, "spec": {"shutdown": "Terminate"}}]
    assert not argo.workflows
    assert not argo.jobs


def test_names_are_short_enough_for_pods() -> None:
    assert len(Workflow.name_for("p" * 99, run_id="r" * 99, step_key="s" * 99, attempt=3)) <= 40


def orphans(argo: FakeArgo, *, job: bool) -> None:
    """The leftovers of a workflow that was deleted with `--cascade=orphan`: a step's pod, the job and its pod."""
    labels = {"cifar/argo-workflow": NAME, "training.kubeflow.org/job-name": "cifar10-old"}
    if job:
        metadata = {"name": "cifar10-old", "namespace": "cifar", "uid": "old", "labels": labels}
        argo.jobs["cifar10-old"] = {"metadata": metadata}
    body = pod_body("cifar10-old")
    body["metadata"]["labels"] |= labels
    argo.pods["cifar10-old"] = [body]
    argo.step_pods.append({"metadata": {"name": "step", "uid": "step"}, "status": {"phase": "Running"}})


@pytest.mark.parametrize("job", [True, False])
def test_leftovers_are_removed_before_the_next_submission(
    argo: FakeArgo, launcher: JobLauncher[Workflow], job: bool
) -> None:
    orphans(argo, job=job)
    beside: list[object] = []
    argo.on_submitted = lambda argo, name: beside.extend([*argo.jobs, *argo.pods, *argo.step_pods])
    assert submit(launcher).uid == "uid-1"
    assert beside == []


def test_a_retried_run_adopts_its_parents_workflow(argo: FakeArgo, launcher: JobLauncher[Workflow]) -> None:
    first = submit(launcher)
    assert submit(launcher, CHILD).uid == first.uid
    assert argo.workflows[NAME]["metadata"]["labels"]["dagster/run-id"] == "run-2"


def test_retried_run_removes_leftovers_of_its_parents_workflow(argo: FakeArgo, launcher: JobLauncher[Workflow]) -> None:
    orphans(argo, job=True)
    assert submit(launcher, CHILD).name == "child"
    assert (argo.jobs, argo.pods, argo.step_pods) == ({}, {}, [])


def test_removal_includes_leftovers_of_a_deleted_workflow(argo: FakeArgo, launcher: JobLauncher[Workflow]) -> None:
    orphans(argo, job=True)
    remove(launcher)
    assert (argo.jobs, argo.pods, argo.step_pods) == ({}, {}, [])


def test_objects_that_cannot_be_removed_are_named(argo: FakeArgo, launcher: JobLauncher[Workflow]) -> None:
    orphans(argo, job=False)
    argo.delete_namespaced_pod = lambda *_, **__: None
    with pytest.raises(ResourceStuckError, match=r"pod step.* still exist"):
        submit(launcher)


def test_refused_termination_does_not_keep_the_workflow(argo: FakeArgo, launcher: JobLauncher[Workflow]) -> None:
    submit(launcher)

    def refuse(call: str) -> None:
        if call == "patch":
            raise api_error(403, "workflows is forbidden")

    argo.failing = refuse
    with pytest.raises(ApiRefusedError, match="forbidden"):
        remove(launcher)
    assert not argo.workflows
