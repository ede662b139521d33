"""The table of status series: what each means. The Argo workflow's conditions are held against the same table."""

from pathlib import Path
from typing import Any

import pytest
import yaml

from resources.kubernetes.job import JobState
from resources.pytorch_job.client import read_status

SERIES: dict[str, Any] = yaml.safe_load((Path(__file__).parent / "status_series.yaml").read_text())


@pytest.mark.parametrize("name", SERIES)
def test_state_of_every_status_in_the_series(name: str) -> None:
    states = [read_status(step["status"]).state for step in SERIES[name]]
    assert states == [JobState(step["state"]) for step in SERIES[name]]


@pytest.mark.parametrize("name", SERIES)
def test_a_final_state_is_never_left(name: str) -> None:
    finished = [read_status(step["status"]).state.finished for step in SERIES[name]]
    assert finished == sorted(finished)


def test_table_covers_every_state() -> None:
    assert {step["state"] for steps in SERIES.values() for step in steps} == {state.value for state in JobState}


def test_message_of_the_deciding_condition_is_kept() -> None:
    last = SERIES["deadline exceeded while running"][-1]["status"]
    assert "longer than specified deadline" in read_status(last).message
    assert "longer than specified deadline" in str(read_status(last))
