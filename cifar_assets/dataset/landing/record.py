"""Which landed objects the last build of the raw dataset read, for the sensor that asks for the next one."""

from collections.abc import Iterable

from pydantic import BaseModel, ValidationError

from resources.digests import canonical_json, sha256_json
from resources.errors import ObjectNotFoundError
from resources.object_store import ObjectInfo, ObjectStore

RECORD_KEY = "landing-read.json"
_VERSION = 1
_FINGERPRINT_CHARS = 16


class _Record(BaseModel):
    version: int
    read: frozenset[str]


def fingerprint(info: ObjectInfo) -> str:
    """Identity of one state of an object. Time stamps are left out: stores disagree on them."""
    return sha256_json([info.key, info.etag, info.size])[:_FINGERPRINT_CHARS]


def write_record(raw: ObjectStore, infos: Iterable[ObjectInfo]) -> None:
    """Note the objects that a build has read."""
    read = sorted(fingerprint(info) for info in infos)
    raw.write(RECORD_KEY, canonical_json({"version": _VERSION, "read": read}))


def read_record(raw: ObjectStore) -> frozenset[str] | None:
    """Fingerprints of what the last build read; None where no build noted them in a form that is known here."""
    try:
        record = _Record.model_validate_json(raw.read(RECORD_KEY))
    except (ObjectNotFoundError, ValidationError):
        return None
    return record.read if record.version == _VERSION else None
