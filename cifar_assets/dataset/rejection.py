"""Putting refused data aside, with a reason that a person can act on. Nothing is ever deleted for good."""

import json
import tempfile
from dataclasses import dataclass, field
from pathlib import Path

from cifar_assets.contracts import LANDING_PREFIX, REJECTED_PREFIX
from cifar_assets.dataset.formats.parquet import pick_rows
from cifar_assets.dataset.layouts import suffix_of
from cifar_assets.dataset.objects import RawObject, fetched
from cifar_assets.errors import ObjectNotFoundError
from cifar_assets.object_store import ObjectStore

REASON_SUFFIX = ".reason.json"
_SHOWN_ROWS = 1000


@dataclass(frozen=True)
class Rejection:
    """One landed object, or some rows of it, that was refused."""

    key: str
    reason: str
    moved_to: str | None = None
    """Where the object, or a copy of its refused rows, lies now; None where only the reason file lists the rows."""
    rows: dict[int, str] = field(default_factory=dict)
    """Reason by row number; empty when the object as a whole was refused."""
    hostile: bool = False


def reject_object(
    raw: ObjectStore, key: str, sha256: str, reason: str, *, rows: dict[int, str] | None = None, hostile: bool = False
) -> Rejection:
    """Move a landed object to `rejected/` under the same name and write the reason next to it."""
    target = _target(raw, key, sha256)
    try:
        raw.copy(key, target)
    except ObjectNotFoundError:
        # Another build moved it in the meantime, or its owner took it back.
        return Rejection(key, reason, target if raw.exists(target) else None, rows or {}, hostile)
    _write_reason(raw, target, key, sha256, reason, rows or {})
    raw.delete(key)
    return Rejection(key, reason, target, rows or {}, hostile)


def reject_rows(raw: ObjectStore, key: str, item: RawObject, rows: dict[int, str]) -> Rejection:
    """Write the refused rows of an object that stays in the landing zone, and why, under its name in `rejected/`.

    Parquet rows are copied with two more columns, row and reason; of an archive only the list of rows is written.
    """
    target = _target(raw, key, item.sha256)
    reason = (
        f"{len(rows)} of {item.rows} rows are refused; the others joined the dataset. "
        "Correct these rows and land them again."
    )
    moved_to = target if item.format == "parquet" else None
    is_new = _write_reason(raw, target, key, item.sha256, reason, rows)
    if moved_to and (is_new or not raw.exists(target)):
        with fetched(raw, item.key, item.sha256) as path, tempfile.TemporaryDirectory() as folder:
            picked = Path(folder, "rows.parquet")
            pick_rows(path, rows, picked)
            raw.upload(target, picked)
    return Rejection(key, reason, moved_to, rows)


def _target(raw: ObjectStore, key: str, sha256: str) -> str:
    """The same name under `rejected/`; with a piece of the digest where other content was rejected under that name."""
    target = REJECTED_PREFIX + key.removeprefix(LANDING_PREFIX)
    if not raw.exists(target + REASON_SUFFIX) and not raw.exists(target):
        return target
    if raw.exists(target + REASON_SUFFIX) and json.loads(raw.read(target + REASON_SUFFIX)).get("sha256") == sha256:
        return target
    suffix = suffix_of(target)
    return f"{target[: len(target) - len(suffix)]}-{sha256[:12]}{suffix}"


def _write_reason(raw: ObjectStore, target: str, key: str, sha256: str, reason: str, rows: dict[int, str]) -> bool:
    """Write the reason file; False when the same one is there already."""
    shown = [{"row": row, "reason": why} for row, why in list(rows.items())[:_SHOWN_ROWS]]
    content = {"object": key, "sha256": sha256, "reason": reason, "rejected_rows": len(rows), "rows": shown}
    data = json.dumps(content, indent=1, ensure_ascii=True).encode()
    reason_key = target + REASON_SUFFIX
    if raw.exists(reason_key) and raw.read(reason_key) == data:
        return False
    raw.write(reason_key, data)
    return True
