import logging

import pytest

from resources.argo.client import WorkflowClient
from resources.argo.workflow import Workflow, build_workflow_manifest
from resources.kubernetes.launch import JobLauncher, JobRequest
from tests.unit.argo.fake_argo import FakeArgo

NAME = Workflow.name_for("parity", run_id="run-1", step_key="step", attempt=0)
REQUEST = JobRequest(
    Workflow,
    NAME,
    namespace="cifar",
    step_key="step",
    run_id="run-1",
    ancestor_run_ids=(),
    work="digest",
    names=(NAME,),
)


def submit(launcher: JobLauncher[Workflow], request: JobRequest = REQUEST) -> Workflow:
    return launcher.start(request, build_workflow_manifest(request, "pipeline", {"seed": "3"})).found


@pytest.fixture
def argo() -> FakeArgo:
    return FakeArgo()


@pytest.fixture
def client(argo: FakeArgo) -> WorkflowClient:
    return WorkflowClient(argo, argo)


@pytest.fixture
def launcher(argo: FakeArgo, client: WorkflowClient) -> JobLauncher[Workflow]:
    return JobLauncher(client, clock=argo.clock, sleeper=argo.clock.sleep, logger=logging.getLogger("test"))
