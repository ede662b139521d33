"""The verdict of a check. Dagster's checks and the steps of the Argo and KFP pipelines use the same functions."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from resources.errors import DataError, ObjectNotFoundError


@dataclass(frozen=True)
class Verdict:
    """The outcome, one sentence with the found and allowed values, and these numbers."""

    passed: bool
    reason: str
    numbers: Mapping[str, Any] = field(default_factory=dict)

    def and_no(self, objections: list[str]) -> "Verdict":
        """The same verdict, or a failed one if there are objections."""
        return Verdict(self.passed and not objections, "; ".join([self.reason, *objections]), self.numbers)


Judges = Mapping[str, Callable[[], Verdict]]
"""The verdict function of each check, by the check's name."""


def objections(judges: Judges) -> list[str]:
    """The reasons of the failed checks; a check fails if it cannot read its data."""
    reasons = []
    for name, judge in judges.items():
        try:
            verdict = judge()
        except (DataError, ObjectNotFoundError) as error:
            verdict = Verdict(False, str(error))
        if not verdict.passed:
            reasons.append(f"{name}: {verdict.reason}")
    return reasons
