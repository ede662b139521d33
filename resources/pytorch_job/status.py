"""Reading the conditions of a PyTorchJob's status. Pure."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from enum import StrEnum
from typing import Any


class JobState(StrEnum):
    """Where a job is on its way. The last two are final."""

    PENDING = "Pending"
    SUSPENDED = "Suspended"
    RUNNING = "Running"
    RESTARTING = "Restarting"
    SUCCEEDED = "Succeeded"
    FAILED = "Failed"

    @property
    def finished(self) -> bool:
        return self in (JobState.SUCCEEDED, JobState.FAILED)


@dataclass(frozen=True)
class JobStatus:
    """State with the operator's own words for it."""

    state: JobState
    reason: str = ""
    message: str = ""

    def __str__(self) -> str:
        return f"{self.state} ({self.message})" if self.message else str(self.state)


_FINAL = {"Failed": JobState.FAILED, "Succeeded": JobState.SUCCEEDED}
_PASSING = {
    "Suspended": JobState.SUSPENDED,
    "Running": JobState.RUNNING,
    "Restarting": JobState.RESTARTING,
    "Created": JobState.PENDING,
}


def read_status(status: Mapping[str, Any] | None) -> JobStatus:
    """State of a job from its `status`, which the operator fills only some time after the job exists.

    A final condition decides, wherever it stands in the list: the operator leaves an older Running one true beside it.
    Failed wins over Succeeded, as the operator writes it last when a job exceeds a limit while it ends. Otherwise the
    condition that changed last decides; conditions that are no longer true do not count.
    """
    conditions: Sequence[Mapping[str, Any]] = (status or {}).get("conditions") or []
    true_ones = [condition for condition in conditions if condition.get("status") == "True"]
    for kind, state in _FINAL.items():
        for condition in true_ones:
            if condition.get("type") == kind:
                return _job_status(state, condition)
    known = [condition for condition in true_ones if condition.get("type") in _PASSING]
    if not known:
        return JobStatus(JobState.PENDING)
    position, latest = max(enumerate(known), key=lambda item: (item[1].get("lastTransitionTime") or "", item[0]))
    return _job_status(_PASSING[known[position]["type"]], latest)


def _job_status(state: JobState, condition: Mapping[str, Any]) -> JobStatus:
    return JobStatus(state, condition.get("reason") or "", condition.get("message") or "")
