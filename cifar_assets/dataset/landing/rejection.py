"""Putting refused data aside, with a reason that a person can act on. Nothing is ever deleted for good."""

import json
import logging
import tempfile
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from cifar_assets.contracts import LANDING_PREFIX, REJECTED_PREFIX
from cifar_assets.dataset.formats.isolated import ReaderFailedError, ask
from cifar_assets.dataset.formats.names import suffix_of
from cifar_assets.dataset.objects import RawObject, fetched
from resources.digests import sha256_bytes
from resources.errors import DataError, ObjectChangedError, ObjectNotFoundError
from resources.object_store import ObjectStore

REASON_SUFFIX = ".reason.json"
_SHOWN_ROWS = 1000
_MAX_NAME_BYTES, _MAX_KEY_BYTES, _MAX_SUFFIX = 200, 900, 8
"""With a piece of a digest and the reason's suffix a name stays below the 255 bytes of a file and 1,024 of a key."""
_log = logging.getLogger(__name__)


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
    raw: ObjectStore, key: str, etag: str, sha256: str, reason: str, rows: dict[int, str], hostile: bool
) -> Rejection | None:
    """Move a landed object to `rejected/` under the same name, with the reason next to it.

    None where the object no longer has the etag it had when it was judged: it stays, to be judged again.
    """
    target, is_new = _claim(raw, key, sha256, reason, rows)
    moved_to: str | None = target
    try:
        raw.copy(key, target, etag)
        raw.delete(key, etag)  # an object put there since the copy stays as well
    except (ObjectChangedError, ObjectNotFoundError) as error:
        if is_new:
            raw.delete(target + REASON_SUFFIX)
        if isinstance(error, ObjectChangedError):
            return None
        # Another build moved it in the meantime, or its owner took it back.
        moved_to = target if raw.exists(target) else None
    return Rejection(key, reason, moved_to, rows, hostile)


def reject_rows(raw: ObjectStore, key: str, item: RawObject, rows: dict[int, str]) -> Rejection:
    """Write the refused rows of an object that stays in the landing zone, and why, under its name in `rejected/`.

    Parquet rows are copied with two more columns, row and reason; of an archive only the list of rows is written.
    """
    reason = (
        f"{len(rows)} of {item.rows} rows are refused; the others joined the dataset. "
        "Correct these rows and land them again."
    )
    target, is_new = _claim(raw, key, item.sha256, reason, rows)
    moved_to = target if item.format == "parquet" else None
    if moved_to and (is_new or not raw.exists(target)):
        with fetched(raw, item.key, item.sha256) as path, tempfile.TemporaryDirectory() as folder:
            picked = Path(folder, "rows.parquet")
            arguments = {"path": str(path), "rows": rows, "target": str(picked)}
            try:
                ask("copy_rows", arguments, key, num_bytes=item.size)
            except (DataError, ReaderFailedError) as error:  # of columns that were not read before
                _log.warning("The refused rows of %s are listed, not copied: %s", key, error)
                return Rejection(key, reason, None, rows)
            raw.upload(target, picked)
    return Rejection(key, reason, moved_to, rows)


def _claim(raw: ObjectStore, key: str, sha256: str, reason: str, rows: dict[int, str]) -> tuple[str, bool]:
    """Write the reason file; gives the key it belongs to, and False where the same file was there already.

    The same name under `rejected/`; with a piece of the digest where other content was rejected under that name. The
    reason file is created before the object, so that of two builds only one gets the name.
    """
    shown = [{"row": row, "reason": why} for row, why in list(rows.items())[:_SHOWN_ROWS]]
    content = {"object": key, "sha256": sha256, "reason": reason, "rejected_rows": len(rows), "rows": shown}
    data = json.dumps(content, indent=1, ensure_ascii=True).encode()
    plain = REJECTED_PREFIX + key.removeprefix(LANDING_PREFIX)
    suffix = suffix_of(plain)
    if len(plain.rpartition("/")[2].encode()) > _MAX_NAME_BYTES or len(plain.encode()) > _MAX_KEY_BYTES:
        plain = f"{REJECTED_PREFIX}{sha256_bytes(key.encode())[:32]}{suffix[-_MAX_SUFFIX:]}"
    for target in (plain, f"{plain[: len(plain) - len(suffix)]}-{sha256[:12]}{suffix}"):
        reason_key = target + REASON_SUFFIX
        is_foreign = not raw.exists(reason_key) and raw.exists(target) and target == plain
        if not is_foreign and raw.create(reason_key, data):
            return target, True
        if not is_foreign and (found := _read_reason(raw, reason_key)).get("sha256") == sha256:
            if found == content:
                return target, False
            break
    raw.write(reason_key, data)
    return target, True


def _read_reason(raw: ObjectStore, reason_key: str) -> dict[str, Any]:
    try:
        return dict(json.loads(raw.read(reason_key)))
    except (ObjectNotFoundError, ValueError, TypeError):
        return {}
