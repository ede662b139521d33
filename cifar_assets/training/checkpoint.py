"""Checkpoints in the object store: one object each, written atomically, named by its digest, verified when read."""

import json
import logging
import re
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from safetensors import SafetensorError
from safetensors.torch import load, save
from torch import Tensor

from resources.digests import sha256_bytes
from resources.errors import DataError, ObjectNotFoundError
from resources.object_store import ObjectStore

_LOG = logging.getLogger(__name__)
_NAME = re.compile(r"step-(\d{9})-([0-9a-f]{64})\.safetensors")
_METADATA_KEY = "checkpoint"


@dataclass(frozen=True)
class Checkpoint:
    """A training's tensors and its position, after `step` optimizer steps."""

    step: int
    tensors: dict[str, Tensor]
    position: dict[str, Any]
    uri: str


class CheckpointStore:
    """Checkpoints of one training job.

    Args:
        store: rooted at the job's own folder.
        keep: how many of the newest to keep.
    """

    def __init__(self, store: ObjectStore, keep: int):
        self._store = store
        self._keep = keep

    def save(self, step: int, tensors: dict[str, Tensor], position: dict[str, Any]) -> str:
        """Store a checkpoint, remove those beyond the newest `keep`, and return its URI."""
        data = save(
            {name: value.detach().cpu().contiguous() for name, value in tensors.items()},
            metadata={_METADATA_KEY: json.dumps(position)},
        )
        key = f"step-{step:09d}-{sha256_bytes(data)}.safetensors"
        self._store.write(key, data)
        for old in self._keys()[self._keep :]:
            if old != key:
                self._store.delete(old)
        return self._store.uri(key)

    def load_newest(self, use: Callable[[Checkpoint], None] = lambda checkpoint: None) -> Checkpoint | None:
        """The newest whole checkpoint that `use` took, or None. `use` raises DataError for one that does not fit.

        One that is damaged or does not fit is reported, removed and passed over.
        """
        for key in self._keys():
            try:
                checkpoint = self._load(key)
                use(checkpoint)
                return checkpoint
            except ObjectNotFoundError:
                continue
            except DataError as error:
                _LOG.warning("Checkpoint passed over: %s", error)
                self._store.delete(key)
        return None

    def load_step(self, step: int) -> Checkpoint:
        """The checkpoint after that many steps. Raises ObjectNotFoundError without it, DataError when damaged."""
        for key in self._keys():
            if key.startswith(f"step-{step:09d}-"):
                return self._load(key)
        raise ObjectNotFoundError(f"{self._store.uri()}: no checkpoint of step {step}.")

    def clear(self) -> None:
        """Remove every checkpoint of the job."""
        for key in self._keys():
            self._store.delete(key)

    def _keys(self) -> list[str]:
        """Keys of checkpoints, the newest first."""
        keys = [info.key for info in self._store.list() if _NAME.fullmatch(info.key)]
        return sorted(keys, reverse=True)

    def _load(self, key: str) -> Checkpoint:
        match = _NAME.fullmatch(key)
        if match is None:
            raise DataError(f"{self._store.uri(key)} is not named like a checkpoint.")
        data = self._store.read_verified(key, match[2])
        try:
            header_size = int.from_bytes(data[:8], "little")
            header = json.loads(data[8 : 8 + header_size])
            position = json.loads(header["__metadata__"][_METADATA_KEY])
            return Checkpoint(int(match[1]), load(data), position, self._store.uri(key))
        except (SafetensorError, KeyError, TypeError, ValueError) as error:
            raise DataError(f"{self._store.uri(key)} is not a checkpoint of this project: {error}") from error
