"""How long to wait for pods that do not start."""

from collections.abc import Callable
from dataclasses import dataclass

from resources.kubernetes.diagnosis import Cause, Obstacle

_TRANSIENT_CAUSES = (
    Cause.KILLED,
    Cause.EVICTED,
    Cause.UNSCHEDULABLE,
    Cause.NO_PODS,
    Cause.SLOW_START,
    Cause.OPERATOR_AWAY,
    Cause.UNKNOWN,
)
"""Those that may go away by themselves. A deadline is not one of them: it says how long the work may take."""


@dataclass(frozen=True)
class WatchLimits:
    """How often to look, and how long to wait for pods that do not start or an API that does not answer."""

    poll_interval_seconds: float = 2.0
    unschedulable_timeout_seconds: float = 600.0
    """No node fits. Long enough for an autoscaler to add one."""
    blocked_timeout_seconds: float = 120.0
    """The image cannot be pulled, or a Secret or ConfigMap is missing."""
    start_timeout_seconds: float = 1800.0
    """Nothing is wrong but a pod is not running: a large image is being pulled. Also for an operator that is away."""
    outage_timeout_seconds: float = 600.0
    """No answer from the API server."""
    final_exit_codes: tuple[int, ...] = ()
    """Exit codes after which a restart cannot help: the work is given up at the first one."""
    retried_exit_codes: tuple[int, ...] | None = None
    """The only exit codes after which another attempt may help; None: all that are not final."""
    calm_seconds: float = 600.0
    """How long all pods have to run before what kept them from starting earlier is forgotten."""

    def is_worth_retrying(self, cause: Cause, exit_code: int | None = None) -> bool:
        """Whether the same work, tried again, may end otherwise. Errors carry this answer, and Dagster's retries."""
        if cause == Cause.EXIT_CODE:
            is_known = self.retried_exit_codes is None or exit_code in self.retried_exit_codes
            return is_known and exit_code not in self.final_exit_codes
        return cause in _TRANSIENT_CAUSES

    def of(self, cause: Cause) -> float:
        if cause == Cause.UNSCHEDULABLE:
            return self.unschedulable_timeout_seconds
        if cause in (Cause.IMAGE, Cause.CONFIGURATION, Cause.NOT_STARTED):
            return self.blocked_timeout_seconds
        return self.start_timeout_seconds


class Patience:
    """Adds up how long each cause has kept pods from starting.

    A cause that goes away and comes back, or alternates with another, does not start from zero each time.
    """

    def __init__(self, limits: WatchLimits, clock: Callable[[], float]):
        self._limits = limits
        self._clock = clock
        self._spent: dict[Cause, float] = {}
        self._calm = 0.0
        self._cause: Cause | None = None
        self._seen_at = clock()

    def spend(self, obstacle: Obstacle | None) -> float:
        """Seconds for which the obstacle's cause has been seen so far; 0 when nothing is in the way."""
        now = self._clock()
        passed, self._seen_at = now - self._seen_at, now
        if self._cause:
            self._spent[self._cause] = self._spent.get(self._cause, 0.0) + passed
            self._calm = 0.0
        else:
            self._calm += passed
            if self._calm >= self._limits.calm_seconds:
                self._spent.clear()
        self._cause = obstacle.cause if obstacle else None
        return self._spent.get(self._cause, 0.0) if self._cause else 0.0
