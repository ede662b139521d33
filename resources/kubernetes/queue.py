"""Why a job waits for quota in a queue of Kueue, and for how long. Written for Kueue 0.19 (v1beta2)."""

import logging
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from resources.kubernetes.api import CustomResource, CustomResourceClient
from resources.kubernetes.errors import KubernetesError
from resources.kubernetes.naming import selector

QUEUE_LABEL = "kueue.x-k8s.io/queue-name"
"""Label of a job with its LocalQueue. Kueue keeps such a job suspended until its quota allows it to start."""
JOB_UID_LABEL = "kueue.x-k8s.io/job-uid"


class Workload(CustomResource):
    """Kueue's record of a job in a queue."""

    kind = "Workload"

    @property
    def waits_for(self) -> str:
        """Why Kueue does not start the job, in its own words; empty if it gives no reason."""
        conditions = {each["type"]: each for each in (self.body.get("status") or {}).get("conditions") or ()}
        for kind in ("QuotaReserved", "Admitted"):
            condition = conditions.get(kind) or {}
            if condition.get("status") == "False":
                return f"{condition.get('reason') or kind}: {condition.get('message') or 'no message'}"
        return ""


class WorkloadClient(CustomResourceClient[Workload]):
    """Reads Workloads through injected API objects."""

    resource = Workload
    group, version, plural = "kueue.x-k8s.io", "v1beta2", "workloads"
    pod_label = QUEUE_LABEL
    operator = "Kueue"

    def why_waits(self, job: CustomResource) -> str:
        """Why the job's queue does not start it; empty if the job has no Workload yet."""
        try:
            found = self.find(job.namespace, selector(**{JOB_UID_LABEL: job.uid}))
        except KubernetesError as error:
            return f"its Workload cannot be read: {error}"
        return found[-1].waits_for if found else ""


@dataclass
class QueueWait:
    """Sums up how long a job was suspended, and logs each new reason."""

    clock: Callable[[], float]
    logger: logging.Logger
    workloads: WorkloadClient
    seconds: float = 0.0
    reason: str = ""
    """The last reason that the queue gave."""
    _seen_at: float | None = None
    _logged: str = ""

    def observe(self, job: CustomResource, *, suspended: bool) -> None:
        """Record one poll of the job."""
        now = self.clock()
        if self._seen_at is not None:
            self.seconds += now - self._seen_at
            if not suspended:
                self._logged = ""
                self.logger.info("%s is no longer suspended. It has waited for %.0f s in total.", job, self.seconds)
        self._seen_at = now if suspended else None
        queue = job.labels.get(QUEUE_LABEL)
        reason = self.workloads.why_waits(job) if suspended and queue else ""
        if reason and reason != self._logged:
            self.logger.info("%s waits in queue %s: %s", job, queue, reason)
            self.reason = self._logged = reason

    def metadata(self, prefix: str) -> dict[str, Any]:
        """Total wait and last reason; empty if the job was never suspended."""
        if not self.seconds:
            return {}
        return {f"{prefix}_queue_seconds": round(self.seconds, 1), f"{prefix}_queue_reason": self.reason or "suspended"}
