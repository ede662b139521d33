"""Argo's Workflow custom resource: manifest and status. Pure."""

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

from resources.argo.template import GROUP, JOB_NAME_PREFIX, VERSION
from resources.kubernetes.job import Job, JobState, JobStatus
from resources.kubernetes.launch import JobRequest

MODEL_STEP = "verify-model"
_DEADLINE_SECONDS = 8 * 3600
"""Used until Argo's controller has stored the template's value."""
_ATTEMPT = re.compile(r"\(\d+\)$")
_STATES = {
    "Pending": JobState.PENDING,
    "Running": JobState.RUNNING,
    "Succeeded": JobState.SUCCEEDED,
    "Failed": JobState.FAILED,
    "Error": JobState.FAILED,
}


def build_workflow_manifest(request: JobRequest, template: str, parameters: Mapping[str, str]) -> dict[str, Any]:
    """The custom resource: the template's steps with these parameters."""
    metadata = {"name": request.name, "namespace": request.namespace}
    arguments = {"parameters": [{"name": name, "value": value} for name, value in parameters.items()]}
    return {
        "apiVersion": f"{GROUP}/{VERSION}",
        "kind": Workflow.kind,
        "metadata": {**metadata, "labels": request.labels, "annotations": request.annotations},
        "spec": {"workflowTemplateRef": {"name": template}, "arguments": arguments},
    }


@dataclass(frozen=True)
class Step:
    """One attempt at one step: a pod, if one was created."""

    name: str
    phase: str
    message: str
    started_at: str
    outputs: Mapping[str, str]

    @property
    def failed(self) -> bool:
        return self.phase in ("Failed", "Error")


class Workflow(Job):
    """A stored workflow."""

    kind, slug = "Workflow", "argo"
    longest_suffix = "-train-replicas-4294967295"
    """Argo truncates long pod names; a name that leaves room is easier to find."""

    @property
    def status(self) -> JobStatus:
        """A workflow whose last step only rejects the model, or only whose exit handler failed, counts as succeeded.

        One that Argo's controller holds back, because of parallelism, a mutex or a semaphore, is Pending with a
        message.
        """
        message = self._status.get("message") or ""
        state = _STATES.get(self.phase, JobState.PENDING)
        if (self.phase == "Failed" and self._only_refused) or (state == JobState.FAILED and self._steps_succeeded):
            state = JobState.SUCCEEDED
        if state == JobState.PENDING and message:
            state = JobState.SUSPENDED
        return JobStatus(state, message)

    @property
    def phase(self) -> str:
        """Argo's phase; Pending until the controller has processed the workflow."""
        return self._status.get("phase") or "Pending"

    @property
    def deadline_seconds(self) -> int:
        template = self._status.get("storedWorkflowTemplateSpec") or {}
        return template.get("activeDeadlineSeconds") or _DEADLINE_SECONDS

    @property
    def progress(self) -> Sequence[str]:
        waits = [f"Argo holds it back: {self.status.message}"] if self.status.state == JobState.SUSPENDED else []
        return waits + [f"step {step.name}: {step.phase} {step.message}".rstrip() for step in self.steps]

    @cached_property
    def steps(self) -> tuple[Step, ...]:
        """In the order in which they started, the exit handler last."""
        nodes = (self._status.get("nodes") or {}).values()
        steps = (_step(node) for node in nodes if node.get("type") == "Pod")
        return tuple(sorted(steps, key=lambda step: step.started_at))

    @property
    def hides_steps(self) -> bool:
        """Whether Argo has stored the steps compressed or in its own database, where they are not read."""
        return bool(self._status.get("compressedNodes") or self._status.get("offloadNodeStatusVersion"))

    @property
    def exit_handler(self) -> str:
        """Name of the step that Argo runs last."""
        return f"{self.name}.onExit"

    @property
    def failed_step(self) -> Step | None:
        """The step that was tried last, if it failed; None if no step failed permanently."""
        tried = [step for step in self.steps if step.name != self.exit_handler]
        return tried[-1] if tried and tried[-1].failed else None

    @property
    def job_name(self) -> str:
        """Name of the PyTorchJob that its training step applies."""
        return JOB_NAME_PREFIX + self.uid

    def output(self, name: str) -> str | None:
        """The newest output parameter with this name; None if no step wrote it."""
        values = [step.outputs[name] for step in self.steps if step.outputs.get(name)]
        return values[-1] if values else None

    @property
    def _status(self) -> Mapping[str, Any]:
        return self.body.get("status") or {}

    @property
    def _steps_succeeded(self) -> bool:
        root = (self._status.get("nodes") or {}).get(self.name) or {}  # the entry point's node has the workflow's name
        return root.get("phase") == "Succeeded"

    @property
    def _only_refused(self) -> bool:
        try:
            report = json.loads(self.output("model") or "{}")
        except ValueError:
            return False
        is_last = self.failed_step is not None and self.failed_step.name == MODEL_STEP
        return is_last and isinstance(report, dict) and report.get("passed") is False


def _step(node: Mapping[str, Any]) -> Step:
    parameters = (node.get("outputs") or {}).get("parameters") or []
    return Step(
        name=without_attempt(node.get("displayName") or node["name"]),
        phase=node.get("phase") or "Pending",
        message=node.get("message") or "",
        started_at=node.get("startedAt") or "",
        outputs={parameter["name"]: parameter.get("value") or "" for parameter in parameters},
    )


def without_attempt(node: str) -> str:
    """Name of the step that the node is an attempt of."""
    return _ATTEMPT.sub("", node)
