"""Bringing exactly one workflow into being for a step, and removing it again. No Dagster."""

import logging
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any

from resources.argo.client import GROUP, VERSION, WorkflowClient
from resources.argo.errors import WorkflowConflictError, WorkflowError
from resources.argo.naming import MANAGED_BY
from resources.argo.report import job_name_of
from resources.argo.status import Workflow
from resources.kubernetes.errors import ApiUnavailableError
from resources.kubernetes.labels import MANAGED_BY_LABEL, RUN_ID_LABEL, STEP_LABEL, step_digest
from resources.kubernetes.outage import Outage

_PAUSE_SECONDS = 1.0
_REMOVAL_SECONDS = 120.0


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

        WorkflowConflictError when the name belongs to someone else; ApiUnavailableError after `outage_seconds` without
        an answer; WorkflowError when a failed one cannot be removed.
        """
        removing_since: float | None = None
        outage = Outage(
            self._clock,
            self._outage_seconds,
            logger=self._log,
            meanwhile="the workflow is submitted when there is one",
        )
        while True:
            try:
                self._create_in_doubt = True
                with self._shield():
                    created = self._client.create(request.manifest())
                    self._create_in_doubt = False
                if created:
                    return created
                existing = self._existing(request)
                outage.end()
                if existing and not existing.deleting and existing.phase not in ("Failed", "Error"):
                    return existing
                removing_since = self._clock() if removing_since is None else removing_since
                self._replace(existing, removing_since)
            except ApiUnavailableError as error:
                outage.endure(error)
            self._sleep(_PAUSE_SECONDS)

    def remove(self, request: WorkflowRequest, *, timeout_seconds: float) -> bool:
        """Terminate and delete the step's workflow, and wait until it and its PyTorchJob are gone; False if they stay.

        A create call without an answer may still take effect: after one it looks again for as long as a call may take.
        """
        start = self._clock()
        settle_seconds = self._client.request_timeout_seconds if self._create_in_doubt else 0.0
        job: str | None = None
        while self._clock() - start <= timeout_seconds:
            try:
                workflow = self._client.get(request.namespace, request.name)
                if workflow and request.owns(workflow):
                    job = job_name_of(workflow)
                    if not workflow.deleting:
                        self._client.terminate(workflow)
                        self._client.delete(workflow)
                elif not self._has_job(request.namespace, job) and self._clock() - start >= settle_seconds:
                    return True
            except ApiUnavailableError as error:
                self._log.warning("Still removing workflow %s: %s", request.name, error)
            self._sleep(_PAUSE_SECONDS / 2)
        return False

    def _existing(self, request: WorkflowRequest) -> Workflow | None:
        existing = self._client.get(request.namespace, request.name)
        if existing and not request.owns(existing):
            raise WorkflowConflictError(
                f"{existing} exists and is not this step's: its labels are {dict(existing.labels)}. "
                "Delete it, or use another name_prefix."
            )
        return existing

    def _replace(self, workflow: Workflow | None, since: float) -> None:
        if workflow is None:
            return  # deleted in between
        if not workflow.deleting:
            self._log.info("Replacing %s: it ended as %s.", workflow, workflow.phase)
            self._client.delete(workflow)
        if self._clock() - since > _REMOVAL_SECONDS:
            raise WorkflowError(f"{workflow} was deleted {_REMOVAL_SECONDS:.0f} s ago and is still there: see kubectl.")

    def _has_job(self, namespace: str, name: str | None) -> bool:
        return name is not None and self._client.jobs.get(namespace, name) is not None
