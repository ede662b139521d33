"""Bringing exactly one workflow into being for a step, and removing it again. No Dagster."""

import logging
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any

from resources.argo.client import GROUP, VERSION, WorkflowClient
from resources.argo.naming import MANAGED_BY
from resources.argo.status import Workflow
from resources.argo.template import WORKFLOW_LABEL
from resources.kubernetes.errors import ApiRefusedError, ApiUnavailableError, ResourceConflictError, ResourceStuckError
from resources.kubernetes.labels import MANAGED_BY_LABEL, RUN_ID_LABEL, STEP_LABEL, step_digest
from resources.kubernetes.outage import Outage

_PAUSE_SECONDS = 1.0
_REMOVAL_SECONDS = 120.0
_GRACE_SECONDS = 10


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


class WorkflowLauncher:
    """Submits a workflow once, and removes it. `shield` wraps the create call, so that an interrupt waits for it."""

    def __init__(
        self,
        client: WorkflowClient,
        *,
        clock: Callable[[], float],
        sleeper: Callable[[float], None],
        logger: logging.Logger,
        shield: Callable[[], AbstractContextManager[None]] = nullcontext,
        outage_seconds: float = 300.0,
    ):
        self._client = client
        self._clock = clock
        self._sleep = sleeper
        self._log = logger
        self._shield = shield
        self._outage_seconds = outage_seconds
        self._create_in_doubt = False
        """Whether a create call was sent that may still take effect though no answer came."""

    def submit(self, request: WorkflowRequest) -> Workflow:
        """The step's workflow: the one that is there, or a new one. One that failed is replaced.

        ResourceConflictError when the name belongs to someone else; ApiUnavailableError after `outage_seconds` without
        an answer; ResourceStuckError when what is left of an earlier one does not go away.
        """
        began = self._clock()
        outage = Outage(
            self._clock,
            self._outage_seconds,
            logger=self._log,
            meanwhile="the workflow is submitted when there is one",
        )
        while True:
            try:
                existing = self._existing(request)
                if existing and not existing.deleting and existing.phase not in ("Failed", "Error"):
                    return existing
                left = self._clear(request, existing)
                if not left and (created := self._create(request)):
                    return created
                outage.end()
                if self._clock() - began > self._outage_seconds + _REMOVAL_SECONDS:
                    raise ResourceStuckError(
                        f"Workflow {request.namespace}/{request.name} could not be submitted: "
                        f"{left or 'its name was taken each time, and then free again'}. See kubectl."
                    )
            except ApiUnavailableError as error:
                outage.endure(error)
            self._sleep(_PAUSE_SECONDS)

    def remove(self, request: WorkflowRequest, *, timeout_seconds: float) -> None:
        """Terminate and delete the step's workflow, and wait until it and its PyTorchJob are gone.

        ResourceStuckError if they stay. A create call without an answer may still take effect: after one it looks again
        for as long as a call may take.
        """
        start = self._clock()
        workflow: Workflow | None = None
        settle_seconds = self._client.request_timeout_seconds if self._create_in_doubt else 0.0
        while self._clock() - start <= timeout_seconds:
            try:
                workflow = self._client.get(request.namespace, request.name)
                if workflow and request.owns(workflow):
                    if not workflow.deleting:
                        self._client.terminate(workflow)
                        self._client.delete(workflow)
                elif not (workflow is None and self._clear(request, None)) and self._clock() - start >= settle_seconds:
                    return
            except ApiUnavailableError as error:
                self._log.warning("Still removing workflow %s: %s", request.name, error)
            except ApiRefusedError:
                if workflow and request.owns(workflow):
                    self._client.delete(workflow)  # it may be termination alone that is refused
                raise
            self._sleep(_PAUSE_SECONDS / 2)
        raise ResourceStuckError(
            f"Workflow {request.namespace}/{request.name} and what it owns could not be removed within "
            f"{timeout_seconds:.0f} s."
        )

    def _existing(self, request: WorkflowRequest) -> Workflow | None:
        existing = self._client.get(request.namespace, request.name)
        if existing and not request.owns(existing):
            raise ResourceConflictError(
                f"{existing} exists and is not this step's: its labels are {dict(existing.labels)}. "
                "Delete it, or use another name_prefix."
            )
        return existing

    def _create(self, request: WorkflowRequest) -> Workflow | None:
        self._create_in_doubt = True
        with self._shield():
            created = self._client.create(request.manifest())
            self._create_in_doubt = False
        return created

    def _clear(self, request: WorkflowRequest, existing: Workflow | None) -> str | None:
        """Remove what is left of an earlier workflow of the step, and say what is still there.

        A workflow may be gone while its pods and its PyTorchJob live on: a second one must not run beside them.
        """
        if existing:
            if not existing.deleting:
                self._log.info("Replacing %s: it ended as %s.", existing, existing.phase)
                self._client.delete(existing)
            return f"{existing} was deleted and is still there"
        label_selector = f"{WORKFLOW_LABEL}={request.name}"
        jobs = self._client.jobs.find(request.namespace, label_selector)
        for job in jobs:
            self._client.jobs.delete(job)
        pods = self._client.working_pods(request.namespace, request.name)
        for name, _ in self._client.jobs.owners_of_pods(request.namespace, label_selector):
            pods += self._client.jobs.pods(request.namespace, name)
        for pod in pods:
            if not pod.deleting:
                self._client.jobs.delete_pod(request.namespace, pod, _GRACE_SECONDS)
        left = [str(job) for job in jobs] + [f"pod {pod.name}" for pod in pods]
        return f"{', '.join(left)} of an earlier workflow of this name did not go away" if left else None
