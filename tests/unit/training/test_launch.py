import io
import signal
from typing import cast

import pytest
from torch.distributed import DistNetworkError
from torch.distributed.elastic.rendezvous.api import RendezvousConnectionError

from cifar_assets.training import __main__ as command
from cifar_assets.training import job, launch
from cifar_assets.training.distributed import PeerLostError, Processes, noticing_lost_peers
from cifar_assets.training.launch import exit_code
from cifar_assets.training.spec import JobSpec
from resources.errors import StoreError
from resources.trainer.contract import EXIT_BAD_SPEC, EXIT_RESUME

KILLED, TOLD = -signal.SIGKILL, -signal.SIGTERM


@pytest.mark.parametrize(
    ("codes", "expected"),
    [
        ([EXIT_RESUME, EXIT_RESUME], EXIT_RESUME),
        ([KILLED, EXIT_RESUME], EXIT_RESUME),
        ([EXIT_RESUME, 0], EXIT_RESUME),
        ([TOLD, EXIT_BAD_SPEC], EXIT_BAD_SPEC),
        ([1, EXIT_RESUME], 1),
        ([1, TOLD], 1),
    ],
)
def test_a_process_that_failed_by_itself_decides(codes: list[int], expected: int) -> None:
    assert exit_code(codes) == expected


@pytest.mark.parametrize("error", [RendezvousConnectionError("gone"), DistNetworkError("gone")])
def test_machines_that_lose_one_another_ask_to_be_started_again(
    error: Exception, monkeypatch: pytest.MonkeyPatch
) -> None:
    def lose(options: object) -> None:
        raise error

    monkeypatch.setattr(launch.run, "run", lose)
    assert launch.main(["--nproc-per-node=1"]) == EXIT_RESUME


def test_only_a_process_that_has_others_can_lose_them() -> None:
    with pytest.raises(PeerLostError, match="Process 0 of 2 lost the others"), noticing_lost_peers(Processes(0, 2)):
        raise DistNetworkError("connection reset")
    with pytest.raises(DistNetworkError), noticing_lost_peers(Processes()):
        raise DistNetworkError("connection reset")
    with pytest.raises(RuntimeError, match="out of memory"), noticing_lost_peers(Processes(0, 2)):
        raise RuntimeError("out of memory")


class PipesSession:
    """A fake connection to Dagster; closing it fails if messages cannot be delivered."""

    report_custom_message = None

    def __init__(self, is_delivered: bool):
        self._is_delivered = is_delivered

    def __enter__(self) -> "PipesSession":
        return self

    def __exit__(self, *error: object) -> None:
        if not self._is_delivered:
            raise StoreError("away", transient=True)


def test_checkpoints_stay_until_dagster_has_the_result(monkeypatch: pytest.MonkeyPatch) -> None:
    """A restart continues from them."""
    cleared: list[object] = []
    monkeypatch.setenv("DAGSTER_PIPES_CONTEXT", "started by Pipes")
    monkeypatch.setattr(job, "run_job", lambda *arguments: None)
    monkeypatch.setattr(job, "clear_checkpoints", cleared.append)
    monkeypatch.setattr(command, "open_dagster_pipes", lambda message_writer: PipesSession(False))
    with pytest.raises(StoreError, match="away"):
        command.run(cast(JobSpec, None), io.StringIO())
    assert cleared == []
    monkeypatch.setattr(command, "open_dagster_pipes", lambda message_writer: PipesSession(True))
    command.run(cast(JobSpec, None), io.StringIO())
    assert len(cleared) == 1
