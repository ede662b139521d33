"""Exactly one PyTorchJob for a step, whatever was left by earlier attempts. No Dagster.

Labels find the step's earlier jobs, and pods whose job is gone. An annotation of the stored object tells whether a
create call without an answer was ours.
"""

import uuid
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from resources.kubernetes.errors import ResourceConflictError
from resources.kubernetes.launch import Launcher
from resources.kubernetes.naming import MANAGED_BY_LABEL, RUN_ID_LABEL, STEP_LABEL, selector, step_digest
from resources.pytorch_job.client import (
    LAUNCH_ANNOTATION,
    MANAGED_BY,
    WORK_ANNOTATION,
    JobState,
    PyTorchJob,
    PyTorchJobClient,
)


@dataclass(frozen=True)
class JobRequest:
    """A job that a step wants, and whose earlier jobs count as its own."""

    name: str
    namespace: str
    step_key: str
    run_id: str
    ancestor_run_ids: tuple[str, ...]
    """Runs that this one retries from failure, nearest first: their jobs may be adopted."""
    work: str
    """Digest of what the job computes."""
    launch_id: str = field(default_factory=lambda: uuid.uuid4().hex)

    @property
    def labels(self) -> dict[str, str]:
        return {
            MANAGED_BY_LABEL: MANAGED_BY,
            RUN_ID_LABEL: self.run_id,
            STEP_LABEL: step_digest(self.step_key),
        }

    @property
    def annotations(self) -> dict[str, str]:
        return {LAUNCH_ANNOTATION: self.launch_id, WORK_ANNOTATION: self.work}

    @property
    def step_selector(self) -> str:
        """Jobs and pods of this step in any run."""
        return selector(**{MANAGED_BY_LABEL: MANAGED_BY, STEP_LABEL: step_digest(self.step_key)})

    @property
    def run_ids(self) -> tuple[str, ...]:
        return (self.run_id, *self.ancestor_run_ids)

    def owns(self, job: PyTorchJob) -> bool:
        """Whether the job was made for this step by this run or one that it retries."""
        return (
            job.labels.get(MANAGED_BY_LABEL) == MANAGED_BY
            and job.labels.get(STEP_LABEL) == step_digest(self.step_key)
            and job.run_id in self.run_ids
        )

    def __str__(self) -> str:
        return f"PyTorchJob {self.namespace}/{self.name}"


class JobLauncher(Launcher[JobRequest, PyTorchJob]):
    """Adopts, replaces, creates and removes the jobs of one step."""

    leftover_advice = "The collector sensor tries again; the job's deadline ends it in any case."

    def __init__(self, client: PyTorchJobClient, **options: Any):
        super().__init__(request_timeout_seconds=client.request_timeout_seconds, **options)
        self._client = client
        self._cleared: set[str] = set()
        """Names of jobs whose pods have to go."""
        self._asked: set[str] = set()
        """Uids of pods that were asked to end."""

    def _own(self, request: JobRequest) -> Sequence[PyTorchJob]:
        return [job for job in self._client.find(request.namespace, request.step_selector) if request.owns(job)]

    def _why_not(self, request: JobRequest, found: PyTorchJob) -> str | None:
        if found.deleting:
            return "it is being deleted"
        if found.status.state == JobState.FAILED:
            return f"it failed: {found.status.message}"
        if found.work != request.work:
            return "it computes something else than this step asks for now"
        return None

    def _take_over(self, request: JobRequest, found: PyTorchJob) -> PyTorchJob | None:
        return self._client.set_labels(found, {RUN_ID_LABEL: request.run_id})

    def _create(self, manifest: Mapping[str, Any]) -> PyTorchJob | None:
        return self._client.create(manifest)

    def _after_conflict(self, request: JobRequest) -> PyTorchJob | None:
        existing = self._client.get(request.namespace, request.name)
        if existing is None or existing.launch_id == request.launch_id:
            return existing  # deleted in between, or our own create call's, whose answer was lost
        if not request.owns(existing):
            raise ResourceConflictError(
                f"{existing} exists and is not this step's: it carries run id {existing.run_id!r}. "
                "Delete it, or use another name_prefix."
            )
        return None

    def _delete(self, found: PyTorchJob) -> None:
        self._client.delete(found)

    def _clear(
        self, request: JobRequest, own: Sequence[PyTorchJob], unwanted: Sequence[PyTorchJob], grace_seconds: int
    ) -> list[str]:
        """Pods are asked first, and their job in the next moment, before its operator could make them again.

        The other way round, the garbage collector asks them with their own grace time, which a kubelet does not shorten
        later.
        """
        uids = {job.uid for job in unwanted}
        orphaned = self._orphaned_names(request, own)
        if orphaned - self._cleared:
            self._log.warning("Removing pods of PyTorchJobs that no longer exist: %s", ", ".join(sorted(orphaned)))
        self._cleared |= {job.name for job in unwanted} | orphaned
        left: list[str] = []
        for name in sorted(self._cleared):
            current = self._client.get(request.namespace, name)
            if current and current.uid not in uids:
                continue  # another's job, or one that is newer than the list
            for pod in self._client.pods(request.namespace, name):
                left.append(f"pod {pod.name}")
                if pod.uid not in self._asked:
                    self._asked.add(pod.uid)
                    self._client.delete_pod(request.namespace, pod, grace_seconds)
            if current:
                left.append(str(current))
                self._client.delete(current)
        return left

    def _orphaned_names(self, request: JobRequest, own: Sequence[PyTorchJob]) -> set[str]:
        """Names of jobs of the step that are gone while their pods live on, so that a new job would run beside them."""
        known = {job.name for job in own}
        owners = self._client.owners_of_pods(request.namespace, request.step_selector)
        return {name for name, run_id in owners if name not in known and run_id in request.run_ids}
