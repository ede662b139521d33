"""What a check found. Dagster's checks and the steps of the Argo and KFP pipelines ask the same functions for it."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

from resources.errors import DataError, ObjectNotFoundError


@dataclass(frozen=True)
class Finding:
    """The answer of one check, one sentence that gives what was found and what was allowed, and the numbers in it."""

    passed: bool
    reason: str
    numbers: Mapping[str, float | str] = field(default_factory=dict)


Judges = Mapping[str, Callable[[], Finding]]
"""What to ask for each check, by its name."""


def objections(judges: Judges) -> list[str]:
    """The reasons of the checks that fail; data that a check cannot read fails it."""
    reasons = []
    for name, judge in judges.items():
        try:
            finding = judge()
        except (DataError, ObjectNotFoundError) as error:
            finding = Finding(False, str(error))
        if not finding.passed:
            reasons.append(f"{name}: {finding.reason}")
    return reasons
