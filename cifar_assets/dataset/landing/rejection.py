"""Moves refused data aside with an actionable reason. Data is never deleted permanently."""

import json
from collections import defaultdict
from collections.abc import Iterable
from dataclasses import dataclass, field

from cifar_assets.contracts import LANDING_PREFIX, REJECTED_PREFIX
from cifar_assets.dataset.formats.names import suffix_of
from cifar_assets.dataset.objects import ranges_of
from resources.digests import sha256_bytes
from resources.errors import ObjectChangedError, ObjectNotFoundError
from resources.object_store import ObjectStore

REASON_SUFFIX = ".reason.json"
_SHOWN_ROWS = 1000
_MAX_NAME_BYTES, _MAX_SUFFIX = 200, 8
"""With part of a digest and the suffix of the reason file, a name stays within the file system's limit of 255 bytes."""


@dataclass(frozen=True)
class Rejection:
    """One landed object, or some rows of it, that was refused."""

    key: str
    reason: str
    moved_to: str | None = None
    """The object's new key; None if it stays because other rows of it are used, or if its owner removed it."""
    rows: dict[int, str] = field(default_factory=dict)
    """Reason by row number; empty when the whole object was refused."""


def reject_object(
    raw: ObjectStore, key: str, etag: str, sha256: str, reason: str, rows: dict[int, str]
) -> Rejection | None:
    """Move a landed object to `rejected/`, with the reason next to it.

    None if the object's etag changed since it was checked: it stays, to be checked again.
    """
    target = _rejected_key(key, sha256)
    try:
        raw.copy(key, target, etag)
    except ObjectChangedError:
        return None
    except ObjectNotFoundError:  # another build moved it in the meantime, or its owner removed it
        return Rejection(key, reason, target if raw.exists(target) else None, rows)
    _write_reason(raw, target, key, sha256, reason, rows)
    raw.delete(key, etag)  # keeps an object that was written after the copy
    return Rejection(key, reason, target, rows)


def reject_rows(raw: ObjectStore, key: str, sha256: str, num_rows: int, rows: dict[int, str]) -> Rejection:
    """Write the reason file of an object that stays because its other rows joined the dataset."""
    reason = (
        f"{len(rows)} of {num_rows} rows are refused; the others joined the dataset. "
        "Correct these rows and land them again."
    )
    _write_reason(raw, _rejected_key(key, sha256), key, sha256, reason, rows)
    return Rejection(key, reason, None, rows)


def _rejected_key(key: str, sha256: str) -> str:
    """The name it landed under with part of its digest, so that other content under that name gets another key."""
    suffix = suffix_of(key)[-_MAX_SUFFIX:]
    name = key.removeprefix(LANDING_PREFIX)
    stem = name[: len(name) - len(suffix)]
    if len(stem.encode()) > _MAX_NAME_BYTES:
        stem = sha256_bytes(key.encode())[:32]
    return f"{REJECTED_PREFIX}{stem}-{sha256[:12]}{suffix}"


def _write_reason(raw: ObjectStore, target: str, key: str, sha256: str, reason: str, rows: dict[int, str]) -> None:
    shown = [{"row": row, "reason": why} for row, why in list(rows.items())[:_SHOWN_ROWS]]
    further: defaultdict[str, list[int]] = defaultdict(list)
    for row, why in list(rows.items())[_SHOWN_ROWS:]:
        further[why].append(row)
    content = {
        "object": key,
        "sha256": sha256,
        "reason": reason,
        "rejected_rows": len(rows),
        "rows": shown,
        "further_rows": [{"rows": _ranges(numbers), "reason": why} for why, numbers in further.items()],
    }
    raw.write(target + REASON_SUFFIX, json.dumps(content, indent=1, ensure_ascii=True).encode())


def _ranges(rows: Iterable[int]) -> str:
    """Row numbers in short form, such as "3, 7-9"."""
    return ", ".join(f"{first}" if stop == first + 1 else f"{first}-{stop - 1}" for first, stop in ranges_of(rows))
