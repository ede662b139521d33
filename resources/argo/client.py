"""Argo's Workflow custom resource: its names, its status, and a client of it and of its steps' pods. No Dagster."""

import re
from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

from resources.kubernetes.api import REQUEST_TIMEOUT_SECONDS, CustomResource, CustomResourceClient
from resources.kubernetes.naming import derive_name
from resources.kubernetes.pods import Pod, read_pod
from resources.pytorch_job.client import PyTorchJobClient

GROUP = "argoproj.io"
VERSION = "v1alpha1"
PLURAL = "workflows"
MAIN_CONTAINER = "main"
_WORKFLOW_LABEL = "workflows.argoproj.io/workflow"
_NODE_ID_ANNOTATION = "workflows.argoproj.io/node-id"
MANAGED_BY = "dagster-argo"
_LONGEST_SUFFIX = "-train-replicas-4294967295"
"""Argo shortens a pod's name when it has to; a name that leaves room is easier to find."""
FINISHED_PHASES = ("Succeeded", "Failed", "Error")
_ATTEMPT = re.compile(r"\(\d+\)$")


def workflow_name(prefix: str, *, run_id: str, step_key: str) -> str:
    """Name of the workflow of one step of one Dagster run, at whatever attempt."""
    return derive_name(prefix, run_id, step_key, reserve=len(_LONGEST_SUFFIX))


@dataclass(frozen=True)
class Step:
    """One attempt at one step: a pod, if it came so far."""

    node_id: str
    name: str
    template: str
    phase: str
    message: str
    started_at: str
    outputs: Mapping[str, str]

    @property
    def failed(self) -> bool:
        return self.phase in ("Failed", "Error")


class Workflow(CustomResource):
    """One stored workflow."""

    kind = "Workflow"

    @property
    def phase(self) -> str:
        """Pending while the controller has not looked at it."""
        return self._status.get("phase") or "Pending"

    @property
    def message(self) -> str:
        return self._status.get("message") or ""

    @cached_property
    def steps(self) -> tuple[Step, ...]:
        """In the order in which they started; the exit handler's last."""
        nodes = (self._status.get("nodes") or {}).values()
        steps = (_step(node) for node in nodes if node.get("type") == "Pod")
        return tuple(sorted(steps, key=lambda step: step.started_at))

    @property
    def _status(self) -> Mapping[str, Any]:
        return self.body.get("status") or {}

    @property
    def finished(self) -> bool:
        return self.phase in FINISHED_PHASES

    @property
    def failed_step(self) -> Step | None:
        """The step that was tried last, if it failed; None when no step failed for good."""
        tried = [step for step in self.steps if step.name != f"{self.name}.onExit"]
        return tried[-1] if tried and tried[-1].failed else None

    def output(self, name: str) -> str | None:
        """A step's output parameter of that name, the newest one; None where no step gave it."""
        values = [step.outputs[name] for step in self.steps if step.outputs.get(name)]
        return values[-1] if values else None

    def __str__(self) -> str:
        return f"workflow {self.namespace}/{self.name}"


def _step(node: Mapping[str, Any]) -> Step:
    parameters = (node.get("outputs") or {}).get("parameters") or []
    return Step(
        node_id=node["id"],
        name=_ATTEMPT.sub("", node.get("displayName") or node["name"]),
        template=(node.get("templateRef") or {}).get("template") or node.get("templateName") or "",
        phase=node.get("phase") or "Pending",
        message=node.get("message") or "",
        started_at=node.get("startedAt") or "",
        outputs={parameter["name"]: parameter.get("value") or "" for parameter in parameters},
    )


class WorkflowClient(CustomResourceClient[Workflow]):
    """Reads and writes workflows through injected API objects. `jobs` does the same for their PyTorchJobs."""

    resource = Workflow
    group, version, plural = GROUP, VERSION, PLURAL
    missing_kind_advice = "install Argo Workflows and its CRDs."
    forbidden_advice = "Give the service account the Role of docs/argo.md, or check the namespace's quota."
    invalid_advice = "Correct the workflow's parameters, or apply k8s/argo again."

    def __init__(self, custom: Any, core: Any, request_timeout_seconds: float = REQUEST_TIMEOUT_SECONDS):
        super().__init__(custom, core, request_timeout_seconds)
        self.jobs = PyTorchJobClient(custom, core, request_timeout_seconds)

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
