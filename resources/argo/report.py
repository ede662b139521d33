"""What became of a workflow, in words: for its exit handler and for Dagster alike."""

from collections.abc import Mapping, Sequence

from resources.argo.client import MAIN_CONTAINER, Step, Workflow, WorkflowClient
from resources.argo.template import JOB_NAME_PREFIX
from resources.kubernetes.diagnosis import PodHistory, WatchLimits
from resources.kubernetes.errors import KubernetesError
from resources.kubernetes.job import JobState, diagnose_failure
from resources.kubernetes.logs import TAIL_LINES
from resources.kubernetes.pods import Pod
from resources.pytorch_job.client import PyTorchJobClient
from resources.pytorch_job.config import CONTAINER_NAME

TRAIN_TEMPLATES = ("train", "train-replicas")


class WorkflowFailedError(KubernetesError):
    """The workflow ended without success, at a step or, where that is None, before any."""

    def __init__(self, report: str, step: Step | None):
        super().__init__(report)
        self.step = step
        self.transient = step is None  # Argo itself has retried what a retry can fix


def job_name_of(workflow: Workflow) -> str:
    """Name of the PyTorchJob that the workflow's training step applies."""
    return JOB_NAME_PREFIX + workflow.uid


def explain(client: WorkflowClient, workflow: Workflow, tails: Mapping[str, Sequence[str]] | None = None) -> str:
    """Which step failed, why, and its last lines; or that none did.

    `tails` are last log lines that the caller has seen, by step or replica: pods may be gone by now. What can no longer
    be read is left out.
    """
    failed = workflow.failed_step
    if failed is None:
        return _without_failed_step(workflow)
    lines = [f"W{str(workflow)[1:]} failed at step {failed.name}: {failed.message or failed.phase}"]
    try:
        if failed.template in TRAIN_TEMPLATES:
            lines += _about_job(client.jobs, workflow, tails or {})
        else:
            lines += _about_step(client, workflow, failed, tails or {})
    except KubernetesError as error:
        lines.append(f"More could not be read: {error}")
    return "\n".join(lines)


def _without_failed_step(workflow: Workflow) -> str:
    name = f"W{str(workflow)[1:]}"
    if workflow.phase in ("Failed", "Error"):
        return f"{name} ended before a step could fail: {workflow.message or workflow.phase}"
    handler = f"{workflow.name}.onExit"
    done = ", ".join(step.name for step in workflow.steps if step.phase == "Succeeded" and step.name != handler)
    return f"{name}: no step failed; done: {done or 'none yet'}."


def _about_step(
    client: WorkflowClient, workflow: Workflow, failed: Step, tails: Mapping[str, Sequence[str]]
) -> list[str]:
    pods = [pod for pod in client.pods(workflow) if pod.replica == failed.name]
    tail = [line for pod in pods for line in _tail(client, workflow.namespace, pod, MAIN_CONTAINER)]
    tail = tail or list(tails.get(failed.name, ()))
    events = [event for pod in pods for event in client.warnings(workflow.namespace, pod.name)]
    shown = [f"- event {event}" for event in events[-5:]]
    return shown + ([f"Last lines of {failed.name}:", *(f"    {line}" for line in tail[-TAIL_LINES:])] if tail else [])


def _about_job(jobs: PyTorchJobClient, workflow: Workflow, tails: Mapping[str, Sequence[str]]) -> list[str]:
    """The diagnosis that Dagster's own client would give of the same job."""
    name = job_name_of(workflow)
    job = jobs.get(workflow.namespace, name)
    if job is None:
        return [f"PyTorchJob {workflow.namespace}/{name} does not exist (any more)."]
    if job.status.state != JobState.FAILED:
        return [f"{job} is {job.status}."]
    pods = jobs.pods(workflow.namespace, name)
    history = PodHistory()
    history.observe(pods)
    known = {pod.replica: _tail(jobs, workflow.namespace, pod, CONTAINER_NAME) for pod in pods}
    seen = {replica: lines for replica, lines in {**tails, **known}.items() if lines}
    events = [event for pod in pods for event in jobs.warnings(workflow.namespace, pod.name)]
    return diagnose_failure(job, jobs.advice, history, seen, events, WatchLimits()).report().splitlines()


def is_argos_own(line: str) -> bool:
    """Whether a step's log line is of Argo's process, which starts ours and shares its log."""
    return (line.startswith("time=") and " argo=true" in line) or line.startswith("Error: exit status")


def _tail(client: WorkflowClient | PyTorchJobClient, namespace: str, pod: Pod, container: str) -> list[str]:
    try:
        text = client.log(namespace, pod.name, container, tail_lines=TAIL_LINES) or ""
    except KubernetesError:
        return []
    lines = [line.partition(" ")[2] for line in text.splitlines()]
    return [line for line in lines if not is_argos_own(line)]
