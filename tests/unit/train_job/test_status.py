"""What a TrainJob's status means, as Trainer 2.3.0 writes it."""

from typing import Any

import pytest

from resources.kubernetes.job import JobState
from resources.train_job.client import TrainJob, read_status

SUSPENDED = {"type": "Suspended", "status": "True", "reason": "Suspended", "message": "TrainJob is suspended"}
RESUMED = {"type": "Suspended", "status": "False", "reason": "Resumed", "message": "TrainJob is resumed"}
COMPLETE = {"type": "Complete", "status": "True", "reason": "AllJobsCompleted", "message": "jobset completed"}
FAILED = {"type": "Failed", "status": "True", "reason": "FailedJobs", "message": "jobset failed due to one or more"}
DEADLINE = {"type": "Failed", "status": "True", "reason": "DeadlineExceeded", "message": TrainJob.deadline_words}


def jobs(**numbers: int) -> list[dict[str, Any]]:
    return [{"name": "node", "active": 0, "ready": 0, "succeeded": 0, "failed": 0, "suspended": 0, **numbers}]


@pytest.mark.parametrize(
    ("state", "status"),
    [
        ("Pending", None),
        ("Pending", {}),
        ("Pending", {"conditions": [], "jobsStatus": jobs()}),
        ("Pending", {"jobsStatus": jobs(active=1)}),
        ("Running", {"jobsStatus": jobs(active=1, ready=1)}),
        ("Running", {"jobsStatus": jobs(succeeded=1)}),
        ("Succeeded", {"conditions": [COMPLETE], "jobsStatus": jobs(succeeded=1)}),
        ("Failed", {"conditions": [FAILED], "jobsStatus": jobs(failed=1)}),
        ("Failed", {"conditions": [RESUMED, DEADLINE]}),
        ("Failed", {"conditions": [COMPLETE, FAILED]}),
        ("Suspended", {"conditions": [SUSPENDED], "jobsStatus": jobs(suspended=1)}),
        ("Suspended", {"conditions": [SUSPENDED], "jobsStatus": jobs(ready=1, active=1)}),
        ("Running", {"conditions": [RESUMED], "jobsStatus": jobs(ready=1, active=1)}),
    ],
)
def test_state(state: str, status: dict[str, Any] | None) -> None:
    assert read_status(status).state == JobState(state)


def test_suspension_counts_before_trainer_records_it_but_an_end_takes_precedence() -> None:
    assert read_status(None, suspended=True).state == JobState.SUSPENDED
    assert read_status({"jobsStatus": jobs(ready=1)}, suspended=True).state == JobState.SUSPENDED
    assert read_status({"conditions": [FAILED]}, suspended=True).state == JobState.FAILED


def test_failure_without_a_message_reports_its_reason() -> None:
    assert read_status({"conditions": [{**FAILED, "message": ""}]}).message == "FailedJobs"


def test_object_without_a_spec_is_pending() -> None:
    job = TrainJob({"metadata": {"name": "job", "namespace": "space"}})
    assert (job.status.state, job.deadline_seconds) == (JobState.PENDING, None)
