"""Reading an Argo workflow's status. Pure."""

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

FINISHED_PHASES = ("Succeeded", "Failed", "Error")
_ATTEMPT = re.compile(r"\(\d+\)$")


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


@dataclass(frozen=True)
class Workflow:
    """One stored workflow."""

    name: str
    namespace: str
    uid: str
    labels: Mapping[str, str]
    deleting: bool
    phase: str
    message: str
    steps: tuple[Step, ...]
    """In the order in which they started; the exit handler's last."""

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


def read_workflow(body: Mapping[str, Any]) -> Workflow:
    """Workflow from the API's object; its phase is Pending while the controller has not looked at it."""
    metadata, status = body["metadata"], body.get("status") or {}
    nodes = (status.get("nodes") or {}).values()
    steps = sorted((_step(node) for node in nodes if node.get("type") == "Pod"), key=lambda step: step.started_at)
    return Workflow(
        name=metadata["name"],
        namespace=metadata["namespace"],
        uid=metadata["uid"],
        labels=metadata.get("labels") or {},
        deleting="deletionTimestamp" in metadata,
        phase=status.get("phase") or "Pending",
        message=status.get("message") or "",
        steps=tuple(steps),
    )


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
