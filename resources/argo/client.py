"""A thin typed client of Argo's Workflow custom resource and of its steps' pods. No Dagster, no waiting, no policy."""

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from resources.argo.status import Workflow, read_workflow
from resources.kubernetes.api import REQUEST_TIMEOUT_SECONDS, CustomResourceClient
from resources.kubernetes.pods import Pod, read_pod
from resources.pytorch_job.client import PyTorchJobClient

GROUP = "argoproj.io"
VERSION = "v1alpha1"
PLURAL = "workflows"
MAIN_CONTAINER = "main"
_WORKFLOW_LABEL = "workflows.argoproj.io/workflow"
_NODE_ID_ANNOTATION = "workflows.argoproj.io/node-id"


class WorkflowClient(CustomResourceClient[Workflow]):
    """Reads and writes workflows through injected API objects. `jobs` does the same for their PyTorchJobs."""

    kind, group, version, plural = "Workflow", GROUP, VERSION, PLURAL
    missing_kind_advice = "install Argo Workflows and its CRDs."
    forbidden_advice = "Give the service account the Role of docs/argo.md, or check the namespace's quota."
    invalid_advice = "Correct the workflow's parameters, or apply k8s/argo again."

    def __init__(self, custom: Any, core: Any, request_timeout_seconds: float = REQUEST_TIMEOUT_SECONDS):
        super().__init__(custom, core, request_timeout_seconds)
        self.jobs = PyTorchJobClient(custom, core, request_timeout_seconds)

    def parse(self, body: Mapping[str, Any]) -> Workflow:
        return read_workflow(body)

    def terminate(self, workflow: Workflow) -> None:
        """Ask the controller to start nothing more of it, the exit handler included, and to end its pods."""
        self.patch(workflow, {"spec": {"shutdown": "Terminate"}})

    def working_pods(self, namespace: str, name: str) -> list[Pod]:
        """Pods of the steps of a workflow of that name that have not ended, whether or not it exists itself."""
        found = self._pods_with(f"workflow {namespace}/{name}", namespace, f"{_WORKFLOW_LABEL}={name}")
        return [pod for item in found if not (pod := read_pod(item, item.metadata.name)).finished]

    def pods(self, workflow: Workflow) -> list[Pod]:
        """Pods of the workflow's steps, named after their step, with the container that does the work alone."""
        found = self._pods_with(str(workflow), workflow.namespace, f"{_WORKFLOW_LABEL}={workflow.name}")
        names = {step.node_id: step.name for step in workflow.steps}
        return [_step_pod(item, names) for item in found]


def _step_pod(item: Any, names: Mapping[str, str]) -> Pod:
    node_id = (item.metadata.annotations or {}).get(_NODE_ID_ANNOTATION, "")
    pod = read_pod(item, names.get(node_id, item.metadata.name))
    return replace(pod, containers=tuple(each for each in pod.containers if each.name == MAIN_CONTAINER))
