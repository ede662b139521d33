"""One training over several processes: who this process is, and sums over all of them."""

import datetime as dt
import logging
import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch import distributed as dist

from cifar_assets.training.stopping import PeerLostError
from resources.errors import ConfigError

_LOG = logging.getLogger(__name__)
_TIMEOUT = dt.timedelta(minutes=30)


@dataclass(frozen=True)
class Processes:
    """This process's place among those that train together, as torchrun or the training operator set it."""

    rank: int = 0
    count: int = 1
    local_rank: int = 0

    @property
    def is_first(self) -> bool:
        """The one process that writes to the store and talks to MLflow and to Dagster. All read."""
        return self.rank == 0

    def share(self, indices: NDArray[np.int64]) -> NDArray[np.int64]:
        """This process's part of a batch; over all processes each index comes up once."""
        return indices[self.rank :: self.count]

    def sum(self, values: Tensor) -> Tensor:
        """Elementwise sum over all processes, in place."""
        if self.count > 1:
            dist.all_reduce(values)
        return values

    def any(self, flag: bool, device: torch.device) -> bool:
        """Whether the flag is set in any process."""
        if self.count == 1:
            return flag
        return bool(self.sum(torch.tensor(int(flag), device=device)).item())

    def from_first(self, number: int, device: torch.device) -> int:
        """Rank 0's number, in every process."""
        if self.count == 1:
            return number
        value = torch.tensor(number, device=device)
        dist.broadcast(value, 0)
        return int(value.item())

    def take_from_first(self, tensors: Sequence[Tensor]) -> None:
        """Overwrite each tensor by rank 0's."""
        if self.count > 1:
            for tensor in tensors:
                dist.broadcast(tensor, 0)


def read_processes() -> Processes:
    """This process's place, from RANK, WORLD_SIZE and LOCAL_RANK; alone when they are not set."""
    try:
        rank, count = int(os.environ.get("RANK", "0")), int(os.environ.get("WORLD_SIZE", "1"))
        local_rank = int(os.environ.get("LOCAL_RANK", "0"))
    except ValueError as error:
        raise ConfigError(f"RANK, WORLD_SIZE and LOCAL_RANK must be whole numbers: {error}.") from error
    if not 0 <= rank < count:
        raise ConfigError(f"RANK is {rank} with WORLD_SIZE {count}: ranks go from 0 to WORLD_SIZE - 1.")
    return Processes(rank, count, local_rank)


def join(processes: Processes, device: torch.device) -> None:
    """Meet the other processes at MASTER_ADDR:MASTER_PORT: over nccl where each has a GPU, otherwise over gloo."""
    if processes.count > 1:
        backend = "nccl" if device.type == "cuda" else "gloo"
        dist.init_process_group(backend, rank=processes.rank, world_size=processes.count, timeout=_TIMEOUT)
        _LOG.info("Process %d of %d has joined over %s", processes.rank + 1, processes.count, backend)


@contextmanager
def noticing_lost_peers(processes: Processes) -> Iterator[None]:
    """Raises PeerLostError for an error of torch that says that another process does not answer."""
    try:
        yield
    except RuntimeError as error:
        # Gloo's errors have no type of their own.
        if processes.count == 1 or not (isinstance(error, dist.DistError) or "gloo" in str(error)):
            raise
        raise PeerLostError(
            f"Process {processes.rank} of {processes.count} lost the others: {str(error).splitlines()[0]} "
            "See their logs for the reason; start the same spec again to continue from the last checkpoint."
        ) from error


def leave(processes: Processes) -> None:
    """End the connection that `join` made."""
    if processes.count > 1 and dist.is_initialized():
        dist.destroy_process_group()
