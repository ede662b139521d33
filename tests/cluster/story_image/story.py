"""The program in the pods of cluster tests: `python story.py STORY [NUMBER]`. Needs only dagster-pipes and minio."""

import json
import os
import signal
import socket
import sys
import time

from dagster_pipes import PipesEnvVarParamsLoader, open_dagster_pipes

from resources.pipes_store import PipesStoreMessageWriter

RANK = int(os.environ.get("RANK") or os.environ.get("PET_NODE_RANK", "0"))
"""A PyTorchJob's operator sets RANK. Trainer sets only torchrun's variables."""


def epochs(count: int) -> None:
    """One epoch per second; rank 0 reports it to Dagster, and every rank prints it."""
    stop_on_sigterm()
    if RANK != 0 or not PipesEnvVarParamsLoader().is_dagster_pipes_process():
        for epoch in range(count):
            say(f"rank {RANK} epoch {epoch}")
            time.sleep(1)
        return
    with open_dagster_pipes(message_writer=PipesStoreMessageWriter()) as pipes:
        pipes.log.info("the story begins")
        for epoch in range(count):
            say(f"rank {RANK} epoch {epoch}")
            pipes.report_custom_message({"epoch": epoch, "host": socket.gethostname()})
            time.sleep(1)


def peers(count: int) -> None:
    """Rank 0 waits until the others have connected over the network that the operator set up."""
    stop_on_sigterm()
    world = int(os.environ.get("WORLD_SIZE") or os.environ["PET_NNODES"])
    master, port = os.environ["PET_MASTER_ADDR"], int(os.environ["PET_MASTER_PORT"])
    if RANK > 0:
        deadline = time.monotonic() + 300
        while True:
            try:
                with socket.create_connection((master, port), timeout=5) as peer:
                    peer.sendall(json.dumps({"rank": RANK}).encode())
                break
            except OSError:
                if time.monotonic() > deadline:
                    raise
                time.sleep(0.5)
        say(f"rank {RANK} greeted")
        return
    with (
        socket.create_server(("", port)) as server,
        open_dagster_pipes(message_writer=PipesStoreMessageWriter()) as pipes,
    ):
        ranks = []
        for _ in range(world - 1):
            connection, _ = server.accept()
            with connection:
                ranks.append(json.loads(connection.recv(1000))["rank"])
        say(f"rank 0 was greeted by {sorted(ranks)}")
        pipes.report_custom_message({"epoch": 0, "ranks": sorted(ranks)})
    time.sleep(count)


def fail(code: int) -> None:
    say("about to fail")
    say("ValueError: the data has 11 classes, expected 10")
    sys.exit(code)


def memory(mebibytes: int) -> None:
    """Allocates memory until the kernel kills it."""
    taken = []
    while True:
        taken.append(bytearray(os.urandom(1 << 20) * mebibytes))
        say(f"took {len(taken) * mebibytes} MiB")


def crash(_: int) -> None:
    import no_such_module  # noqa: F401  # pyright: ignore[reportMissingImports]


def deaf(seconds: int) -> None:
    """Ignores SIGTERM, like a process with id 1 in its container and without a handler."""
    say("deaf")
    time.sleep(seconds)


def stop_on_sigterm() -> None:
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))


def say(text: str) -> None:
    print(text, flush=True)


if __name__ == "__main__":
    say("started")
    stories = {f.__name__: f for f in (epochs, peers, fail, memory, crash, deaf)}
    stories[sys.argv[1]](int(sys.argv[2]) if len(sys.argv) > 2 else 0)
