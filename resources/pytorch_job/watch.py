"""Waiting for a job to end, showing its logs meanwhile. No Dagster; clock and sleeper are given."""

import logging
from collections.abc import Callable, Sequence
from dataclasses import replace

from resources.kubernetes.diagnosis import Cause, Obstacle, PodHistory, find_obstacle
from resources.kubernetes.errors import ApiUnavailableError
from resources.kubernetes.limits import WatchLimits
from resources.kubernetes.logs import LogLine, ReplicaLogs
from resources.kubernetes.outage import Outage
from resources.kubernetes.pods import Pod
from resources.pytorch_job.client import PyTorchJob, PyTorchJobClient
from resources.pytorch_job.diagnosis import diagnose_failure, diagnose_obstacle
from resources.pytorch_job.errors import JobDeletedError, JobFailedError
from resources.pytorch_job.status import JobState


class JobWatcher:
    """Watches one job to its end."""

    def __init__(
        self,
        client: PyTorchJobClient,
        job: PyTorchJob,
        *,
        limits: WatchLimits,
        on_log_line: Callable[[LogLine], None],
        on_tick: Callable[[], None],
        clock: Callable[[], float],
        sleeper: Callable[[float], None],
        logger: logging.Logger,
    ):
        self._client = client
        self._job = job
        self._limits = limits
        self._on_log_line = on_log_line
        self._on_tick = on_tick
        self._clock = clock
        self._sleep = sleeper
        self._log = logger
        self._history = PodHistory()
        self._logs = ReplicaLogs(client, job.namespace, clock)
        self._outage = Outage(
            clock, limits.outage_timeout_seconds, logger=logger, meanwhile="the job goes on without being watched"
        )
        self._obstacle: Obstacle | None = None
        self._obstacle_since = 0.0
        self._state: JobState | None = None

    def wait_until_finished(self) -> PyTorchJob:
        """The succeeded job. JobFailedError, JobDeletedError, or ApiUnavailableError after too long an outage."""
        while True:
            try:
                finished = self._look()
                self._outage.end()
            except ApiUnavailableError as error:
                finished = None
                self._outage.endure(error)
            self._on_tick()
            if finished:
                return finished
            self._sleep(self._limits.poll_interval_seconds)

    def _look(self) -> PyTorchJob | None:
        """One look at the job and its pods; the job when it succeeded."""
        job = self._client.get(self._job.namespace, self._job.name)
        if job is None or job.uid != self._job.uid or job.deleting:
            raise JobDeletedError(
                f"{self._job} was deleted by someone else while this step waited for it. Its last state was "
                f"{self._state or 'unknown'}. Run the step again to start a new job."
            )
        self._report_change(job)
        pods = self._client.pods(job.namespace, job.name)
        self._history.observe(pods)
        for line in self._logs.poll(pods):
            self._on_log_line(line)
        if job.status.state == JobState.SUCCEEDED:
            return job
        if job.status.state == JobState.FAILED:
            raise JobFailedError(
                diagnose_failure(str(job), job.status, self._history, self._logs.tails, self._events(pods))
            )
        self._give_up_if_final(job, pods)
        self._give_up_if_stuck(job, pods)
        return None

    def _report_change(self, job: PyTorchJob) -> None:
        if job.status.state != self._state:
            self._state = job.status.state
            self._log.info("%s: %s", job, job.status)

    def _give_up_if_final(self, job: PyTorchJob, pods: Sequence[Pod]) -> None:
        if any(end.exit_code in self._limits.final_exit_codes for end in self._history.failures()):
            found = diagnose_failure(str(job), job.status, self._history, self._logs.tails, self._events(pods))
            raise JobFailedError(replace(found, job_finished=False))

    def _give_up_if_stuck(self, job: PyTorchJob, pods: Sequence[Pod]) -> None:
        obstacle = find_obstacle(pods) if pods else Obstacle(Cause.NO_PODS, "job", "the operator has made no pod")
        if job.status.state == JobState.SUSPENDED:
            obstacle = None
        now = self._clock()
        if obstacle is None or self._obstacle is None or obstacle.cause != self._obstacle.cause:
            self._obstacle_since = now
            if obstacle and obstacle.cause not in (Cause.SLOW_START, Cause.NO_PODS):
                allowed = self._limits.of(obstacle.cause)
                self._log.warning("%s waits: %s. It is given up after %.0f s.", job, obstacle, allowed)
        self._obstacle = obstacle
        waited = now - self._obstacle_since
        if obstacle and waited >= self._limits.of(obstacle.cause):
            raise JobFailedError(diagnose_obstacle(str(job), obstacle, waited, pods, self._events(pods)))

    def _events(self, pods: Sequence[Pod]) -> list[str]:
        """Warnings of the job and of its pods, best effort: they only add to a diagnosis."""
        try:
            names = [self._job.name, *(pod.name for pod in pods)]
            return [event for name in names for event in self._client.warnings(self._job.namespace, name)]
        except ApiUnavailableError:
            return []
