"""Command line: `python -m cifar_assets.training.launch [torchrun options]` trains in several processes.

torchrun itself exits with 1 whatever happened to its processes, even when it was asked to stop, so its exit code does
not tell whether the training can continue.
"""

import logging
import os
import socket
import sys
from collections.abc import Collection, Sequence

from torch.distributed import DistError, run
from torch.distributed.elastic.multiprocessing import SignalException
from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
from torch.distributed.elastic.rendezvous.api import RendezvousError

from resources.trainer.contract import EXIT_BAD_SPEC, EXIT_RESUME

_LOG = logging.getLogger(__name__)
_STANDALONE = "--standalone"


def main(options: Sequence[str]) -> int:
    """Run the training and return the exit code that its processes agree on."""
    if _STANDALONE in options:
        options = _use_loopback(options)
    try:
        run.run(run.parse_args([*options, "-m", "cifar_assets.training"]))
    except SignalException as error:
        _LOG.warning("%s; its processes were asked to stop.", error)
        return EXIT_RESUME
    except (DistError, RendezvousError) as error:
        _LOG.warning("The machines of this training lost one another: %s", error)
        return EXIT_RESUME
    except ChildFailedError as error:
        codes = {rank: failure.exitcode for rank, failure in error.failures.items()}
        _LOG.warning("Exit codes by process (negative for signals): %s", codes)
        return exit_code(codes.values())
    return 0


def _use_loopback(options: Sequence[str]) -> list[str]:
    """Options for one machine that need no host name lookup. torchrun and Gloo would look up this machine's.

    Also sets the interface that Gloo and NCCL use, unless it is already set.
    """
    loopback = next((name for _, name in socket.if_nameindex() if name.startswith("lo")), "lo")
    for variable in ("GLOO_SOCKET_IFNAME", "NCCL_SOCKET_IFNAME"):
        os.environ.setdefault(variable, loopback)
    others = [option for option in options if option != _STANDALONE]
    return ["--rdzv-backend=c10d", "--rdzv-endpoint=127.0.0.1:0", "--local-addr=127.0.0.1", *others]


def exit_code(codes: Collection[int]) -> int:
    """The exit code that represents those of all processes, some of which failed.

    When one process fails, the others lose it or are asked to stop, so its code takes precedence.
    """
    if EXIT_BAD_SPEC in codes:
        return EXIT_BAD_SPEC
    return EXIT_RESUME if all(code == EXIT_RESUME or code <= 0 for code in codes) else 1


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
