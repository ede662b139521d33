"""The landing sensor's decision whether landed objects start a run, without Dagster."""

import time
from collections import Counter
from collections.abc import Callable, Collection
from dataclasses import dataclass
from typing import Literal

from pydantic import BaseModel, Field, ValidationError

from cifar_assets.contracts import LANDING_PREFIX
from cifar_assets.dataset.landing.zone import LandingScan, fingerprint
from resources.digests import sha256_json

MAX_ATTEMPTS = 3
"""Number of runs requested for one batch of objects if runs crash or miss some of it, including the first."""

_NAMES_SHOWN = 3
_BY_HAND = "To try again, start the job {job} manually or reset this sensor's cursor."

Outcome = Literal["succeeded", "crashed", "refused", "canceled", "unfinished"]
"""`refused` means that a blocking check failed: the same objects would fail it again."""

_STATES: dict[Outcome | None, str] = {
    None: "No new data: a build has already read {objects}.",
    "succeeded": "No new data: run {run} has already used {objects}.",
    "unfinished": "No new data: run {run} is processing {objects}.",
    "canceled": f"Run {{run}} for {{objects}} was canceled. {_BY_HAND}",
    "refused": "Run {run} for {objects} failed a blocking check and would fail it again. Land other data, or change "
    "the check's bounds and start the job {job} manually.",
}
"""The reason to skip when none of the objects is new, by outcome."""


class LandingCursor(BaseModel):
    """The sensor's state: the key of the last requested run and the fingerprints of its objects.

    Fingerprints (of key, etag and size) keep the cursor small with thousands of objects.
    """

    version: Literal[2] = 2  # the first format had no version, and the same fields
    covered: list[str] = []
    sequence: int = Field(default_factory=lambda: int(1000 * time.time()))
    """Counts the requests, starting from the time: Dagster never reuses the run key of an earlier cursor."""
    attempt: int = 0
    run_key: str | None = None

    @classmethod
    def load(cls, text: str | None) -> tuple["LandingCursor", str]:
        """The stored cursor, and a note if it could not be read and was reset."""
        try:
            return cls.model_validate_json(text) if text else cls(), ""
        except ValidationError:
            return cls(), f" The cursor could not be read and was reset; it was {str(text)[:100]!r}."


@dataclass(frozen=True)
class LastRun:
    """The newest run with the cursor's run key, including retries."""

    run_id: str
    outcome: Outcome


@dataclass(frozen=True)
class Decision:
    """Either a request (a run key and the cursor to save with it) or the reason to skip."""

    cursor: LandingCursor
    run_key: str | None
    reason: str


def decide(
    cursor: LandingCursor,
    scan: LandingScan,
    *,
    busy: str | None = None,
    last: LastRun | None = None,
    read: Collection[str] | None = None,
    name: Callable[[str], str] = str,
) -> Decision:
    """Whether to retrain now. Pure: the same cursor and listing give the same run key, so a repeated tick adds no run.

    `busy` describes a training in progress, `last` is the previously requested run, if it still exists, and `read`
    holds the fingerprints of the objects that the last build of the raw dataset read, or None. `name` gives the data
    set's names of jobs.
    """
    job = name("retrain")
    notes = "".join(f" Skipped {count}: {reason}." for reason, count in sorted(Counter(scan.skipped.values()).items()))

    def wait(reason: str) -> Decision:
        return Decision(cursor, None, reason + notes)

    ready = {fingerprint(info): info.key for info in scan.ready}
    if not ready:
        return wait(f"No data under {LANDING_PREFIX}.")
    if new := ready.keys() - set(cursor.covered):
        what, attempt = _objects(len(new), "new "), 1
    elif missed := _missed(ready.keys(), last, read):
        keys = sorted(ready[each] for each in missed)
        more = f" and {len(keys) - _NAMES_SHOWN} more" if len(keys) > _NAMES_SHOWN else ""
        why = "their run was deleted from Dagster"
        if last:
            why = f"run {last.run_id} {'failed' if last.outcome == 'crashed' else 'did not read them'}"
        what, attempt = f"{_objects(len(keys))} ({', '.join(keys[:_NAMES_SHOWN])}{more}), as {why}", cursor.attempt + 1
        if attempt > MAX_ATTEMPTS:
            return wait(f"Gave up after {cursor.attempt} runs: {what}. See the run's log. {_BY_HAND.format(job=job)}")
    else:
        objects = f"the {_objects(len(ready))} under {LANDING_PREFIX}"
        return wait(_STATES[last.outcome if last else None].format(objects=objects, run=last and last.run_id, job=job))
    if busy:
        return wait(f"Waiting for {busy} to end: {what}.")
    covered, sequence = sorted(ready), cursor.sequence + 1
    run_key = f"{name('landing')}-{sequence}-{sha256_json(covered)[:12]}"
    again = f" (attempt {attempt} of {MAX_ATTEMPTS})" if attempt > 1 else ""
    after = LandingCursor(covered=covered, sequence=sequence, attempt=attempt, run_key=run_key)
    return Decision(after, run_key, f"Retraining{again}: {what}.{notes}")


def _missed(ready: Collection[str], last: LastRun | None, read: Collection[str] | None) -> set[str]:
    """Objects for which a run was requested and that no run has used yet."""
    if last and last.outcome in ("canceled", "unfinished"):
        return set()
    if last and last.outcome == "crashed":
        return set(ready)
    if read is None:
        return set() if last else set(ready)
    return set(ready) - set(read)


def _objects(count: int, kind: str = "") -> str:
    return f"{count} {kind}object{'' if count == 1 else 's'}"
