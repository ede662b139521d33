"""Distributed training; most processes are started by the launcher."""

import multiprocessing
import os
import signal
import sqlite3
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import psutil
import pytest
import torch

from cifar_assets.training import distributed
from cifar_assets.training.checkpoint import CheckpointStore
from cifar_assets.training.data import open_data
from cifar_assets.training.device import choose_processor
from cifar_assets.training.distributed import Processes, StopSignal, TrainingStopped
from cifar_assets.training.loop import Trainer
from cifar_assets.training.spec import JobSpec
from resources.object_store import open_store
from resources.trainer.contract import EXIT_BAD_SPEC, EXIT_RESUME
from tests.fixtures.pausing import pausing
from tests.fixtures.ports import free_port
from tests.unit.training.jobs import (
    COMMAND,
    Workplace,
    json_file,
    run_forked,
    run_trainer,
    start_trainer,
    wait_for_line,
)

pytestmark = pytest.mark.timeout(1800)

LAUNCHER = (sys.executable, "-m", "cifar_assets.training.launch", "--standalone", "--nproc-per-node=2")


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Workplace:
    return Workplace.make(tmp_path_factory.mktemp("distributed"), train=610)


RECIPE = {
    "epochs": 5,
    "width": 8,
    "batch_size": 31,
    "learning_rate": 0.05,
    "resolutions": [{"start": 0, "size": 16}],
}
PLAIN_STEPS = {"optimizer": "sgd", "warmup": 0.25}
"""Muon normalizes every step, so the noise of batch norm on half a batch would be as large as the gradient."""
EXECUTION = {"threads": 1, "device": "cpu", "checkpoint_every_steps": 3}


@pytest.fixture(scope="module")
def two(place: Workplace) -> str:
    """Output of a job of two processes, tracked in MLflow."""
    tracking = {
        "tracking_uri": f"sqlite:///{place.folder}/mlflow.db",
        "artifact_uri": (place.folder / "artifacts").as_uri(),
    }
    spec = place.spec("two", recipe_fields=RECIPE | PLAIN_STEPS, execution=EXECUTION, mlflow=tracking)
    done = run_trainer(spec, *LAUNCHER)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def test_two_processes_train_like_one(place: Workplace, two: str) -> None:
    """Batches of 30 and 31 images over two processes, one MLflow run, one model, the accuracy of one process."""
    code, output = run_forked(place.spec("alone", recipe_fields=RECIPE | PLAIN_STEPS))
    assert code == 0, output
    digest, metrics = place.only_model("two")
    _, expected = place.only_model("alone")
    assert metrics["test_accuracy"] == pytest.approx(expected["test_accuracy"], abs=0.2)
    assert metrics["test_images"] == np.sum(metrics["confusion_matrix"]) == 40
    losses = [[record["train_loss"] for record in m["history"]] for m in (metrics, expected)]
    # the first epoch's batches and augmentations are the same; only batch norm sees half a batch
    assert losses[0][0] == pytest.approx(losses[1][0], rel=0.1)
    assert losses[0][-1] == pytest.approx(losses[1][-1], abs=0.35)
    assert json_file(place.models("two"), f"{digest}/environment.json")["processes"] == 2

    assert sum(line.startswith("Epoch 1/5") for line in two.splitlines()) == 1
    assert place.checkpoints("two") == []
    with sqlite3.connect(place.folder / "mlflow.db") as database:
        assert database.execute("select status from runs").fetchall() == [("FINISHED",)]


def test_three_processes_continue_to_the_same_weights(place: Workplace) -> None:
    """The sum of three numbers depends on their order; that of two does not."""
    port = str(free_port())
    specs = [place.spec(name, recipe_fields=RECIPE | {"epochs": 1}, execution=EXECUTION) for name in ("whole", "parts")]
    context = multiprocessing.get_context("forkserver")
    processes = [
        context.Process(target=train_whole_and_in_parts, args=(rank, port, *specs), daemon=True) for rank in range(3)
    ]
    for process in processes:
        process.start()
    for process in processes:
        process.join(500)
    assert [process.exitcode for process in processes] == [0, 0, 0]


