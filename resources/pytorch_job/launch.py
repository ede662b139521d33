"""Bringing exactly one job into being for a step, whatever was left by earlier attempts. No Dagster.

Policy: a job of the same step that runs or succeeded, and computes the same thing, is adopted; any other is removed
first, and so are pods whose job is gone. A create call whose answer was lost is repeated: the name is deterministic,
and the stored object's annotation tells whether it is ours.
"""

import logging
import uuid
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from typing import Any

from resources.kubernetes.errors import ApiRefusedError, ApiUnavailableError, ResourceConflictError, ResourceStuckError
from resources.kubernetes.labels import MANAGED_BY_LABEL, RUN_ID_LABEL, STEP_LABEL, selector, step_digest
from resources.kubernetes.outage import Outage
from resources.pytorch_job.client import PyTorchJob, PyTorchJobClient
from resources.pytorch_job.labels import LAUNCH_ANNOTATION, MANAGED_BY, WORK_ANNOTATION
from resources.pytorch_job.status import JobState

_PAUSE_SECONDS = 1.0
_REPLACE_GRACE_SECONDS = 10


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


@dataclass(frozen=True)
class Started:
    """The one job of the step."""

    job: PyTorchJob
    adopted: bool


class JobLauncher:
    """Adopts, replaces, creates and removes the jobs of one step.

    `shield` wraps the create call, so that an interrupt waits for its answer.
    """

    def __init__(
        self,
        client: PyTorchJobClient,
        *,
        clock: Callable[[], float],
        sleeper: Callable[[float], None],
        logger: logging.Logger,
        shield: Callable[[], AbstractContextManager[None]] = nullcontext,
        outage_seconds: float = 300.0,
        removal_seconds: float = 180.0,
    ):
        self._client = client
        self._clock = clock
        self._sleep = sleeper
        self._log = logger
        self._shield = shield
        self._outage_seconds = outage_seconds
        self._removal_seconds = removal_seconds
        self._create_in_doubt = False
        """Whether a create call was sent that may still take effect though no answer came."""

    def start(self, request: JobRequest, manifest: Mapping[str, Any]) -> Started:
        """The step's job, running or finished, adopted or new. Never leaves two.

        ResourceConflictError when the name belongs to someone else; ApiUnavailableError after `outage_seconds` without
        an answer; ResourceStuckError when the name stays taken, or what is to be replaced does not go away.
        """
        deadline = self._clock() + self._outage_seconds + self._removal_seconds
        outage = Outage(
            self._clock, self._outage_seconds, logger=self._log, meanwhile="the job is started when there is one"
        )
        while True:
            try:
                started = self._try_to_start(request, manifest)
                if started:
                    return started
                outage.end()
            except ApiUnavailableError as error:
                outage.endure(error)
            if self._clock() > deadline:
                raise ResourceStuckError(
                    f"PyTorchJob {request.namespace}/{request.name} could be neither created nor adopted: its name was "
                    "taken each time, and then free again. See whether another process runs the same step."
                )
            self._sleep(_PAUSE_SECONDS)

    def remove(self, request: JobRequest, *, grace_seconds: int, timeout_seconds: float) -> None:
        """Delete every job of the step and wait until they and their pods are gone. ResourceStuckError if they stay.

        After a create call without an answer, which may still take effect, it looks again for as long as a call may
        take. A refusal to do something about the pods is raised only after the jobs were deleted.
        """
        start = self._clock()
        settle_seconds = self._client.request_timeout_seconds if self._create_in_doubt else 0.0
        names = {request.name}
        asked: set[str] = set()
        jobs: list[PyTorchJob] = []
        while self._clock() - start <= timeout_seconds:
            try:
                jobs = self._own_jobs(request)
                names.update(job.name for job in jobs)
                names.update(self._orphaned_names(request, jobs))
                if not self._clear(request.namespace, jobs, names, asked, grace_seconds) and (
                    self._clock() - start >= settle_seconds
                ):
                    return
            except ApiUnavailableError as error:
                self._log.warning("Still removing the job of step %s: %s", request.step_key, error)
            except ApiRefusedError:
                for job in jobs:
                    self._client.delete(job)
                raise
            self._sleep(_PAUSE_SECONDS / 2)
        raise ResourceStuckError(
            f"PyTorchJob {request.namespace}/{request.name} and its pods could not be removed within "
            f"{timeout_seconds:.0f} s. The collector sensor tries again; the job's deadline ends it in any case."
        )

    def _try_to_start(self, request: JobRequest, manifest: Mapping[str, Any]) -> Started | None:
        kept = self._settle(request)
        if kept:
            labelled = self._client.set_labels(kept, {RUN_ID_LABEL: request.run_id})
            return Started(labelled, adopted=True) if labelled else None
        created = self._create(request, manifest)
        return Started(created, adopted=False) if created else None

    def _settle(self, request: JobRequest) -> PyTorchJob | None:
        """Remove what may not stay of the step's earlier jobs, and return the one to adopt."""
        kept: PyTorchJob | None = None
        unwanted: list[PyTorchJob] = []
        jobs = self._own_jobs(request)
        for job in reversed(jobs):
            if kept is None and self._adoptable(request, job):
                kept = job
            else:
                unwanted.append(job)
        for job in unwanted:
            self._log.info("Replacing %s: %s.", job, self._why_not(request, job))
        orphaned = self._orphaned_names(request, jobs)
        if orphaned:
            self._log.warning("Removing pods of PyTorchJobs that no longer exist: %s", ", ".join(sorted(orphaned)))
        if unwanted or orphaned:
            self._wait_until_removed(request.namespace, unwanted, orphaned)
        return kept

    def _orphaned_names(self, request: JobRequest, jobs: Sequence[PyTorchJob]) -> set[str]:
        """Names of jobs of the step that are gone while their pods live on, so that a new job would run beside them."""
        known = {job.name for job in jobs}
        owners = self._client.owners_of_pods(request.namespace, request.step_selector)
        return {name for name, run_id in owners if name not in known and run_id in request.run_ids}

    def _own_jobs(self, request: JobRequest) -> list[PyTorchJob]:
        """Oldest first."""
        return [job for job in self._client.find(request.namespace, request.step_selector) if request.owns(job)]

    @staticmethod
    def _adoptable(request: JobRequest, job: PyTorchJob) -> bool:
        return not job.deleting and job.status.state != JobState.FAILED and job.work == request.work

    @staticmethod
    def _why_not(request: JobRequest, job: PyTorchJob) -> str:
        if job.deleting:
            return "it is being deleted"
        if job.status.state == JobState.FAILED:
            return f"it failed: {job.status.message}"
        if job.work != request.work:
            return "it computes something else than this step asks for now"
        return "a newer job of the step is kept"

    def _create(self, request: JobRequest, manifest: Mapping[str, Any]) -> PyTorchJob | None:
        """The created job; None when something else has to be settled first."""
        self._create_in_doubt = True
        with self._shield():
            created = self._client.create(manifest)
            self._create_in_doubt = False
        if created:
            return created
        existing = self._client.get(request.namespace, request.name)
        if existing is None:
            return None  # deleted in between
        if existing.launch_id == request.launch_id:
            return existing  # our own create call, whose answer was lost
        if not request.owns(existing):
            raise ResourceConflictError(
                f"{existing} exists and is not this step's: it carries run id {existing.run_id!r}. "
                "Delete it, or use another name_prefix."
            )
        return None

    def _wait_until_removed(self, namespace: str, jobs: Sequence[PyTorchJob], orphaned: set[str]) -> None:
        names = {job.name for job in jobs} | orphaned
        asked: set[str] = set()
        deadline = self._clock() + self._removal_seconds
        while self._clear(namespace, jobs, names, asked, _REPLACE_GRACE_SECONDS):
            if self._clock() > deadline:
                raise ResourceStuckError(
                    f"PyTorchJob {namespace}/{', '.join(sorted(names))} was deleted {self._removal_seconds:.0f} s ago "
                    "and still has pods. A second job beside them could spoil their work: look at the pods' finalizers."
                )
            self._sleep(_PAUSE_SECONDS)

    def _clear(
        self, namespace: str, jobs: Sequence[PyTorchJob], names: set[str], asked: set[str], grace_seconds: int
    ) -> bool:
        """Ask for deletion of jobs and pods; True while any of them is still there. `asked`: pods asked before.

        The pods are asked first, and their job in the next moment, before its operator could make them anew. The other
        way round, the garbage collector asks them with their own grace time, which a kubelet does not shorten later.
        """
        uids = {job.uid for job in jobs}
        left = False
        for name in sorted(names):
            current = self._client.get(namespace, name)
            if current and current.uid not in uids:
                continue  # another's job, or one that is newer than the list
            for pod in self._client.pods(namespace, name):
                left = True
                if pod.uid not in asked:
                    asked.add(pod.uid)
                    self._client.delete_pod(namespace, pod, grace_seconds)
            if current:
                left = True
                self._client.delete(current)
        return left
