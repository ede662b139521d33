"""What a check found. Dagster's checks and the steps of the Argo and KFP pipelines ask the same functions for it."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from resources.errors import DataError, ObjectNotFoundError


@dataclass(frozen=True)
class Verdict:
    """The answer, one sentence that gives what was found and what was allowed, and the numbers in it."""

    passed: bool
    reason: str
    numbers: Mapping[str, Any] = field(default_factory=dict)

    def and_no(self, objections: list[str]) -> "Verdict":
        """The same verdict, failed where there are objections."""
        return Verdict(self.passed and not objections, "; ".join([self.reason, *objections]), self.numbers)


Judges = Mapping[str, Callable[[], Verdict]]
"""The function that gives the verdict of each check, by the check's name."""


def objections(judges: Judges) -> list[str]:
    """The reasons of the checks that fail; data that a check cannot read fails it."""
    reasons = []
    for name, judge in judges.items():
        try:
            verdict = judge()
        except (DataError, ObjectNotFoundError) as error:
            verdict = Verdict(False, str(error))
        if not verdict.passed:
            reasons.append(f"{name}: {verdict.reason}")
    return reasons
