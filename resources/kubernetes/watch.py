"""Waits for a job to end and shows its logs meanwhile. No Dagster; clock and sleeper are injected.

Only the job's status decides its outcome. If pods, logs or events cannot be read, only detail is lost. A failed read of
the job is repeated until the outage has lasted too long.
"""

import logging
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Generic

from resources.interrupts import sleep
from resources.kubernetes.diagnosis import Cause, Diagnosis, Outage, Patience, PodHistory, WatchLimits, event_lines
from resources.kubernetes.errors import ApiError, ResourceDeletedError, ResourceFailedError
from resources.kubernetes.job import J, JobClient, JobState
from resources.kubernetes.logs import LogLine, ReplicaLogs, show_line
from resources.kubernetes.pods import Pod
from resources.kubernetes.queue import QueueWait, WorkloadClient

_OPERATOR_LAG_SECONDS = 10.0
"""An operator that runs records the end of a job's pods within this time."""


@dataclass
class JobWatcher(Generic[J]):
    """Watches one job until it ends."""

    client: JobClient[J]
    job: J
    """As it was at the last poll."""
    limits: WatchLimits
    logger: logging.Logger
    on_log_line: Callable[[LogLine], None] = show_line
    on_tick: Callable[[], None] = lambda: None
    clock: Callable[[], float] = time.monotonic
    sleeper: Callable[[float], None] = sleep

    def __post_init__(self) -> None:
        self.queue_wait = QueueWait(self.clock, self.logger, self.client.of(WorkloadClient))
        self._history = PodHistory()
        self._logs = ReplicaLogs(self.client, self.job.namespace, self.clock, self.logger)
        meanwhile = "the work continues without being watched"
        self._outage = Outage(self.clock, self.limits.outage_timeout_seconds, self.logger, meanwhile)
        self._patience = Patience(self.limits, self.clock)
        self._announced: Cause | None = None
        """What the log last said that the job waits for."""
        self._active_since = self.clock()
        self._progress: Sequence[str] = ()
        self._pods: Sequence[Pod] = ()
        self._pods_are_read = True

    def wait_until_finished(self) -> J:
        """The succeeded job.

        Raises ResourceFailedError or the kind's error, ResourceDeletedError, or ApiError if an outage lasts too long.
        """
        while True:
            try:
                finished = self._look()
                self._outage.end()
            except ApiError as error:
                finished = False
                self._outage.endure(error)
            self.on_tick()
            if finished:
                break
            self.sleeper(self.limits.poll_interval_seconds)
        if self.job.status.state == JobState.FAILED:
            raise self.client.failure(self.job, self._history, self._logs.tails, self.limits, remove=False)
        return self.job

    def _look(self) -> bool:
        """Poll once; returns whether the job has finished."""
        current = self.client.get(self.job.namespace, self.job.name)
        if current is None or current.uid != self.job.uid or current.deleting:
            raise ResourceDeletedError(
                f"{self.job} was deleted by someone else while this step waited for it. Its last state was "
                f"{self.job.status.state}. Run the step again to start a new one."
            )
        self.job = current
        for text in current.progress:
            if text not in self._progress:
                self.logger.info("%s: %s", current, text)
        self._progress = current.progress
        self.queue_wait.observe(current, suspended=current.status.state == JobState.SUSPENDED)
        pods = self._list_pods()
        if current.finished:
            self._show(self._logs.drain(self._pods, self.sleeper))
            return True
        self._show(self._logs.poll(pods or ()))
        self._give_up_if_final()
        self._give_up_if_overdue()
        if pods is not None:
            self._give_up_if_stuck(pods)
        return False

    def _list_pods(self) -> Sequence[Pod] | None:
        try:
            self._pods = self.client.pods(self.job.namespace, self.job.name)
        except ApiError as error:
            if self._pods_are_read:
                self.logger.warning("The pods cannot be listed for now: %s", error)
            self._pods_are_read = False
            return None
        self._pods_are_read = True
        if self.job.status.state == JobState.SUSPENDED:
            self._history.forget(self._pods)  # they were stopped, which is not a failure of the job
        else:
            self._history.observe(self._pods)
        return self._pods

    def _show(self, lines: Iterable[LogLine]) -> None:
        for line in lines:
            self.on_log_line(line)

    def _give_up_if_final(self) -> None:
        """Abandon the job after an exit code for which a restart cannot help."""
        if any(end.exit_code in self.limits.final_exit_codes for end in self._history.failures()):
            raise self.client.failure(self.job, self._history, self._logs.tails, self.limits, remove=True)

    def _give_up_if_overdue(self) -> None:
        """Abandon a job that its deadline, enforced by the operator and the kubelet, should have ended."""
        now, state = self.clock(), self.job.status.state
        if state == JobState.SUSPENDED:
            self._active_since = now
        waited, deadline = now - self._active_since, self.job.deadline_seconds
        if deadline is not None and waited >= deadline + self.limits.start_timeout_seconds:
            summary = f"still {state} after {waited:.0f} s, though its deadline is {deadline} s"
            advice = "Check that the operator is running: neither it nor the kubelet ended the job."
            raise ResourceFailedError(
                Diagnosis(Cause.DEADLINE, summary, advice, transient=False, subject=str(self.job), remove=True)
            )

    def _give_up_if_stuck(self, pods: Sequence[Pod]) -> None:
        obstacle = self.client.obstacle(self.job, pods)
        waited = self._patience.spend(obstacle)
        if obstacle is None:
            self._announced = None
            return
        cause, allowed = obstacle.cause, self.limits.of(obstacle.cause)
        is_usual = cause in (Cause.SLOW_START, Cause.NO_PODS)
        is_usual |= cause == Cause.OPERATOR_AWAY and waited < _OPERATOR_LAG_SECONDS
        if cause != self._announced and not is_usual:
            self._announced = cause
            left = max(0.0, allowed - waited)
            self.logger.warning("%s is waiting: %s. It is abandoned after %.0f s.", self.job, obstacle, left)
        if waited >= allowed:
            phases = [f"{pod.replica}: {pod.phase}" for pod in pods]
            raise ResourceFailedError(
                Diagnosis(
                    cause,
                    f"{obstacle} (for {waited:.0f} s)",
                    self.client.advice(cause),
                    self.limits.is_worth_retrying(cause),
                    str(self.job),
                    details=(*phases, *event_lines(self.client.events(self.job, pods))),
                    remove=cause != Cause.OPERATOR_AWAY,
                )
            )
