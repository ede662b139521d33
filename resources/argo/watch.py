"""Waiting for a workflow to end, showing its logs meanwhile. No Dagster; clock and sleeper are given."""

import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from resources.argo.client import WorkflowClient
from resources.argo.errors import WorkflowDeletedError, WorkflowFailedError, WorkflowTimeoutError
from resources.argo.report import TRAIN_TEMPLATES, explain, is_argos_own, job_name_of
from resources.argo.status import Workflow
from resources.kubernetes.errors import ApiUnavailableError
from resources.kubernetes.logs import LogLine, ReplicaLogs
from resources.kubernetes.outage import Outage
from resources.kubernetes.pods import Pod


@dataclass(frozen=True)
class WorkflowLimits:
    """How often to look, and how long to put up with a workflow that does not move or an API that does not answer."""

    poll_interval_seconds: float = 2.0
    pending_timeout_seconds: float = 300.0
    """The controller has not looked at the workflow: it is away, or watches other namespaces."""
    total_timeout_seconds: float = 9 * 3600.0
    """Longer than the workflow's own deadline, which the controller keeps."""
    outage_timeout_seconds: float = 600.0
    """No answer from the API server."""


class WorkflowWatcher:
    """Watches one workflow to its end."""

    def __init__(
        self,
        client: WorkflowClient,
        workflow: Workflow,
        *,
        limits: WorkflowLimits,
        on_log_line: Callable[[LogLine], None],
        clock: Callable[[], float],
        sleeper: Callable[[float], None],
        logger: logging.Logger,
    ):
        self._client = client
        self._workflow = workflow
        self._limits = limits
        self._on_log_line = on_log_line
        self._clock = clock
        self._sleep = sleeper
        self._log = logger
        self._logs = ReplicaLogs(client.jobs, workflow.namespace, clock)
        self._start = clock()
        self._outage = Outage(
            clock, limits.outage_timeout_seconds, logger=logger, meanwhile="the workflow goes on without being watched"
        )
        self._reported: dict[str, str] = {}

    def wait_until_finished(self) -> Workflow:
        """The workflow, succeeded or failed. WorkflowDeletedError, WorkflowTimeoutError, or ApiUnavailableError."""
        while True:
            try:
                finished = self._look()
                self._outage.end()
                if finished:
                    return finished
            except ApiUnavailableError as error:
                self._outage.endure(error)
            self._sleep(self._limits.poll_interval_seconds)

    def failure(self, workflow: Workflow) -> WorkflowFailedError:
        """Why a finished workflow failed, with the last lines that were seen."""
        step = workflow.failed_step
        return WorkflowFailedError(explain(self._client, workflow, self._logs.tails), step.name if step else None)

    def _look(self) -> Workflow | None:
        workflow = self._client.get(self._workflow.namespace, self._workflow.name)
        if workflow is None or workflow.uid != self._workflow.uid or workflow.deleting:
            raise WorkflowDeletedError(
                f"{self._workflow} was deleted by someone else while this step waited for it. "
                "Run the step again to start a new one."
            )
        self._report_changes(workflow)
        for line in self._logs.poll(self._pods(workflow)):
            if not is_argos_own(line.text):
                self._on_log_line(line)
        if workflow.finished:
            return workflow
        self._give_up_if_stuck(workflow)
        return None

    def _pods(self, workflow: Workflow) -> Sequence[Pod]:
        """Pods of the steps and of the PyTorchJob; what Argo says while it waits for the job is of no use."""
        waiting = {step.name for step in workflow.steps if step.template in TRAIN_TEMPLATES}
        steps = [pod for pod in self._client.pods(workflow) if pod.replica not in waiting]
        return [*steps, *self._client.jobs.pods(workflow.namespace, job_name_of(workflow))]

    def _report_changes(self, workflow: Workflow) -> None:
        for step in workflow.steps:
            if self._reported.get(step.node_id) != step.phase:
                self._reported[step.node_id] = step.phase
                self._log.info("%s, step %s: %s %s", workflow, step.name, step.phase, step.message)

    def _give_up_if_stuck(self, workflow: Workflow) -> None:
        waited = self._clock() - self._start
        if workflow.phase == "Pending" and waited >= self._limits.pending_timeout_seconds:
            raise WorkflowTimeoutError(
                f"{workflow} is still {workflow.phase} after {waited:.0f} s ({workflow.message or 'no message'}): "
                "check that Argo's workflow controller runs and watches this namespace."
            )
        if waited >= self._limits.total_timeout_seconds:
            raise WorkflowTimeoutError(
                f"{workflow} is still {workflow.phase} after {waited:.0f} s: check Argo's workflow controller, which "
                "should have ended it at its deadline."
            )
