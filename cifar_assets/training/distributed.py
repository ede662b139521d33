"""The processes of one training: their ranks, all-reduce and broadcast, and stopping early."""

import datetime as dt
import logging
import os
import signal
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from types import FrameType

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch import distributed as dist

from resources.errors import ConfigError, ExplainedError

_LOG = logging.getLogger(__name__)
_TIMEOUT = dt.timedelta(minutes=30)
_PLACE = {"RANK": "0", "WORLD_SIZE": "1", "LOCAL_RANK": "0"}
"""Variables that torchrun and the training operator set, and their values for a single process."""


@dataclass(frozen=True)
class Processes:
    """This process's rank among those that train together.

    Only rank 0 writes to the store, MLflow and Dagster. All ranks read.
    """

    rank: int = 0
    world_size: int = 1
    local_rank: int = 0

    def part_of(self, indices: NDArray[np.int64]) -> NDArray[np.int64]:
        """This process's part of a batch. Each index belongs to exactly one process."""
        return indices[self.rank :: self.world_size]

    def all_reduce(self, values: Tensor) -> Tensor:
        """Elementwise sum over all processes, in place."""
        if self.world_size > 1:
            dist.all_reduce(values)
        return values

    def any(self, flag: bool, device: torch.device) -> bool:
        """Whether the flag is set in any of the processes."""
        if self.world_size == 1:
            return flag  # called after every step: do not synchronize with a GPU
        return bool(self.all_reduce(torch.tensor(int(flag), device=device)).item())

    def broadcast(self, values: Tensor) -> Tensor:
        """Overwrite the tensor with rank 0's, in place."""
        if self.world_size > 1:
            dist.broadcast(values, 0)
        return values


class TrainingStopped(ExplainedError):  # noqa: N818 (not an error: the way a stop travels)
    """The trainer was asked to stop. A restart with the same spec continues from the last checkpoint."""


class PeerLostError(TrainingStopped):
    """Another process of the training was lost. A restart with the same spec continues from the last checkpoint."""


class StopSignal:
    """Records a SIGTERM or SIGINT so that the loop ends at the next step. A second signal has its usual effect."""

    def __init__(self) -> None:
        self.is_set = False

    def install(self) -> None:
        """Start handling the signals."""
        for number in (signal.SIGTERM, signal.SIGINT):
            signal.signal(number, self._remember)

    def _remember(self, number: int, frame: FrameType | None) -> None:
        self.is_set = True
        signal.signal(number, signal.SIG_DFL)


def read_processes() -> Processes:
    """This process's rank, from RANK, WORLD_SIZE and LOCAL_RANK; a single process if they are not set."""
    place = {name: os.environ.get(name, default) for name, default in _PLACE.items()}
    rank, world_size, local_rank = (int(value) if value.isdecimal() else -1 for value in place.values())
    if not 0 <= rank < world_size or local_rank < 0:
        raise ConfigError(f"{place} is not a valid rank: expected ranks from 0 to WORLD_SIZE - 1.")
    return Processes(rank, world_size, local_rank)


def join(processes: Processes, device: torch.device) -> None:
    """Join the other processes at MASTER_ADDR:MASTER_PORT, with NCCL if each has a GPU, otherwise with Gloo."""
    if processes.world_size > 1:
        backend = "nccl" if device.type == "cuda" else "gloo"
        dist.init_process_group(backend, rank=processes.rank, world_size=processes.world_size, timeout=_TIMEOUT)
        _LOG.info("Process %d of %d has joined over %s", processes.rank + 1, processes.world_size, backend)


@contextmanager
def noticing_lost_peers(processes: Processes) -> Iterator[None]:
    """Raises PeerLostError for a torch error which means that another process does not respond."""
    try:
        yield
    except RuntimeError as error:
        # Gloo's errors have no specific type.
        if processes.world_size == 1 or not (isinstance(error, dist.DistError) or "gloo" in str(error)):
            raise
        raise PeerLostError(
            f"Process {processes.rank} of {processes.world_size} lost the others: {str(error).splitlines()[0]} "
            "See their logs for the reason; start the same spec again to continue from the last checkpoint."
        ) from error


def leave(processes: Processes) -> None:
    """Close the connection made by `join`."""
    if processes.world_size > 1 and dist.is_initialized():
        dist.destroy_process_group()
