"""How long to put up with what does not come up."""

from dataclasses import dataclass

from resources.kubernetes.diagnosis import Cause


@dataclass(frozen=True)
class WatchLimits:
    """How often to look, and how long to put up with pods that do not start or an API that does not answer."""

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

    def of(self, cause: Cause) -> float:
        if cause == Cause.UNSCHEDULABLE:
            return self.unschedulable_timeout_seconds
        if cause in (Cause.IMAGE, Cause.CONFIGURATION, Cause.NOT_STARTED):
            return self.blocked_timeout_seconds
        return self.start_timeout_seconds
