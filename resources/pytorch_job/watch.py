"""Waiting for a PyTorchJob to end. No Dagster; clock and sleeper are given."""

from collections.abc import Sequence
from typing import Any

from resources.kubernetes.diagnosis import Cause, Diagnosis, Obstacle, Patience, WatchLimits, find_obstacle
from resources.kubernetes.errors import ResourceDeletedError, ResourceFailedError
from resources.kubernetes.pods import Pod
from resources.kubernetes.watch import Watcher
from resources.pytorch_job.client import JobState, PyTorchJob, PyTorchJobClient
from resources.pytorch_job.diagnosis import diagnose_failure, diagnose_obstacle, diagnose_overdue


class JobWatcher(Watcher[PyTorchJob, WatchLimits]):
    """Watches one job to its end."""

    def __init__(self, client: PyTorchJobClient, job: PyTorchJob, **options: Any):
        super().__init__(client, job.namespace, **options)
        self._client = client
        self._job = job
        self._patience = Patience(self._limits, self._clock)
        self._cause: Cause | None = None
        self._state: JobState | None = None
        self._active_since = self._clock()

    def wait_until_finished(self) -> PyTorchJob:
        """The succeeded job. ResourceFailedError, ResourceDeletedError, or ApiError after too long an outage."""
        job = super().wait_until_finished()
        if job.status.state == JobState.FAILED:
            raise ResourceFailedError(self._diagnosis(job))
        return job

    def _read(self) -> PyTorchJob:
        job = self._client.get(self._job.namespace, self._job.name)
        if job is None or job.uid != self._job.uid or job.deleting:
            raise ResourceDeletedError(
                f"{self._job} was deleted by someone else while this step waited for it. Its last state was "
                f"{self._state or 'unknown'}. Run the step again to start a new job."
            )
        if job.status.state != self._state:
            self._state = job.status.state
            self._log.info("%s: %s", job, job.status)
        return job

    def _pods_of(self, current: PyTorchJob) -> Sequence[Pod]:
        return self._client.pods(current.namespace, current.name)

    def _is_finished(self, current: PyTorchJob) -> bool:
        return current.status.state.finished

    def _give_up_if_stuck(self, current: PyTorchJob, pods: Sequence[Pod] | None) -> None:
        if any(end.exit_code in self._limits.final_exit_codes for end in self._history.failures()):
            raise ResourceFailedError(self._diagnosis(current, remove=True))
        self._give_up_if_overdue(current)
        if pods is None:
            return
        obstacle = None if current.status.state == JobState.SUSPENDED else _obstacle(pods)
        waited = self._patience.spend(obstacle)
        if obstacle is None:
            self._cause = None
            return
        allowed = self._limits.of(obstacle.cause)
        if obstacle.cause != self._cause and obstacle.cause not in (Cause.SLOW_START, Cause.NO_PODS):
            left = max(0.0, allowed - waited)
            self._log.warning("%s waits: %s. It is given up after %.0f s.", current, obstacle, left)
        self._cause = obstacle.cause
        if waited >= allowed:
            events = self._events()
            raise ResourceFailedError(diagnose_obstacle(str(current), obstacle, waited, pods, events, self._limits))

    def _give_up_if_overdue(self, job: PyTorchJob) -> None:
        """Give up what its own deadline should have ended, which the operator and the kubelet keep."""
        now = self._clock()
        if job.status.state == JobState.SUSPENDED:
            self._active_since = now
        waited = now - self._active_since
        deadline = job.deadline_seconds
        if deadline is not None and waited >= deadline + self._limits.start_timeout_seconds:
            raise ResourceFailedError(diagnose_overdue(str(job), job.status, waited, deadline))

    def _diagnosis(self, job: PyTorchJob, *, remove: bool = False) -> Diagnosis:
        tails, events = self._logs.tails, self._events()
        return diagnose_failure(str(job), job.status, self._history, tails, events, self._limits, remove=remove)

    def _events(self) -> list[str]:
        """Warnings of the job and of its pods."""
        names = [self._job.name, *(pod.name for pod in self._seen)]
        return [event for name in names for event in self._client.warnings(self._job.namespace, name)]


def _obstacle(pods: Sequence[Pod]) -> Obstacle | None:
    """What keeps the job from starting or from ending. `pods`: the one that decides about the job's end first."""
    if not pods:
        return Obstacle(Cause.NO_PODS, "job", "the operator has made no pod")
    ended = [pod for pod in pods if pod.phase == "Failed" or (pod is pods[0] and pod.finished)]
    if ended:
        text = f"it ended as {ended[0].phase}, and the training operator has not recorded it"
        return find_obstacle(pods) or Obstacle(Cause.OPERATOR_AWAY, ended[0].replica, text)
    return find_obstacle(pods)
