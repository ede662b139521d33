"""Content digests, which identify all versions of data and models."""

import hashlib
import json
from pathlib import Path
from typing import Any, BinaryIO

_CHUNK_BYTES = 1 << 20


def canonical_json(value: Any) -> bytes:
    """Canonical JSON: sorted keys, no spaces, ASCII; ValueError for NaN and infinity."""
    return json.dumps(value, sort_keys=True, separators=(",", ":"), ensure_ascii=True, allow_nan=False).encode()


def sha256_bytes(data: bytes) -> str:
    """Lowercase hex sha256 of the bytes."""
    return hashlib.sha256(data).hexdigest()


def sha256_file(path: Path) -> str:
    """Lowercase hex sha256 of the file's content, read in chunks."""
    with path.open("rb") as file:
        return sha256_stream(file)


def sha256_stream(file: BinaryIO) -> str:
    """Lowercase hex sha256 of the rest of the stream, read in chunks."""
    digest = hashlib.sha256()
    while chunk := file.read(_CHUNK_BYTES):
        digest.update(chunk)
    return digest.hexdigest()


def sha256_json(value: Any) -> str:
    """Lowercase hex sha256 of the value's canonical JSON."""
    return sha256_bytes(canonical_json(value))
