"""Exactly one workflow for a step of a run, whatever was left by earlier attempts. No Dagster."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from resources.argo.client import GROUP, VERSION, WorkflowClient
from resources.argo.naming import MANAGED_BY
from resources.argo.status import Workflow
from resources.argo.template import WORKFLOW_LABEL
from resources.kubernetes.errors import ResourceConflictError
from resources.kubernetes.launch import Launcher
from resources.kubernetes.naming import MANAGED_BY_LABEL, RUN_ID_LABEL, STEP_LABEL, step_digest


@dataclass(frozen=True)
class WorkflowRequest:
    """A workflow that a step of a Dagster run wants. Its name is a function of the two."""

    name: str
    namespace: str
    template: str
    run_id: str
    step_key: str
    parameters: Mapping[str, str]

    @property
    def labels(self) -> dict[str, str]:
        return {
            MANAGED_BY_LABEL: MANAGED_BY,
            RUN_ID_LABEL: self.run_id,
            STEP_LABEL: step_digest(self.step_key),
        }

    def owns(self, workflow: Workflow) -> bool:
        return self.labels.items() <= workflow.labels.items()

    def manifest(self) -> dict[str, Any]:
        """The custom resource: the template's steps with this request's parameters."""
        parameters = [{"name": name, "value": value} for name, value in self.parameters.items()]
        return {
            "apiVersion": f"{GROUP}/{VERSION}",
            "kind": "Workflow",
            "metadata": {"name": self.name, "namespace": self.namespace, "labels": self.labels},
            "spec": {"workflowTemplateRef": {"name": self.template}, "arguments": {"parameters": parameters}},
        }

    def __str__(self) -> str:
        return f"Workflow {self.namespace}/{self.name}"


class WorkflowLauncher(Launcher[WorkflowRequest, Workflow]):
    """Submits a workflow once, and removes it."""

    def __init__(self, client: WorkflowClient, **options: Any):
        super().__init__(client, **options)
        self._workflows = client

    def submit(self, request: WorkflowRequest) -> Workflow:
        """The step's workflow: the one that is there, or a new one. One that failed is replaced."""
        return self.start(request, request.manifest()).found

    def _own(self, request: WorkflowRequest) -> Sequence[Workflow]:
        existing = self._workflows.get(request.namespace, request.name)
        if existing and not request.owns(existing):
            raise ResourceConflictError(
                f"{existing} exists and is not this step's: its labels are {dict(existing.labels)}. "
                "Delete it, or use another name_prefix."
            )
        return [existing] if existing else []

    def _why_not(self, request: WorkflowRequest, found: Workflow) -> str | None:
        if found.deleting:
            return "it is being deleted"
        return f"it ended as {found.phase}" if found.phase in ("Failed", "Error") else None

    def _clear(
        self, request: WorkflowRequest, own: Sequence[Workflow], unwanted: Sequence[Workflow], grace_seconds: int
    ) -> list[str]:
        for workflow in unwanted:
            if not workflow.deleting and not workflow.finished:
                self._workflows.terminate(workflow)
            if not workflow.deleting:
                self._workflows.delete(workflow)
        if own:
            return [str(workflow) for workflow in unwanted]
        jobs = self._workflows.jobs
        label_selector = f"{WORKFLOW_LABEL}={request.name}"
        found = jobs.find(request.namespace, label_selector)
        for job in found:
            jobs.delete(job)
        pods = self._workflows.working_pods(request.namespace, request.name)
        for name, _ in jobs.owners_of_pods(request.namespace, label_selector):
            pods += jobs.pods(request.namespace, name)
        for pod in pods:
            if not pod.deleting:
                jobs.delete_pod(request.namespace, pod, grace_seconds)
        return [*map(str, found), *(f"pod {pod.name}" for pod in pods)]
