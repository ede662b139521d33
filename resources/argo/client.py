"""A client for Argo workflows, their pods and their PyTorchJobs, and the diagnosis of failed workflows. No Dagster."""

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

from resources.argo.template import GROUP, VERSION, WORKFLOW_LABEL
from resources.argo.workflow import Step, Workflow, without_attempt
from resources.kubernetes.api import REQUEST_TIMEOUT_SECONDS
from resources.kubernetes.diagnosis import Cause, Obstacle, PodHistory, WatchLimits, event_lines
from resources.kubernetes.errors import KubernetesError
from resources.kubernetes.job import JobClient, JobState
from resources.kubernetes.logs import TAIL_LINES
from resources.kubernetes.pods import Pod
from resources.pytorch_job.client import PyTorchJobClient
from resources.pytorch_job.config import CONTAINER_NAME

PLURAL = "workflows"
MAIN_CONTAINER = "main"
TRAIN_STEPS = ("train", "train-replicas")
_NODE_NAME_ANNOTATION = "workflows.argoproj.io/node-name"


class WorkflowFailedError(KubernetesError):
    """The workflow failed."""

    def __init__(self, report: str, *, transient: bool):
        super().__init__(report)
        self.transient = transient


class WorkflowClient(JobClient[Workflow]):
    """Reads and writes workflows through injected API objects. `jobs` is the client for their PyTorchJobs."""

    resource = Workflow
    group, version, plural = GROUP, VERSION, PLURAL
    pod_label = "workflows.argoproj.io/workflow"
    operator = "Argo Workflows"

    def __init__(self, custom: Any, core: Any, request_timeout_seconds: float = REQUEST_TIMEOUT_SECONDS):
        super().__init__(custom, core, request_timeout_seconds)
        self.jobs = PyTorchJobClient(custom, core, request_timeout_seconds)

    def replica_of(self, pod: Any) -> str:
        """The step's name, as in `cifar10-parity-x[0].verify-data(0)`."""
        node = (pod.metadata.annotations or {}).get(_NODE_NAME_ANNOTATION) or pod.metadata.name
        return without_attempt(node.rpartition(".")[2])

    def pods(self, namespace: str, name: str) -> list[Pod]:
        """Pods of the steps, with their main container only, and of the training.

        The pod in which Argo waits for the training is left out.
        """
        steps = [
            replace(
                pod,
                containers=tuple(
                    each for each in pod.containers if each.name == MAIN_CONTAINER and pod.replica not in TRAIN_STEPS
                ),
            )
            for pod in super().pods(namespace, name)
        ]
        return [*steps, *self.jobs.pods_with(namespace, f"{WORKFLOW_LABEL}={name}")]

    def remove(self, namespace: str, name: str, job: Workflow | None, grace_seconds: int) -> list[str]:
        """Stop the workflow so that Argo starts no more steps, delete it, and then delete what outlived it."""
        if job is not None:
            if not job.deleting and not job.finished:
                self.patch(job, {"spec": {"shutdown": "Terminate"}})
            self.delete(job)
            return [str(job)]
        trainings = self.jobs.find(namespace, f"{WORKFLOW_LABEL}={name}")
        for training in trainings:
            self.jobs.delete(training)
        return [*map(str, trainings), *self.remove_pods(namespace, self.pods(namespace, name), grace_seconds)]

    def obstacle(self, job: Workflow, pods: Sequence[Pod]) -> Obstacle | None:
        if job.status.state == JobState.PENDING:
            return Obstacle(Cause.NO_PODS, "workflow", "Argo's controller has not processed it yet")
        return None  # Argo ends a step whose pod does not start at the step's deadline

    def failure(
        self,
        job: Workflow,
        history: PodHistory,
        tails: Mapping[str, Sequence[str]],
        limits: WatchLimits,
        *,
        remove: bool,
    ) -> KubernetesError:
        """Not transient where a step failed or may have: Argo itself has already retried what a retry can fix."""
        return WorkflowFailedError(explain(self, job, tails), transient=job.failed_step is None and not job.hides_steps)


def explain(client: WorkflowClient, workflow: Workflow, tails: Mapping[str, Sequence[str]] | None = None) -> str:
    """The failed step, if any, with the reason and its last log lines.

    `tails` are the last log lines that the caller has seen, by step or replica: pods may have been deleted. What can no
    longer be read is left out.
    """
    failed = workflow.failed_step
    if failed is None:
        return _without_failed_step(workflow)
    lines = [f"{workflow} failed at step {failed.name}: {failed.message or failed.phase}"]
    about = _about_job if failed.name in TRAIN_STEPS else _about_step
    try:
        lines += about(client, workflow, failed, tails or {})
    except KubernetesError as error:
        lines.append(f"Further details could not be read: {error}")
    return "\n".join(lines)


def is_argos_own(line: str) -> bool:
    """Whether a line of a step's log comes from Argo's executor, which starts our process and shares its log."""
    return (line.startswith("time=") and " argo=true" in line) or line.startswith("Error: exit status")


def _without_failed_step(workflow: Workflow) -> str:
    if workflow.hides_steps:
        text = ": ".join(filter(None, (workflow.phase, workflow.status.message)))
        return f"{workflow}: {text}. Argo has compressed or offloaded its steps; to see them: argo get {workflow.name}"
    if workflow.status.state == JobState.FAILED:
        return f"{workflow} ended before any step failed: {workflow.status.message or workflow.phase}"
    steps = [step for step in workflow.steps if step.name != workflow.exit_handler]
    done = ", ".join(step.name for step in steps if step.phase == "Succeeded")
    return f"{workflow}: no step failed; done: {done or 'none yet'}."


def _about_step(
    client: WorkflowClient, workflow: Workflow, failed: Step, tails: Mapping[str, Sequence[str]]
) -> list[str]:
    pods = [pod for pod in client.pods(workflow.namespace, workflow.name) if pod.replica == failed.name]
    tail = [line for pod in pods for line in _tail(client, workflow.namespace, pod, MAIN_CONTAINER)]
    tail = tail or list(tails.get(failed.name, ()))
    events = [event for pod in pods for event in client.warnings(workflow.namespace, pod.name)]
    shown = [f"- {line}" for line in event_lines(events)]
    return shown + ([f"Last lines of {failed.name}:", *(f"    {line}" for line in tail[-TAIL_LINES:])] if tail else [])


def _about_job(
    client: WorkflowClient, workflow: Workflow, failed: Step, tails: Mapping[str, Sequence[str]]
) -> list[str]:
    """The same diagnosis that the PyTorchJob client would give of this job."""
    jobs, name = client.jobs, workflow.job_name
    job = jobs.get(workflow.namespace, name)
    if job is None:
        return [f"PyTorchJob {workflow.namespace}/{name} does not exist (any more)."]
    if job.status.state != JobState.FAILED:
        return [f"{job} is {job.status}."]
    pods, history = jobs.pods(workflow.namespace, name), PodHistory()
    history.observe(pods)
    known = {pod.replica: _tail(jobs, workflow.namespace, pod, CONTAINER_NAME) for pod in pods}
    seen = {replica: lines for replica, lines in {**tails, **known}.items() if lines}
    return jobs.diagnose(job, history, seen, WatchLimits()).report().splitlines()


def _tail(client: JobClient[Any], namespace: str, pod: Pod, container: str) -> list[str]:
    try:
        text = client.log(namespace, pod.name, container, tail_lines=TAIL_LINES) or ""
    except KubernetesError:
        return []
    lines = [line.partition(" ")[2] for line in text.splitlines()]
    return [line for line in lines if not is_argos_own(line)]
