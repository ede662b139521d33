"""What is under `rejected/`, found by the name it landed under."""

import json
from typing import Any

from resources.object_store import FolderStore


def rejected_keys(raw: FolderStore, name: str) -> list[str]:
    """Keys of an object that was rejected, and of its reason file."""
    return [info.key for info in raw.list(f"rejected/{name.partition('.')[0]}-")]


def read_rejected(raw: FolderStore, name: str) -> bytes:
    (key,) = (key for key in rejected_keys(raw, name) if not key.endswith(".reason.json"))
    return raw.read(key)


def reason_of(raw: FolderStore, name: str) -> dict[str, Any]:
    (key,) = (key for key in rejected_keys(raw, name) if key.endswith(".reason.json"))
    return json.loads(raw.read(key))
