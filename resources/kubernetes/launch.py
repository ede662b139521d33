"""Creates exactly one job for a step, and removes it again. No Dagster.

Policy: a job of the same step that is active or succeeded, and does the same work, is adopted. Any other is removed
first, and so are pods that outlived their job. A create call whose response was lost is repeated: names are
deterministic.
"""

import logging
import time
import uuid
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from typing import Any, Generic

from resources.interrupts import sleep
from resources.kubernetes.diagnosis import Outage
from resources.kubernetes.errors import (
    ApiRefusedError,
    ApiUnavailableError,
    ResourceConflictError,
    ResourceStuckError,
)
from resources.kubernetes.job import J, Job, JobClient, JobState
from resources.kubernetes.naming import MANAGED_BY_LABEL, RUN_ID_LABEL, STEP_LABEL, selector, step_digest

_PAUSE_SECONDS = 1.0
_REPLACE_GRACE_SECONDS = 10
_REPLACE_TIMEOUT_SECONDS = 180.0


@dataclass(frozen=True)
class JobRequest:
    """A job that a step requests, and the runs whose earlier jobs it may adopt."""

    kind: type[Job]
    name: str
    namespace: str
    step_key: str
    run_id: str
    ancestor_run_ids: tuple[str, ...]
    """Runs that this one retries from failure, nearest first: their jobs may be adopted."""
    work: str
    """Digest of the work that the job does."""
    names: tuple[str, ...] = ()
    """Possible names of this step's jobs by these runs, newest first, if known: the jobs are then not listed."""
    launch_id: str = field(default_factory=lambda: uuid.uuid4().hex)

    @property
    def step_labels(self) -> dict[str, str]:
        """Label selector for jobs and pods of this step in any run."""
        return {MANAGED_BY_LABEL: self.kind.managed_by(), STEP_LABEL: step_digest(self.step_key)}

    @property
    def labels(self) -> dict[str, str]:
        return {**self.step_labels, RUN_ID_LABEL: self.run_id}

    @property
    def annotations(self) -> dict[str, str]:
        return {self.kind.launch_annotation(): self.launch_id, self.kind.work_annotation(): self.work}

    @property
    def run_ids(self) -> tuple[str, ...]:
        return (self.run_id, *self.ancestor_run_ids)

    def owns(self, job: Job) -> bool:
        """Whether the job was made for this step by this run or by one that it retries."""
        return self.step_labels.items() <= job.labels.items() and job.run_id in self.run_ids

    def why_not(self, job: Job) -> str | None:
        """Why the step's job must not be adopted; None if it may."""
        if job.deleting:
            return "it is being deleted"
        if job.status.state == JobState.FAILED:
            return f"it failed: {job.status.message}"
        return None if job.work == self.work else "it does other work than this step requests now"

    def __str__(self) -> str:
        return f"{self.kind.kind} {self.namespace}/{self.name}"


@dataclass(frozen=True)
class Started(Generic[J]):
    """The one job of the step."""

    found: J
    adopted: bool


