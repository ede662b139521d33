"""Content digests: what every version of data and of a model is identified by."""

import hashlib
import json
from pathlib import Path
from typing import Any, BinaryIO

_CHUNK_BYTES = 1 << 20


def canonical_json(value: Any) -> bytes:
    """One byte sequence per JSON value: sorted keys, no spaces, ASCII; NaN and infinity are refused (ValueError)."""
    return json.dumps(value, sort_keys=True, separators=(",", ":"), ensure_ascii=True, allow_nan=False).encode()


def sha256_bytes(data: bytes) -> str:
    """Lower-case hex sha256 of the bytes."""
    return hashlib.sha256(data).hexdigest()


def sha256_file(path: Path) -> str:
    """Lower-case hex sha256 of the file's content, read in pieces."""
    with path.open("rb") as file:
        return sha256_stream(file)


def sha256_stream(file: BinaryIO) -> str:
    """Lower-case hex sha256 of what is left to read, in pieces."""
    digest = hashlib.sha256()
    while chunk := file.read(_CHUNK_BYTES):
        digest.update(chunk)
    return digest.hexdigest()


def sha256_json(value: Any) -> str:
    """Lower-case hex sha256 of the value's canonical JSON."""
    return sha256_bytes(canonical_json(value))
