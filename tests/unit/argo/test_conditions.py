"""The resource step ends at the same status, and with the same outcome, as the Pipes client. On the real controller:
tests/cluster/test_argo.py."""

from pathlib import Path
from typing import Any

import pytest
import yaml

from resources.argo.template import FAILURE_CONDITION, RESOURCE_IS_RETRIED, SUCCESS_CONDITION
from resources.kubernetes.job import JobState
from resources.pytorch_job.client import read_status

SERIES: dict[str, list[dict[str, Any]]] = yaml.safe_load(
    (Path(__file__).parents[1] / "pytorch_job" / "status_series.yaml").read_text()
)
STATUSES = [(f"{name} {number}", step) for name, steps in SERIES.items() for number, step in enumerate(steps)]
EXPECTED = {JobState.SUCCEEDED: "succeeded", JobState.FAILED: "failed"}


def at_path(document: Any, path: str) -> str | None:
    """The value that gjson finds at a path of names and positions, as text; None if there is none."""
    for part in path.split("."):
        if isinstance(document, list) and part.isdecimal() and int(part) < len(document):
            document = document[int(part)]
        elif isinstance(document, dict) and part in document:
            document = document[part]
        else:
            return None
    return str(document)


def holds(requirement: str, job: dict[str, Any]) -> bool:
    """A requirement of a label selector. Supports only equality and existence."""
    path, equal, value = requirement.partition("==")
    found = at_path(job, path)
    return found == value if equal else found is not None


def outcome(job: dict[str, Any]) -> str:
    """Evaluates both conditions like matchConditions in workflow/executor/resource.go."""
    if any(holds(requirement, job) for requirement in FAILURE_CONDITION.split(",")):
        return "failed"
    return "succeeded" if all(holds(requirement, job) for requirement in SUCCESS_CONDITION.split(",")) else "waiting"


@pytest.mark.parametrize(("name", "step"), STATUSES, ids=[name for name, _ in STATUSES])
def test_argo_decides_like_the_pipes_client(name: str, step: dict[str, Any]) -> None:
    state = read_status(step["status"]).state
    job = {} if step["status"] is None else {"status": step["status"]}
    assert outcome(job) == EXPECTED.get(state, "waiting")


def test_every_condition_the_operator_keeps_is_within_reach() -> None:
    kinds = ("Created", "Suspended", "Running", "Restarting", "Succeeded", "Failed")
    for number in range(len(kinds)):
        conditions = [{"type": "Other", "status": "True"}] * number + [{"type": "Failed", "status": "True"}]
        assert outcome({"status": {"conditions": conditions}}) == "failed"


def test_final_status_is_not_requested_again() -> None:
    for final in ("failure condition", "has been deleted", "specified deadline"):
        assert final in RESOURCE_IS_RETRIED