def train_whole_and_in_parts(rank: int, port: str, whole: JobSpec, parts: JobSpec) -> None:
    """One process of three. Its exit code is 1 if tensors differ."""
    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=port)
    torch.set_num_threads(1)
    processes = Processes(rank, 3)
    processor = choose_processor(whole.execution, "float32")
    distributed.join(processes, processor.device)

    def make(spec: JobSpec, stop: StopSignal) -> Trainer:
        checkpoints = CheckpointStore(open_store(spec.output_uri), 2)
        return Trainer(spec, open_data(spec, processor.device), processor, processes, checkpoints, stop)

    undisturbed, stop = make(whole, StopSignal()), StopSignal()
    undisturbed.train(lambda record: None)
    stop.is_set = True
    with pytest.raises(TrainingStopped):
        make(parts, stop).train(lambda record: None)
    continued = make(parts, StopSignal())
    assert continued.resumed_from
    continued.train(lambda record: None)
    expected = undisturbed.state.tensors()
    distributed.leave(processes)
    sys.exit(any(not torch.equal(value, expected[name]) for name, value in continued.state.tensors().items()))


def test_process_that_lost_a_peer_requests_a_restart(place: Workplace, tmp_path: Path) -> None:
    """Two processes without the launcher, as in two pods: one is killed, and the other reports it."""
    spec = place.spec("cut", recipe_fields=RECIPE, execution=EXECUTION)
    script = tmp_path / "cut.py"
    script.write_text(CUT)
    meeting = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port()), "WORLD_SIZE": "2"}
    killed = start_trainer(spec, sys.executable, str(script), env={**meeting, "RANK": "1"})
    survivor = run_trainer(spec, *COMMAND, env={**meeting, "RANK": "0"})
    killed.communicate(timeout=300)
    assert killed.returncode == -signal.SIGKILL
    assert survivor.returncode == EXIT_RESUME, survivor.stdout + survivor.stderr
    assert "start the same spec again" in survivor.stdout
    assert place.published("cut") == {}
    assert place.checkpoints("cut")


def test_the_launcher_says_whether_the_training_continues(place: Workplace, two: str) -> None:
    """A process is killed, then the launcher is stopped; the third start ends like an uninterrupted training."""
    spec = place.spec("stopped", recipe_fields=RECIPE | PLAIN_STEPS, execution=EXECUTION)
    pause = pausing(place.folder / "pause")
    job = start_trainer(spec, *LAUNCHER, env=pause)
    wait_for_line(job, "Epoch 1/5")
    psutil.Process(job.pid).children()[1].kill()
    output, _ = job.communicate(timeout=500)
    assert job.returncode == EXIT_RESUME, output
    job = start_trainer(spec, *LAUNCHER, env=pause)
    wait_for_line(job, "Continuing from the checkpoint")
    wait_for_line(job, "Epoch 2/5")
    job.terminate()
    output, _ = job.communicate(timeout=500)
    assert job.returncode == EXIT_RESUME, output
    assert "Stopped after step" in output
    done = run_trainer(spec, *LAUNCHER)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "Continuing from the checkpoint" in done.stdout
    assert place.only_model("stopped")[0] == place.only_model("two")[0]


@pytest.mark.skipif(
    subprocess.run(["unshare", "--uts", "true"], capture_output=True).returncode != 0, reason="needs to rename the host"
)
def test_processes_on_one_machine_connect_without_its_host_name(place: Workplace) -> None:
    spec = place.spec("nameless", recipe_fields=RECIPE | {"epochs": 1}, execution=EXECUTION)
    rename = ["unshare", "--uts", "sh", "-c", 'hostname no-such-host.invalid && exec "$@"', "sh"]
    started = time.monotonic()
    done = run_trainer(spec, *rename, *LAUNCHER)
    assert done.returncode == 0, done.stdout + done.stderr
    assert time.monotonic() - started < 300  # what looking up a name that does not exist takes torchrun
    assert len(place.published("nameless")) == 1


def test_launcher_reports_an_invalid_spec(place: Workplace) -> None:
    done = run_trainer(place.spec(), *LAUNCHER, env={"CIFAR_JOB_SPEC": "{}"})
    assert done.returncode == EXIT_BAD_SPEC, done.stdout + done.stderr


CUT = """
import os, signal, sys
from cifar_assets.training import loop
step = loop.Trainer.step
count = 0
def step_or_die(self, *rest):
    global count
    count += 1
    if count == 29 and os.environ["RANK"] == "1":
        os.kill(os.getpid(), signal.SIGKILL)
    step(self, *rest)
loop.Trainer.step = step_or_die
from cifar_assets.training.__main__ import main
sys.exit(main([]))
"""
