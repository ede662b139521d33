"""The four steps as an Argo workflow, from Dagster: one step of a run, one workflow."""

import json
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import dagster as dg
from pydantic import Field

from resources.argo.client import GROUP, MANAGED_BY, VERSION, Workflow, WorkflowClient, workflow_name
from resources.argo.interface import PipelineRequest, PipelineResource, PipelineResult, parse_result
from resources.argo.report import TRAIN_TEMPLATES, WorkflowFailedError, explain, is_argos_own, job_name_of
from resources.argo.template import WORKFLOW_LABEL
from resources.interrupts import sleep
from resources.kubernetes.diagnosis import WatchLimits
from resources.kubernetes.errors import ResourceConflictError, ResourceStuckError
from resources.kubernetes.launch import Launcher
from resources.kubernetes.logs import LogLine, show_line
from resources.kubernetes.naming import MANAGED_BY_LABEL, RUN_ID_LABEL, STEP_LABEL, step_digest
from resources.kubernetes.pods import Pod
from resources.kubernetes.steps import as_dagster_failure, interrupts_after, removing
from resources.kubernetes.watch import Watcher

MODEL_STEP = "verify-model"
_CANCEL_TIMEOUT_SECONDS = 25.0


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
        return {MANAGED_BY_LABEL: MANAGED_BY, RUN_ID_LABEL: self.run_id, STEP_LABEL: step_digest(self.step_key)}

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
        if existing and not request.labels.items() <= existing.labels.items():
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
            if not workflow.deleting:
                if not workflow.finished:
                    self._workflows.terminate(workflow)
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
        self._reported: set[tuple[str, str]] = set()

    def failure(self, workflow: Workflow) -> WorkflowFailedError:
        """Why a finished workflow failed, with the last lines that were seen."""
        return WorkflowFailedError(explain(self._workflows, workflow, self._logs.tails), workflow.failed_step)

    def _report(self, current: Workflow) -> str:
        for step in current.steps:
            if (step.node_id, step.phase) not in self._reported:
                self._reported.add((step.node_id, step.phase))
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


class ArgoPipeline(PipelineResource):
    """Submits the WorkflowTemplate of k8s/argo with the request's parameters, and follows it.

    A run worker that dies leaves the workflow; the step's next attempt in the same run finds it by its name. A failed
    workflow is dg.Failure, which forbids a retry: Argo itself has retried what a retry can cure.
    """

    namespace: str = Field(description="Namespace of the workflows; k8s/argo is applied there.")
    workflow_template: str = Field(default="cifar10-pipeline", description="WorkflowTemplate of the four steps.")
    name_prefix: str = Field(default="cifar10-parity", description="What the workflows' names begin with.")
    parameters: dict[str, str] = Field(
        default={}, description="Further parameters of the template, such as steps-image and trainer-image."
    )
    kubeconfig_file: str | None = Field(
        default=None, description="Kubeconfig; by default the pod's service account, else KUBECONFIG."
    )
    kube_context: str | None = Field(default=None, description="Context of the kubeconfig.")
    poll_interval_seconds: float = Field(default=2.0, gt=0, description="Time between two looks at the workflow.")
    pending_timeout_seconds: float = Field(
        default=300.0, gt=0, description="How long Argo's controller may take to begin."
    )
    total_timeout_seconds: float = Field(
        default=9 * 3600.0, gt=0, description="How long to wait in all; the workflow's own deadline is shorter."
    )

    def connect(self) -> WorkflowClient:
        """Client of the cluster's API. SettingsError when no cluster is configured."""
        return WorkflowClient.production(self.kubeconfig_file, self.kube_context)

    def run(self, context: dg.AssetExecutionContext, request: PipelineRequest) -> PipelineResult:
        with as_dagster_failure():
            return self._follow(context, request, self.connect())

    def _follow(
        self, context: dg.AssetExecutionContext, request: PipelineRequest, client: WorkflowClient
    ) -> PipelineResult:
        run_id, step_key = context.run.run_id, context.get_step_execution_context().step.key
        wanted = WorkflowRequest(
            name=workflow_name(self.name_prefix, run_id=run_id, step_key=step_key),
            namespace=self.namespace,
            template=self.workflow_template,
            run_id=run_id,
            step_key=step_key,
            parameters={**self.parameters, **request.parameters()},
        )
        limits = WorkflowLimits(
            poll_interval_seconds=self.poll_interval_seconds,
            pending_timeout_seconds=self.pending_timeout_seconds,
            total_timeout_seconds=self.total_timeout_seconds,
        )
        launcher = WorkflowLauncher(
            client, clock=time.monotonic, sleeper=sleep, logger=context.log, shield=interrupts_after
        )

        def remove() -> None:
            launcher.remove(wanted, timeout_seconds=_CANCEL_TIMEOUT_SECONDS)

        with removing(context, f"Workflow {wanted.namespace}/{wanted.name}", remove):
            workflow = launcher.submit(wanted)
            context.log.info(f"Following {workflow}.")
            watcher = WorkflowWatcher(
                client,
                workflow,
                limits=limits,
                on_log_line=show_line,
                clock=time.monotonic,
                sleeper=sleep,
                logger=context.log,
            )
            finished = watcher.wait_until_finished()
            if finished.phase != "Succeeded" and not _only_refused(finished):
                raise watcher.failure(finished)
        return parse_result(str(finished), finished.output("model") or "")


def _only_refused(workflow: Workflow) -> bool:
    """Whether all went well but for the verdict: the last step wrote its report, and failed for what it says."""
    step = workflow.failed_step
    try:
        report = json.loads(workflow.output("model") or "{}")
    except ValueError:
        return False
    return bool(step and step.name == MODEL_STEP and isinstance(report, dict) and report.get("passed") is False)
