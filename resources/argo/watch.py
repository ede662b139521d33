"""Waiting for a workflow to end. No Dagster; clock and sleeper are given."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from resources.argo.client import WorkflowClient
from resources.argo.report import TRAIN_TEMPLATES, WorkflowFailedError, explain, is_argos_own, job_name_of
from resources.argo.status import Workflow
from resources.kubernetes.diagnosis import WatchLimits
from resources.kubernetes.errors import ResourceStuckError
from resources.kubernetes.logs import LogLine
from resources.kubernetes.pods import Pod
from resources.kubernetes.watch import Watcher


@dataclass(frozen=True)
class WorkflowLimits(WatchLimits):
    """How often to look, and how long to wait for a workflow that does not move or an API that does not answer."""

    pending_timeout_seconds: float = 300.0
    """The controller has not looked at the workflow: it is away, or watches other namespaces."""
    total_timeout_seconds: float = 9 * 3600.0
    """Longer than the workflow's own deadline, which the controller keeps."""


class WorkflowWatcher(Watcher[Workflow, WorkflowLimits]):
    """Watches one workflow to its end. The workflow that it returns has succeeded or failed."""

    def __init__(
        self, client: WorkflowClient, workflow: Workflow, *, on_log_line: Callable[[LogLine], None], **options: Any
    ):
        def show(line: LogLine) -> None:
            if not is_argos_own(line.text):
                on_log_line(line)

        super().__init__(client, workflow, on_log_line=show, **options)
        self._workflows = client
        self._start = self._clock()
        self._reported: dict[str, str] = {}

    def failure(self, workflow: Workflow) -> WorkflowFailedError:
        """Why a finished workflow failed, with the last lines that were seen."""
        step = workflow.failed_step
        return WorkflowFailedError(explain(self._workflows, workflow, self._logs.tails), step.name if step else None)

    def _report(self, current: Workflow) -> str:
        for step in current.steps:
            if self._reported.get(step.node_id) != step.phase:
                self._reported[step.node_id] = step.phase
                self._log.info("%s, step %s: %s %s", current, step.name, step.phase, step.message)
        return current.phase

    def _pods_of(self, current: Workflow) -> Sequence[Pod]:
        """Pods of the steps and of the PyTorchJob; what Argo says while it waits for the job is of no use."""
        waiting = {step.name for step in current.steps if step.template in TRAIN_TEMPLATES}
        steps = [pod for pod in self._workflows.pods(current) if pod.replica not in waiting]
        return [*steps, *self._workflows.jobs.pods(current.namespace, job_name_of(current))]

    def _give_up_if_stuck(self, current: Workflow, pods: Sequence[Pod] | None) -> None:
        waited = self._clock() - self._start
        if current.phase == "Pending" and waited >= self._limits.pending_timeout_seconds:
            raise ResourceStuckError(
                f"{current} is still {current.phase} after {waited:.0f} s ({current.message or 'no message'}): "
                "check that Argo's workflow controller runs and watches this namespace."
            )
        if waited >= self._limits.total_timeout_seconds:
            raise ResourceStuckError(
                f"{current} is still {current.phase} after {waited:.0f} s: check Argo's workflow controller, which "
                "should have ended it at its deadline."
            )