@dataclass
class JobLauncher(Generic[J]):
    """Adopts, replaces, creates and removes the jobs of one step, found by their labels or names."""

    client: JobClient[J]
    logger: logging.Logger
    clock: Callable[[], float] = time.monotonic
    sleeper: Callable[[float], None] = sleep
    shield: Callable[[], AbstractContextManager[None]] = nullcontext
    """Wraps the create call, so that an interrupt waits for its answer."""
    outage_seconds: float = 300.0
    _create_in_doubt: bool = False
    """Whether a create call without a response may still take effect."""
    _to_remove: set[str] = field(default_factory=set)
    """Names of jobs that have to be deleted with their pods."""

    def start(self, request: JobRequest, manifest: Mapping[str, Any]) -> Started[J]:
        """The step's job, active or finished, adopted or new. Never leaves two.

        Raises ResourceConflictError if the name belongs to someone else; ApiUnavailableError after `outage_seconds`
        without a response; ResourceStuckError if the name stays taken, or the job to replace is not deleted in time.
        """
        # Two deadlines: for an API server that does not respond and, from its first response on, for obstacles.
        outage = Outage(self.clock, self.outage_seconds, logger=self.logger, meanwhile=f"{request} waits to be started")
        answered_at: float | None = None
        left: Sequence[str] = ()
        while True:
            try:
                kept, left = self._settle(request)
                started = None if left else self._adopt_or_create(request, kept, manifest)
                if started:
                    return started
                outage.end()
                answered_at = self.clock() if answered_at is None else answered_at
            except ApiUnavailableError as error:
                outage.endure(error)
            if answered_at is not None and self.clock() - answered_at > _REPLACE_TIMEOUT_SECONDS:
                raise ResourceStuckError(
                    f"{request} could not be started for {_REPLACE_TIMEOUT_SECONDS:.0f} s: {_why(left)}"
                )
            self.sleeper(_PAUSE_SECONDS)

    def remove(self, request: JobRequest, *, timeout_seconds: float, grace_seconds: int) -> None:
        """Delete the step's jobs and wait until they and their pods are gone. ResourceStuckError if they stay.

        A create call without a response may still take effect, so after one it polls for as long as a call may take. If
        only the jobs may be deleted, the refusal for the pods is raised after their deletion.
        """
        began = self.clock()
        settle_seconds = self.client.request_timeout_seconds if self._create_in_doubt else 0.0
        own: Sequence[J] = ()
        while self.clock() - began <= timeout_seconds:
            try:
                own = self._own(request)
                if not self._remove_all(request, own, own, grace_seconds) and self.clock() - began >= settle_seconds:
                    return
            except ApiUnavailableError as error:
                self.logger.warning("Still removing %s: %s", request, error)
            except ApiRefusedError:
                for job in own:
                    self.client.delete(job)
                raise
            self.sleeper(_PAUSE_SECONDS / 2)
        raise ResourceStuckError(
            f"{request} and its pods could not be removed within {timeout_seconds:.0f} s: delete it manually unless "
            "it ends at its deadline or a collector sensor watches its kind."
        )

    def _own(self, request: JobRequest) -> Sequence[J]:
        if request.names:
            named = [self.client.get(request.namespace, name) for name in reversed(request.names)]
            return [job for job in named if job and request.owns(job)]
        found = self.client.find(request.namespace, selector(**request.step_labels))
        return [job for job in found if request.owns(job)]

    def _settle(self, request: JobRequest) -> tuple[J | None, list[str]]:
        """The job to adopt, and the others that still exist."""
        own = self._own(request)
        kept = next((job for job in reversed(own) if request.why_not(job) is None), None)
        replaced = [job for job in own if job is not kept]
        for job in replaced:
            if job.name not in self._to_remove:
                reason = request.why_not(job) or "a newer job of the step is kept"
                self.logger.info("Replacing %s: %s.", job, reason)
        return kept, self._remove_all(request, own, replaced, _REPLACE_GRACE_SECONDS)

    def _find_orphans(self, request: JobRequest, own: Sequence[J]) -> set[str]:
        """Names of the step's deleted jobs that left pods behind."""
        owners = self.client.owners_of_pods(request.namespace, selector(**request.step_labels))
        known = {job.name for job in own}
        return {name for name, run_id in owners if name not in known and run_id in request.run_ids}

    def _remove_all(self, request: JobRequest, own: Sequence[J], jobs: Sequence[J], grace_seconds: int) -> list[str]:
        """Remove these of the step's own jobs with their pods, and orphaned pods. Returns which of them still exist."""
        self._to_remove |= {job.name for job in jobs} | self._find_orphans(request, own)
        uids = {job.uid for job in jobs}
        left: list[str] = []
        for name in sorted({*self._to_remove, *request.names, request.name}):
            current = self.client.get(request.namespace, name)
            if current is None or current.uid in uids:  # not another owner's job, nor one that is newer than the list
                left += self.client.remove(request.namespace, name, current, grace_seconds)
        return left

    def _adopt_or_create(self, request: JobRequest, kept: J | None, manifest: Mapping[str, Any]) -> Started[J] | None:
        if kept is not None:
            kept = self.client.patch(kept, {"metadata": {"labels": {RUN_ID_LABEL: request.run_id}}})
            return None if kept is None else Started(kept, adopted=True)
        self._create_in_doubt = True
        with self.shield():
            created = self.client.create(manifest)
            self._create_in_doubt = False
        created = created or self._after_conflict(request)
        return None if created is None else Started(created, adopted=False)

    def _after_conflict(self, request: JobRequest) -> J | None:
        """The existing job with the name, if our own create call made it and its response was lost."""
        existing = self.client.get(request.namespace, request.name)
        if existing is None or existing.launch_id == request.launch_id:
            return existing
        if not request.owns(existing):
            raise ResourceConflictError(
                f"{existing} exists and is not this step's: it carries run id {existing.run_id!r}. "
                "Delete it, or use another name_prefix."
            )
        return None


def _why(left: Sequence[str]) -> str:
    if not left:
        return "its name was taken each time, and then free again. Check whether another process runs the same step."
    return f"{', '.join(left)} still exist. A second job beside them could corrupt their work: check their finalizers."
