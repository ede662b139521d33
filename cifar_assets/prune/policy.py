"""What stays, and what is to be removed."""

from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta
from typing import Any

import dagster as dg
from pydantic import Field

from resources.object_store import ObjectInfo, ObjectStore


class Policy(dg.Config):
    """How much of the past is kept, beside everything that a served, champion, registered or pinned model needs."""

    keep_versions: int = Field(
        default=5, ge=1, description="Newest raw versions, processed versions and models kept, of each."
    )
    min_age_hours: float = Field(
        default=24.0,
        ge=0,
        description="Nothing younger is removed. Below 12 only while no run is in progress: a run may be using what "
        "an earlier one left.",
    )
    log_days: float = Field(default=30.0, ge=0, description="Compute logs are kept for as long.")
    retire_registered: bool = Field(
        default=False,
        description="Also remove registered model versions in MLflow, with their runs and models, that are beyond the "
        "newest keep_versions, have no alias and are not served.",
    )

    @property
    def min_age(self) -> timedelta:
        return timedelta(hours=self.min_age_hours)

    def is_old(self, changed: datetime) -> bool:
        """Whether something last changed then may be removed."""
        return datetime.now(UTC) - changed >= self.min_age

    def is_old_log(self, changed: datetime) -> bool:
        """The same for a log."""
        return datetime.now(UTC) - changed >= timedelta(days=self.log_days)


@dataclass(frozen=True)
class Removal:
    """One thing to remove."""

    kind: str
    name: str
    reason: str
    size: int
    """Bytes."""
    remove: Callable[[], Any] = field(repr=False, compare=False)
    """Does it, unless the thing was written again since it was looked at."""


def removal_of(
    store: ObjectStore, infos: Iterable[ObjectInfo], kind: str, name: str, reason: str, last: str | None = None
) -> Removal:
    """The removal of objects, of which `last` is removed first: what makes the others count."""
    found = sorted(infos, key=lambda info: info.key != last)

    def remove() -> None:
        for info in found:
            if not remove_unchanged(store, info) and info.key == last:
                return

    return Removal(kind, name, reason, sum(info.size for info in found), remove)


def remove_unchanged(store: ObjectStore, info: ObjectInfo) -> bool:
    """Delete an object that nobody wrote or touched since it was listed; False where it stays."""
    now = store.stat(info.key)
    if now is None:
        return True
    # a listing tells fractions of a second, a look at one object may not
    if int(now.last_modified.timestamp()) != int(info.last_modified.timestamp()):
        return False
    return store.delete(info.key, info.etag)
